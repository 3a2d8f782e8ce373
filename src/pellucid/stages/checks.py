"""Checks that are always on and fatal: what they compare must agree, or the run would train on a lie."""

from __future__ import annotations

from torch import Tensor

from pellucid.config import AlgoConfig
from pellucid.errors import IntegrityError
from pellucid.execution.workers import ActorWorker
from pellucid.models import Precision
from pellucid.types import Batch

PARITY_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest |engine - trainer| log-prob of one token, in nats. float32 agrees to about 1e-5."""
PARITY_MEAN_TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 0.05}
START_KL_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats per token between the actor's start and the same weights as reference."""


def old_logprobs(batch: Batch, actor: ActorWorker, algo: AlgoConfig, step: int) -> dict[str, Tensor]:
    """old_logprobs (B,T), and entropy where they are the trainer's.

    The engine recorded them at sampling. In float32 they are the trainer's to about 1e-5, so a second pass over the batch
    buys nothing, as long as somebody looks: the first iteration makes it and compares every token, and every later one
    compares the tokens of its first minibatch, before any weight moves. They are not taken from the engine where the
    two differ by rounding (bfloat16: the ratio would carry the noise) or where another version of the policy sampled.
    """
    precision = actor.model.precision
    wanted = algo.old_logprobs == "engine" or (algo.old_logprobs == "auto" and precision == "float32")
    if wanted and step > 1 and bool((batch.policy_version == step - 1).all()):
        return {"old_logprobs": batch.rollout_logprobs}
    logprobs, entropy = actor.logprobs(batch, entropy=True)
    check_parity(batch, logprobs, precision, step)
    assert entropy is not None
    return {"old_logprobs": logprobs, "entropy": entropy}


def parity_gap(batch: Batch, old_logprobs: Tensor) -> Tensor:
    """|engine's log-prob - trainer's| of every action, (num_action_tokens,)."""
    return (batch.rollout_logprobs - old_logprobs).abs()[batch.action_mask]


def check_parity(batch: Batch, old_logprobs: Tensor, precision: Precision, step: int) -> None:
    """The engine sampled from the policy that is trained: same weights, same temperature, same arithmetic.

    Before the first update this is the parity gate; after each weight sync it shows that the new weights arrived.
    Raises IntegrityError, naming the token where they differ most.
    """
    gap = (batch.rollout_logprobs - old_logprobs).abs() * batch.action_mask
    worst, mean = gap.max().item(), gap.sum().item() / batch.action_mask.sum().item()
    if worst <= PARITY_TOLERANCE[precision] and mean <= PARITY_MEAN_TOLERANCE[precision]:
        return
    row, column = divmod(int(gap.argmax()), gap.shape[1])
    raise IntegrityError(
        f"step {step}: the engine's log-probs are not the trainer's: at sample {row}, token {column} "
        f"{batch.rollout_logprobs[row, column]:.5f} against {old_logprobs[row, column]:.5f} "
        f"(mean gap {mean:.2g}, tolerance {PARITY_MEAN_TOLERANCE[precision]:g}, largest {worst:.2g}, tolerance "
        f"{PARITY_TOLERANCE[precision]:g}); the weights or the temperature of the two differ"
    )


def check_start(kl_per_token: Tensor, precision: Precision) -> None:
    """At the first iteration the actor is its own reference, so every token's KL is 0. kl_per_token: (B,T), k1."""
    worst = kl_per_token.abs().max().item()
    if not worst <= START_KL_TOLERANCE[precision]:
        raise IntegrityError(
            f"step 1: the actor starts as its own reference, but a token's KL is {worst:.3g} nats; "
            "the two were loaded or run differently"
        )
