"""The KL penalty: a reward model is right only near what it has seen, and a price per nat keeps the policy there.

First the estimators of KL, on policies small enough to sum over all tokens (`kl_estimators.py`). Then PPO against a reward
model that has seen few pairs, with several coefficients, judged by the corpus's gold preference, which the reward model only
approximates. Last, a coefficient that steers itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pellucid.config import OptimizerConfig, PPOConfig
from pellucid.learn import kl_estimators
from pellucid.learn.lesson import Lesson
from pellucid.learn.small_run import QUIET, small_run
from pellucid.stages.clock import Clock
from pellucid.stages.evaluation import evaluate
from pellucid.stages.ppo import sampling_params
from pellucid.stages.quickstart import gold_judge
from pellucid.stages.state import PPOState
from pellucid.types import Batch, derive_seed

SFT_STEPS = 300
PAIRS, RM_STEPS = 96, 20  # the weak reward model sees few pairs often: batches of 64, so 13 times each
STEPS, EVERY, HELD_OUT = 32, 2, 128  # iterations; iterations between evaluations; prompts of one
COEFS = (0.0, 0.3, 1.0, 3.0)
STARTS, TARGET, HORIZON = (0.3, 3.0), 5.0, 128  # of the adaptive coefficient; nats a sequence; samples


def run(lesson: Lesson) -> None:
    kl_estimators.values(lesson)
    kl_estimators.gradients(lesson)
    kl_estimators.two_tokens(lesson)
    with tempfile.TemporaryDirectory() as folder:
        config = weak_run(lesson, Path(folder))
        with lesson.progress("PPO runs", len(COEFS) + 2 * len(STARTS)) as advance:
            runs = [follow(rising(config), advance, kl_coef=coef) for coef in COEFS]
            config = config.model_copy(update={"eval_data": None})  # of these, the training's own KL is enough
            fixed = [follow(config, advance, kl_coef=coef) for coef in STARTS]
            steered = [follow(config, advance, kl_coef=c, kl_target=TARGET, kl_horizon=HORIZON) for c in STARTS]
    price(lesson, runs[1])
    over_optimisation(lesson, runs)
    controllers(lesson, fixed, steered)


# -- PPO under several prices


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


def weak_run(lesson: Lesson, folder: Path) -> PPOConfig:
    """The quickstart's models, but for a reward model that has seen few pairs; PPO at a rate that stays as it is."""
    config = small_run(lesson, folder, SFT_STEPS, RM_STEPS, STEPS, PAIRS)
    evaluation = config.eval.model_copy(update={"num_prompts": HELD_OUT})
    return config.model_copy(update={"eval": evaluation, "actor_optimizer": OptimizerConfig(lr=3e-4, anneal=False)})


def rising(config: PPOConfig) -> PPOConfig:
    """The rate rises to three times as much all the while: small steps near the reference, large ones to get far away."""
    updates = STEPS * config.algo.num_epochs * config.batch_size // config.algo.minibatch_size
    return config.model_copy(update={"actor_optimizer": OptimizerConfig(lr=1e-3, warmup_steps=updates)})


def follow(config: PPOConfig, advance: Callable[[], None], **algo: Any) -> Run:
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
    advance()
    return Run(config.algo.kl_coef, points, kl, coefs, batch)


def price(lesson: Lesson, run: Run) -> None:
    """The shaped reward by hand: every token pays for its nats, the last one earns the score."""
    batch = run.batch
    mask, last = batch.action_mask, batch.ended
    kl = (batch.get("old_logprobs") - batch.get("ref_logprobs")) * mask
    rewards = -run.coef * kl + last * batch.get("scores")[:, None]
    same = torch.equal(rewards, batch.get("rewards"))
    sums = [batch.get("scores").mean().item(), run.coef * kl.sum(1).mean().item(), rewards.sum(1).mean().item()]
    lesson.claim(
        "The reward that PPO maximises is the score minus kl_coef · Σ (log π − log π_ref), paid token by token",
        f"{sums[0]:.2f} − {sums[1]:.2f} = {sums[2]:.2f} on average at kl_coef {run.coef:g}; every token equal: {same}",
        same and abs(sums[0] - sums[1] - sums[2]) < 1e-3,
    )


def over_optimisation(lesson: Lesson, runs: list[Run]) -> None:
    ends = [run.points[-1] for run in runs]
    free = runs[0].points
    best = max(free, key=lambda point: point.gold)
    rows = [[r.coef, e.kl, e.proxy, e.gold, max(p.gold for p in r.points)] for r, e in zip(runs, ends, strict=True)]
    columns = ["kl_coef", "KL, nats a sequence", "reward model", "gold", "best gold on the way"]
    lesson.table(f"After {STEPS} iterations, on {HELD_OUT} held-out prompts", columns, rows)
    lesson.claim(
        "Without a price gold rises, then falls below where it began, while the reward model's score goes on rising",
        f"gold {free[0].gold:.2f} → {best.gold:.2f} at {best.kl:.0f} nats → {free[-1].gold:.2f} at {free[-1].kl:.0f}; "
        f"score {free[0].proxy:.1f} → {best.proxy:.1f} → {free[-1].proxy:.1f}",
        free[0].gold < best.gold and free[-1].gold < free[0].gold and best.proxy < free[-1].proxy,
    )  # fmt: skip
    lesson.claim(
        "The higher the price, the smaller the KL at which the policy ends",
        ", ".join(f"{r.coef:g}: {e.kl:.1f}" for r, e in zip(runs, ends, strict=True)) + " nats",
        all(a.kl > b.kl for a, b in pairwise(ends)),
    )
    lesson.claim(
        "Some price ends with more gold than none, at a lower score",
        f"gold {max(e.gold for e in ends[1:]):.2f} against {ends[0].gold:.2f}",
        any(e.gold > ends[0].gold and e.proxy < ends[0].proxy for e in ends[1:]),
    )

    def draw(axes: Any) -> None:
        for run, marker, colour in zip(runs, "osv^", ("tab:orange", "tab:blue", "tab:green", "tab:grey"), strict=True):
            distance = [max(p.kl, 0.0) ** 0.5 for p in run.points]
            for ax, figure in zip(axes, ("proxy", "gold"), strict=True):
                ax.plot(
                    distance,
                    [getattr(p, figure) for p in run.points],
                    marker=marker,
                    color=colour,
                    label=f"kl_coef {run.coef:g}",
                )
        axes[0].set(xlabel="√KL, √nats", ylabel="reward model's score")
        axes[1].set(xlabel="√KL, √nats", ylabel="gold preference")
        axes[1].legend(fontsize=8)

    lesson.picture(
        "7-over-optimisation", draw, "What is optimised, and what is meant, against the distance from the reference", 2
    )


# -- a coefficient that steers itself


def controllers(lesson: Lesson, fixed: list[Run], steered: list[Run]) -> None:
    """Two fixed coefficients, and the same two as starts of an adaptive one."""
    settled, free = ([sum(run.kl[-8:]) / 8 for run in runs] for runs in (steered, fixed))
    followed = True
    for run in steered:
        coef = run.coef
        for kl, used in zip(run.kl, run.coefs, strict=True):
            followed &= used == coef
            coef *= 1 + min(max(kl / TARGET - 1, -0.2), 0.2) * len(run.batch) / HORIZON  # all there is to it
    rows = [[r.coef, f, s, r.coefs[-1]] for r, f, s in zip(steered, free, settled, strict=True)]
    columns = ["kl_coef at the start", "fixed: KL", "adaptive: KL", "adaptive: kl_coef at the end"]
    lesson.table(f"Mean of the last 8 iterations, nats a sequence; target {TARGET:g}", columns, rows)
    low, high = STARTS
    lesson.claim(
        f"An adaptive coefficient ends near its target of {TARGET:g} nats, from either start",
        f"{settled[0]:.1f} from {low:g}, {settled[1]:.1f} from {high:g}; it is the formula: {followed}",
        followed and all(abs(kl / TARGET - 1) < 0.4 for kl in settled),
    )
    lesson.claim(
        "A fixed one ends wherever score and price balance",
        f"{free[0]:.1f} nats with {low:g}, {free[1]:.1f} with {high:g}", free[0] > 2 * free[1],
    )  # fmt: skip

    def draw(axes: Any) -> None:
        for runs, colour, kind in ((fixed, "tab:blue", "fixed"), (steered, "tab:orange", "adaptive")):
            for run, style in zip(runs, ("-", "--"), strict=True):
                steps = range(1, len(run.kl) + 1)
                axes[0].plot(steps, run.kl, style, color=colour, label=f"{kind}, {run.coef:g}")
                axes[1].plot(steps, run.coefs, style, color=colour)
        axes[0].axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
        axes[0].set(xlabel="iteration", ylabel="KL, nats a sequence")
        axes[1].set(xlabel="iteration", ylabel="kl_coef, reward a nat", yscale="log")
        axes[0].legend(fontsize=8)

    lesson.picture("7-controllers", draw, "Fixed and adaptive coefficients from two starts; dotted: the target", 2)
