"""What chapter 7 measures: the estimators of KL by sums over all tokens, and runs of PPO under a price.

The sums leave nothing to sampling, so those figures are exact (in float64).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.config import OptimizerConfig, PPOConfig
from pellucid.core import kl_estimate, kl_loss
from pellucid.learn.lesson import Lesson
from pellucid.learn.small_run import QUIET, small_run
from pellucid.stages.clock import Clock
from pellucid.stages.evaluation import evaluate
from pellucid.stages.ppo import sampling_params
from pellucid.stages.quickstart import gold_judge
from pellucid.stages.state import PPOState
from pellucid.types import Batch, derive_seed

KINDS = ("k1", "k2", "k3")
SFT_STEPS, RM_STEPS = 300, 20  # of batches of 64: the weak reward model sees each of its 96 pairs 13 times
EVERY = 2  # iterations between evaluations


# -- one token, and two


class TokenValues(NamedTuple):
    """k1, k2, k3 of a sampled token, for several policies."""

    rows: list[list[Any]]  # policy, KL(π‖ref), mean ± standard deviation of each estimator, nats
    error: float  # the largest of k1 and k3, nats
    bias: float  # the largest of k2, relative to the KL
    near: float  # k3's standard deviation by k1's: at a small distance
    far: float  # and where the policy has all but given up a token


class Distances(NamedTuple):
    """Of an expected gradient, in nats: from zero, and from the exact gradients of KL(π‖ref) and KL(ref‖π)."""

    zero: float
    forward: float
    reverse: float


class TokenGradients(NamedTuple):
    """Exact gradients by the logits, (V,), and the expected gradient of each estimator under the name of its use."""

    forward: Tensor
    reverse: Tensor
    found: dict[str, Tensor]

    @property
    def distances(self) -> dict[str, Distances]:
        targets = (torch.zeros_like(self.forward), self.forward, self.reverse)
        return {name: Distances(*((g - to).norm().item() for to in targets)) for name, g in self.found.items()}

    @property
    def rows(self) -> list[list[Any]]:
        return [[name, *distances] for name, distances in self.distances.items()]


def draws(seed: int, *shape: int) -> Tensor:
    """Random logits, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_values(seed: int) -> TokenValues:
    """Mean and standard deviation of the estimators over the tokens of a policy of eight, or of two, tokens."""
    ref, step = draws(seed, 2, 8)
    sure, even = torch.tensor([[0.999, 0.001], [0.5, 0.5]], dtype=torch.float64).log()
    cases = {f"drift {drift:g}": ((ref + drift * step).log_softmax(0), ref.log_softmax(0)) for drift in (0.1, 0.5, 2.0)}
    cases["0.999 / 0.001 against 0.5 / 0.5"] = (sure, even)
    rows, spreads, error, bias = [], [], 0.0, 0.0
    for name, (new, old) in cases.items():
        kl = (new.exp() * (new - old)).sum()
        estimates = {kind: kl_estimate(new[None], old[None], kind)[0] for kind in KINDS}
        mean = {kind: (new.exp() * values).sum() for kind, values in estimates.items()}
        spread = {kind: (new.exp() * (estimates[kind] - mean[kind]).square()).sum().sqrt().item() for kind in KINDS}
        rows.append([name, kl.item(), *(f"{mean[kind]:.4g} ± {spread[kind]:.3g}" for kind in KINDS)])
        spreads.append(spread["k3"] / spread["k1"])
        error = max(error, (mean["k1"] - kl).abs().item(), (mean["k3"] - kl).abs().item())
        bias = max(bias, (mean["k2"] / kl - 1).abs().item())
    return TokenValues(rows, error, bias, near=spreads[0], far=spreads[-1])


def expected_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Σ over tokens of π(token) · ∇ loss(log π)(token): what minibatches on fresh samples give on average."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp().detach() * loss(logprobs)).sum().backward()
    return logits.grad


def token_gradients(seed: int) -> TokenGradients:
    """What each estimator, differentiated as a loss, pulls at: against the exact gradients of both KLs."""
    logits, ref = 2 * draws(seed, 2, 8)
    ref = ref.log_softmax(0)
    k1 = logits.log_softmax(0) - ref
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)
    (forward,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), leaf, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logprobs)).sum(), leaf)
    kinds = (*KINDS, "k3_corrected")
    found = {kind: expected_gradient(lambda lp, kind=kind: kl_loss(lp, ref, kind), logits) for kind in kinds}
    found["k1 as a reward"] = expected_gradient(lambda lp: k1 * lp, logits)  # detached, times ∇ log π
    return TokenGradients(forward, reverse, found)


def first_of_two_tokens(seed: int) -> tuple[float, float]:
    """Two tokens, the second depending on the first. How far from the gradient of the whole KL at the first token are k1 of
    both in the reward (in nats) and k2 of the token alone as a loss (relative)?"""
    first, first_ref = draws(seed, 2, 4)
    second, second_ref = draws(seed, 3, 4, 4)[1:].log_softmax(-1)  # (after which token, which token)
    later = (second.exp() * (second - second_ref)).sum(1)  # (4,) KL of the second token after each first one
    ref = first_ref.log_softmax(0)
    k1 = first.log_softmax(0) - ref
    leaf = first.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref + later)).sum(), leaf)
    alone = expected_gradient(lambda lp: kl_loss(lp, ref, "k2"), first)
    reward = expected_gradient(lambda lp: (k1 + later) * lp, first)
    return (reward - exact).norm().item(), ((alone - exact).norm() / exact.norm()).item()


# -- PPO under a price


class Point(NamedTuple):
    step: int
    kl: float  # nats per sequence, held-out prompts
    proxy: float  # the reward model's mean score
    gold: float  # the gold preference's


class Run(NamedTuple):
    coef: float
    points: list[Point]  # every EVERY iterations, if there are held-out prompts
    kl: list[float]  # of each iteration's samples, nats per sequence
    coefs: list[float]  # used in each iteration
    batch: Batch  # of the last

    @property
    def start(self) -> Point:
        return self.points[0]

    @property
    def best(self) -> Point:
        """Where gold was highest."""
        return max(self.points, key=lambda point: point.gold)

    @property
    def end(self) -> Point:
        return self.points[-1]

    @property
    def settled(self) -> float:
        """KL of the last 8 iterations, nats per sequence."""
        return sum(self.kl[-8:]) / 8


@contextmanager
def weak_ppo(lesson: Lesson, pairs: int, steps: int, held_out: int, runs: int) -> Iterator[Callable[..., Run]]:
    """The quickstart's models, but for a reward model that has seen few pairs; PPO from them, so many times.

    Yields ppo(far=False, **settings of [algo]) -> Run. Its rate stays as it is. With far, it rises to three times as much
    all the while, for small steps near the reference and large ones to get far away, and held-out prompts are evaluated.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = weak_run(lesson, Path(folder), pairs, steps, held_out)
        updates = steps * config.algo.num_epochs * config.batch_size // config.algo.minibatch_size
        rising = {"actor_optimizer": OptimizerConfig(lr=1e-3, warmup_steps=updates)}
        with lesson.progress("PPO runs", runs) as advance:

            def ppo(far: bool = False, **algo: Any) -> Run:
                run = follow(config.model_copy(update=rising if far else {"eval_data": None}), **algo)
                advance()
                return run

            yield ppo


def weak_run(lesson: Lesson, folder: Path, pairs: int, steps: int, held_out: int) -> PPOConfig:
    config = small_run(lesson, folder, SFT_STEPS, RM_STEPS, steps, pairs)
    evaluation = config.eval.model_copy(update={"num_prompts": held_out})
    return config.model_copy(update={"eval": evaluation, "actor_optimizer": OptimizerConfig(lr=3e-4, anneal=False)})


def follow(config: PPOConfig, **algo: Any) -> Run:
    """PPO with these settings of [algo], evaluated as it goes."""
    config = config.model_copy(update={"algo": config.algo.model_copy(update=algo)})
    state = PPOState(config, None, gold_judge, QUIET)
    seed = derive_seed(config.run.seed, "evaluation")
    params = replace(sampling_params(config, 0, state.stop_ids), samples_per_prompt=1, seed=seed)
    points, kl, coefs = [], [], []
    for step in range(config.total_steps + 1):
        if step:
            batch, _, stats = state.iterate(Clock())
            kl.append(stats["kl/sequence"])
            coefs.append(stats["kl/coef"])
        if state.eval_prompts and step % EVERY == 0:
            found = evaluate(state.eval_prompts, params, state.workers, state.judge, state.tokenizer).metrics
            points.append(Point(step, found["eval/kl"], found["eval/score"], found["eval/judge"]))
    return Run(config.algo.kl_coef, points, kl, coefs, batch)
