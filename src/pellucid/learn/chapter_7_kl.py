"""The KL penalty: a reward model is right only near what it has seen, and a price per nat keeps the policy there.

First the estimators of KL, on policies small enough to sum over all tokens. Then PPO against a reward model that has seen few
pairs, under several prices, judged by the gold preference that it only approximates. Last, a price that steers itself.
"""

from __future__ import annotations

from itertools import pairwise

from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_7 import KINDS, Run, first_of_two_tokens, token_gradients, token_values, weak_ppo
from pellucid.learn.pictures.chapter_7 import draw_controllers, draw_gradients, draw_over_optimisation

PAIRS, STEPS, HELD_OUT = 96, 32, 128  # that the reward model learns from; iterations; held-out prompts
COEFS = (0.0, 0.3, 1.0, 3.0)  # reward a nat
STARTS, TARGET, HORIZON = (0.3, 3.0), 5.0, 128  # of the adaptive coefficient; nats a sequence; samples


def run(lesson: Lesson) -> None:
    estimators(lesson)
    with weak_ppo(lesson, PAIRS, STEPS, HELD_OUT, runs=len(COEFS) + 2 * len(STARTS)) as ppo:
        priced = [ppo(kl_coef=coef, far=True) for coef in COEFS]
        fixed = [ppo(kl_coef=coef) for coef in STARTS]
        steered = [ppo(kl_coef=coef, kl_target=TARGET, kl_horizon=HORIZON) for coef in STARTS]
    penalty(lesson, priced[1])
    over_optimisation(lesson, priced)
    controllers(lesson, fixed, steered)


def estimators(lesson: Lesson) -> None:
    """k1, k2 and k3 of a sampled token: their means as values, the means of their gradients as losses."""
    values, pulls = token_values(lesson.seed), token_gradients(lesson.seed)
    lesson.table("One token: mean ± standard deviation, nats", ["policy", "KL(π‖ref)", *KINDS], values.rows)
    lesson.claim("As values, k1 and k3 are unbiased", f"largest error {values.error:.0e} nats", values.error < 1e-12)
    lesson.claim("k2 is biased", f"by {values.bias:.0%} in the worst of these cases", values.bias > 0.05)
    lesson.claim(
        "k3 spreads less than k1 near the reference, and more far from it",
        f"{values.near:.3f} of k1's spread at drift 0.1, {values.far:.1f} of it in the last row",
        values.near < 0.5 and values.far > 1,
    )
    lesson.table("Distance of the expected gradient from", ["as a loss", "0", "∇KL(π‖ref)", "∇KL(ref‖π)"], pulls.rows)
    off, apart = pulls.distances, (pulls.forward - pulls.reverse).norm()
    k1, k3 = off["k1"].zero, off["k3"].reverse
    lesson.claim("As a loss, k1 pulls nowhere: its expected gradient is 0", f"{k1:.0e}", k1 < 1e-12)
    right = max(off[name].forward for name in ("k2", "k3_corrected", "k1 as a reward"))
    lesson.claim(
        "k2, k3 times the live ratio, and k1 as a reward have the gradient of KL(π‖ref); k3 has that of KL(ref‖π)",
        f"errors {right:.0e} and {k3:.0e}; the two gradients differ by {apart:.2f}",
        right < 1e-12 and k3 < 1e-12 and apart > 1e-3,
    )
    caption = "Expected gradients on one token of 8: k2 sits on the bars, k3 on the squares, k1 on 0"
    lesson.picture("7-gradients", lambda ax: draw_gradients(ax, pulls), caption)
    reward, loss = first_of_two_tokens(lesson.seed)
    lesson.claim(
        "In a sequence, k1 in the reward pulls at the whole KL; k2 per token leaves out what a token leads to",
        f"at the first of two tokens: error {reward:.0e} against {loss:.0%} of the gradient",
        reward < 1e-12 and loss > 0.01,
    )


def penalty(lesson: Lesson, run: Run) -> None:
    """The shaped reward by hand: every token pays for its nats, the last one earns the score."""
    batch, scores = run.batch, run.batch.get("scores")
    price = run.coef * (batch.get("old_logprobs") - batch.get("ref_logprobs")) * batch.action_mask
    rewards = batch.ended * scores[:, None] - price
    same = rewards.equal(batch.get("rewards"))
    score, paid, left = (each.mean() for each in (scores, price.sum(1), rewards.sum(1)))
    lesson.claim(
        "The reward that PPO maximises is the score minus kl_coef · Σ (log π − log π_ref), paid token by token",
        f"{score:.2f} − {paid:.2f} = {left:.2f} on average at kl_coef {run.coef:g}; every token equal: {same}",
        same and abs(score - paid - left) < 1e-3,
    )


def over_optimisation(lesson: Lesson, runs: list[Run]) -> None:
    """What is optimised, the reward model's score, and what is meant, gold, as far as each price lets the policy go."""
    free, ends = runs[0], [run.end for run in runs]
    columns = ["kl_coef", "KL, nats a sequence", "reward model", "gold", "best gold on the way"]
    rows = [[run.coef, run.end.kl, run.end.proxy, run.end.gold, run.best.gold] for run in runs]
    lesson.table(f"After {STEPS} iterations, on {HELD_OUT} held-out prompts", columns, rows)
    lesson.claim(
        "Without a price gold rises, then falls below where it began, while the reward model's score goes on rising",
        f"gold {free.start.gold:.2f} → {free.best.gold:.2f} at {free.best.kl:.0f} nats → {free.end.gold:.2f} at "
        f"{free.end.kl:.0f}; score {free.start.proxy:.1f} → {free.best.proxy:.1f} → {free.end.proxy:.1f}",
        free.end.gold < free.start.gold < free.best.gold and free.best.proxy < free.end.proxy,
    )
    lesson.claim(
        "The higher the price, the smaller the KL at which the policy ends",
        ", ".join(f"{run.coef:g}: {run.end.kl:.1f}" for run in runs) + " nats",
        all(cheap.kl > dear.kl for cheap, dear in pairwise(ends)),
    )
    lesson.claim(
        "Some price ends with more gold than none, at a lower score",
        f"gold {max(end.gold for end in ends[1:]):.2f} against {free.end.gold:.2f}",
        any(end.gold > free.end.gold and end.proxy < free.end.proxy for end in ends[1:]),
    )
    caption = "What is optimised, and what is meant, against the distance from the reference"
    lesson.picture("7-over-optimisation", lambda axes: draw_over_optimisation(axes, runs), caption, panels=2)


def adaptive(start: float, kls: list[float], samples: int) -> list[float]:
    """The coefficient of each iteration. kls: what was measured in each, over so many samples. That is all there is to it."""
    coefs = [start]
    for kl in kls[:-1]:
        coefs.append(coefs[-1] * (1 + min(max(kl / TARGET - 1, -0.2), 0.2) * samples / HORIZON))
    return coefs


def controllers(lesson: Lesson, fixed: list[Run], steered: list[Run]) -> None:
    """Two fixed coefficients, and the same two as starts of an adaptive one."""
    free, settled = ([run.settled for run in runs] for runs in (fixed, steered))
    columns = ["kl_coef at the start", "fixed: KL", "adaptive: KL", "adaptive: kl_coef at the end"]
    rows = zip(STARTS, free, settled, (run.coefs[-1] for run in steered), strict=True)
    lesson.table(f"Mean of the last 8 iterations, nats a sequence; target {TARGET:g}", columns, rows)
    followed = all(run.coefs == adaptive(run.coef, run.kl, len(run.batch)) for run in steered)
    lesson.claim(
        f"An adaptive coefficient ends near its target of {TARGET:g} nats, from either start",
        f"{settled[0]:.1f} from {STARTS[0]:g}, {settled[1]:.1f} from {STARTS[1]:g}; it is the formula: {followed}",
        followed and all(abs(kl / TARGET - 1) < 0.4 for kl in settled),
    )
    measured = f"{free[0]:.1f} nats with {STARTS[0]:g}, {free[1]:.1f} with {STARTS[1]:g}"
    lesson.claim("A fixed one ends wherever score and price balance", measured, free[0] > 2 * free[1])
    caption = "Fixed and adaptive coefficients from two starts; dotted: the target"
    lesson.picture("7-controllers", lambda axes: draw_controllers(axes, fixed, steered, TARGET), caption, panels=2)
