"""PPO for language models: the loop.

    prompts ─▶ actor, token by token ─▶ samples ─▶ reward model ──▶ scores ─────────────┐
                 ▲                        │                                             ▼
                 │                        ├─▶ actor, all at once ─────▶ old_logprobs ─▶ KL-shaped rewards
                 │                        ├─▶ reference, all at once ─▶ ref_logprobs ─▶   │
                 │                        └─▶ critic, all at once ────▶ old_values ──▶ advantages, returns
                 │                                                                        │
                 └── new weights ◀── actor: clipped loss ◀── num_epochs × minibatches ◀───┤
                                     critic: value loss  ◀── num_epochs × minibatches ◀───┘

`iterate` is that picture in code. Setting up and leaving off are `run.py`'s; the checks that make a silent failure
loud are `checks.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from pellucid.config import PPOConfig
from pellucid.core import AdaptiveKL, FixedKL, kl_estimate, kl_shaped_rewards
from pellucid.execution.local import Workers
from pellucid.stages.advantages import ADVANTAGES
from pellucid.stages.checks import old_logprobs
from pellucid.stages.clock import Clock
from pellucid.stages.rollout_metrics import rollout_metrics
from pellucid.stages.scoring import score_samples
from pellucid.types import (
    Batch,
    Prompt,
    Sample,
    SamplingParams,
    StepStats,
    SupervisedBatch,
    collate,
    derive_seed,
)

KLController = FixedKL | AdaptiveKL


def iterate(
    step: int,
    prompts: list[Prompt],
    params: SamplingParams,
    workers: Workers,
    kl: KLController,
    config: PPOConfig,
    ptx: Iterator[SupervisedBatch] | None = None,
    clock: Clock | None = None,
) -> tuple[Batch, list[Sample], StepStats]:
    """One iteration: a rollout of the prompts and num_epochs passes over it. step counts from 1.

    Returns the whole batch as it was trained on, its samples, and the metrics of docs/metrics.md; clock, if one is given,
    holds the phases. Raises IntegrityError when an invariant breaks, RewardError when a reward does.
    """
    w, algo, clock, seed = workers, config.algo, clock or Clock(), derive_seed(config.run.seed, "minibatches", step)

    samples = clock("generate", w.engine.generate, prompts, params)
    scores = clock("score", score_samples, samples, w.reward, config)
    batch = collate(samples, pad_id=0).having(scores=scores)

    batch = batch.having(**clock("old_logprobs", old_logprobs, batch, w.actor, algo, step))
    if config.trace.alternatives:
        batch = batch.having(**clock("alternatives", w.actor.top_tokens, batch, config.trace.alternatives))
    ref_logprobs, _ = clock("ref_logprobs", w.reference.logprobs, batch)
    batch = batch.having(ref_logprobs=ref_logprobs)
    if w.critic:
        batch = batch.having(old_values=clock("values", w.critic.values, batch))

    batch = shape_rewards(batch, kl.coef if algo.kl_in == "reward" else 0.0)
    batch = batch.having(**ADVANTAGES[algo.advantage](batch, algo))

    stats = rollout_metrics(batch) | {"kl/coef": kl.coef}
    critic_stats, values = clock("update_critic", w.critic.update, batch, seed) if w.critic else ({}, {})
    actor_stats, logprobs = clock("update_actor", w.actor.update, batch, kl.coef, seed, ptx)
    clock("sync_weights", w.engine.load_weights, None, step)

    batch = batch.having(**values, **logprobs)
    stats |= actor_stats | critic_stats | clock.metrics()
    kl.update(stats["kl/sequence"], len(batch))
    return batch, samples, stats


def shape_rewards(batch: Batch, kl_coef: float) -> Batch:
    """kl (k1, against the reference) and rewards: -kl_coef * kl on every action, the score on the last."""
    kl = kl_estimate(batch.get("old_logprobs"), batch.get("ref_logprobs"), "k1") * batch.action_mask
    return batch.having(kl=kl, rewards=kl_shaped_rewards(batch.get("scores"), kl, batch.action_mask, kl_coef))


def sampling_params(config: PPOConfig, step: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """How iteration `step` samples: seeds differ by step, prompt and sample."""
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        stop_token_ids=stop_token_ids,
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed=derive_seed(config.run.seed, "rollout"),
        step=step,
    )
