"""Chapter 4: PPO. Several passes over one sample, made possible by the ratio and made harmless, mostly, by the clip.

`ppo` is one iteration in full. The chapter looks at the ratio on problems that are solved exactly (importance.py), at the
clipped loss as a curve, at one sample used up to 40 times by three losses, at training by each of them, and at last runs a
race against chapter 3's actor-critic.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.core import aggregate, gae, masked_mean, masked_whiten, ppo_clip, value_clip
from pellucid.execution.learner import minibatches
from pellucid.learn.cart import Cart, whole_episodes
from pellucid.learn.chapter_3_actor_critic import GAMMA, LAMBDA, actor_critic
from pellucid.learn.importance import show_importance, show_surrogate
from pellucid.learn.lesson import Lesson
from pellucid.types import Batch, derive_seed, transitions

CLIP, EPOCHS, ROWS, NUM_STEPS = 0.2, 8, 256, 64
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprobs, old_logprobs, advantages) -> loss per step."""


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    return ppo_clip(logprobs, old_logprobs, advantages, CLIP, CLIP)[0]


def no_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    return -(logprobs - old_logprobs).exp() * advantages


def no_ratio(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The policy gradient of chapters 2 and 3: right in the first pass, while the policy is still the one that sampled."""
    return -logprobs * advantages


LOSSES: dict[str, Loss] = {"PPO": clipped, "no clip": no_clip, "no ratio": no_ratio}
COLOURS = {"PPO": "tab:blue", "no clip": "tab:orange", "no ratio": "tab:green"}
STYLES = {"PPO": "o-", "no clip": "s--", "no ratio": "^:"}


def ppo(cart: Cart, policy_loss: Loss = clipped) -> None:
    """One iteration: a sample, its advantages, then EPOCHS passes over its steps in minibatches of ROWS."""
    steps = with_advantages(cart.sample(NUM_STEPS))
    for epoch in range(EPOCHS):
        one_pass(cart, steps, policy_loss, derive_seed(cart.seed, cart.samples, epoch))


def with_advantages(batch: Batch) -> Batch:
    """The batch's steps as rows (num_action_tokens, 1), with advantages, whitened over the whole sample, and returns."""
    mask, values = batch.action_mask, batch.get("old_values")
    advantages, returns = gae(batch.get("rewards"), values, mask, batch.ended, batch.bootstrap_values, GAMMA, LAMBDA)
    return transitions(batch.having(advantages=masked_whiten(advantages, mask), returns=returns))


def one_pass(cart: Cart, steps: Batch, policy_loss: Loss, seed: int) -> None:
    for rows in minibatches(len(steps), ROWS, seed):
        part = steps.select(rows)
        logprobs, _ = cart.actor.logprobs_of(part, 1.0)
        loss = policy_loss(logprobs, part.get("old_logprobs"), part.get("advantages"))
        # None: no clip of the value. Its range would be in reward units, and returns here go from 1 to 100.
        value_loss, _ = value_clip(cart.critic.values_of(part), part.get("old_values"), part.get("returns"), None)
        cart.descend(aggregate(loss, part.action_mask, "token"), aggregate(value_loss, part.action_mask, "token"))


# ---------------------------------------------------------------- the clip


def show_clip(lesson: Lesson) -> None:
    log_ratio = torch.linspace(-3, 1.1, 4101, dtype=torch.float64).requires_grad_()
    ratio, zeros = log_ratio.detach().exp(), torch.zeros(4101, dtype=torch.float64)
    curves, differ, below = {}, 0, 0
    for sign in (1.0, -1.0):
        advantages = torch.full_like(zeros, sign)
        loss, _ = ppo_clip(log_ratio, zeros, advantages, CLIP, CLIP)
        (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
        flat = ratio > 1 + CLIP if sign > 0 else ratio < 1 - CLIP
        differ += int(((slope == 0) != flat).sum())
        below += int((loss < -ratio * advantages - 1e-15).sum())
        curves[sign] = loss.detach()
    lesson.claim(
        "The clipped loss is never below the unclipped one: the objective is a pessimistic bound",
        f"below it at {below} of 4,101 ratios from 0.05 to 3, for A = 1 and A = -1",
        below == 0,
    )
    lesson.claim(
        "Its slope is 0 exactly where the ratio is past the clip on the side that A asks for, and nowhere else",
        f"A > 0: above 1.2; A < 0: below 0.8; otherwise at {differ} of 4,101 ratios",
        differ == 0,
    )

    def draw(axes: Any) -> None:
        for ax, sign in zip(axes, (1.0, -1.0), strict=True):
            bound = -ratio.clamp(1 - CLIP, 1 + CLIP) * sign
            ax.plot(ratio, -ratio * sign, "--", color="tab:gray", label="-ratio · A")
            ax.plot(ratio, bound, ":", color="tab:orange", lw=2, label="-clip(ratio) · A")
            ax.plot(ratio, curves[sign], color="tab:blue", label="the larger of the two: the loss")
            ax.set(title=f"A = {sign:+.0f}", xlabel="ratio", ylabel="loss", xlim=(0, 2))
            ax.set_ylim((-2.05, 0.05) if sign > 0 else (-0.05, 2.05))
            ax.legend(fontsize=8)

    lesson.picture("4-clip", draw, "Which branch wins: flat on one side only.", panels=2)


# ---------------------------------------------------------------- one sample, many passes


@torch.no_grad()
def kl_from_old(cart: Cart, steps: Batch, old: Tensor) -> float:
    """Mean KL(old ‖ now) over the sample's states, in nats. old: the old policy's log-probs of both actions."""
    now = cart.actor.logits(steps.get("observations")).log_softmax(-1)
    return masked_mean((old.exp() * (old - now)).sum(-1), steps.action_mask).item()


def true_return(cart: Cart, seed: int) -> float:
    """Mean return of 40 fresh episodes."""
    batch = whole_episodes(cart.actor, 40, seed)
    return masked_mean((batch.get("rewards") * batch.action_mask).sum(1), torch.ones(40)).item()


def reuse(seed: int, loss: Loss, passes: tuple[int, ...]) -> tuple[list[float], list[float], float]:
    """A half-trained policy, the same for every loss, then one sample over and over. Returns, after each of `passes`: the KL
    to the policy that sampled, and the return; and at last the share of ratios outside the clip range."""
    cart = Cart(seed, lr=3e-3)
    while cart.recent_return < 60:
        ppo(cart)
    steps = with_advantages(cart.sample(2 * NUM_STEPS))
    with torch.no_grad():
        old = cart.actor.logits(steps.get("observations")).log_softmax(-1)
    kls, returns = [], []
    for done in range(passes[-1] + 1):
        if done in passes:
            kls.append(kl_from_old(cart, steps, old))
            returns.append(true_return(cart, derive_seed(seed, "evaluate")))
        one_pass(cart, steps, loss, derive_seed(seed, "reuse", done))
    with torch.no_grad():
        ratio = (cart.actor.logprobs_of(steps, 1.0)[0] - steps.get("old_logprobs")).exp()
    return kls, returns, ((ratio - 1).abs() > CLIP).double().mean().item()


def show_reuse(lesson: Lesson, repeats: int = 3, passes: tuple[int, ...] = (0, 2, 5, 10, 20, 40)) -> None:
    """Medians over the repeats."""
    kl, returns, outside = {}, {}, {}
    for name, loss in LOSSES.items():
        runs = [reuse(derive_seed(lesson.seed, "reuse", i), loss, passes) for i in range(repeats)]
        kl[name] = [statistics.median(run[0][k] for run in runs) for k in range(len(passes))]
        returns[name] = [statistics.median(run[1][k] for run in runs) for k in range(len(passes))]
        outside[name] = statistics.median(run[2] for run in runs)
    rows = [[f"{n}", *(f"{kl[name][k]:.3f} / {returns[name][k]:.0f}" for name in LOSSES)] for k, n in enumerate(passes)]
    lesson.table("One sample: KL to the policy that sampled (nats) / true return", ("passes", *LOSSES), rows)
    lesson.claim(
        "Without the ratio, or without the clip, passes over one sample take the policy far from the one that sampled it",
        f"KL after {passes[-1]} passes: "
        + ", ".join(f"{name} {values[-1]:.2g}" for name, values in kl.items())
        + " nats",
        all(kl[name][-1] > 10 * kl["PPO"][-1] for name in ("no clip", "no ratio")),
    )
    lesson.claim(
        "The clip does not hold the ratio within its range: it takes the gradient away outside, on one side",
        f"after {passes[-1]} passes of PPO {outside['PPO']:.0%} of the ratios are outside 0.8 to 1.2",
        outside["PPO"] > 0.02,
    )

    def draw(axes: Any) -> None:
        for name in LOSSES:
            axes[0].plot(passes[1:], kl[name][1:], STYLES[name], color=COLOURS[name], label=name)
            axes[1].plot(passes, returns[name], STYLES[name], color=COLOURS[name], label=name)
        axes[0].set(xlabel="passes over one sample", ylabel="KL(old ‖ now) (nats)", yscale="log")
        axes[1].set(xlabel="passes over one sample", ylabel="true return (steps)", ylim=(0, 510))
        for ax in axes:
            ax.legend()

    lesson.picture(
        "4-passes", draw, "One sample of 2,048 steps from a half-trained policy, used up to 40 times.", panels=2
    )


# ---------------------------------------------------------------- training


Curve = list[tuple[int, float]]
"""(environment steps, mean return of the last 20 episodes) of each iteration."""


def run_up(cart: Cart, iterate: Callable[[Cart], None], budget: int) -> Curve:
    """Iterations until the mean return of the last 20 episodes is 475, or the budget of environment steps is used."""
    curve = [(0, 0.0)]
    while curve[-1][1] < 475 and cart.steps < budget:
        iterate(cart)
        curve.append((cart.steps, cart.recent_return))
    return curve


def median_steps(curves: list[Curve]) -> float:
    """Steps to a return of 475: the median, in which a run that does not get there counts as endless."""
    return statistics.median(curve[-1][0] if curve[-1][1] >= 475 else math.inf for curve in curves)


def shown(steps: float, budget: int) -> str:
    return f"{steps:,.0f}" if steps < math.inf else f"> {budget:,}"


def show_training(lesson: Lesson, repeats: int = 3, budget: int = 40_000, rate: float = 3e-3) -> None:
    """The same algorithm with three losses."""
    curves: dict[str, list[Curve]] = {name: [] for name in LOSSES}
    with lesson.progress("three losses", len(LOSSES) * repeats) as advance:
        for name, loss in LOSSES.items():
            for i in range(repeats):
                cart = Cart(derive_seed(lesson.seed, "training", i), rate)
                curves[name].append(run_up(cart, partial(ppo, policy_loss=loss), budget))
                advance()
    needed = {name: median_steps(found) for name, found in curves.items()}
    last = {name: statistics.median(curve[-1][1] for curve in found) for name, found in curves.items()}
    lesson.claim(
        f"Trained by {EPOCHS} passes over each sample, only the loss with ratio and clip gets to a return of 475 soon",
        f"median of {repeats} runs: "
        + ", ".join(f"{name} {shown(needed[name], budget)}" for name in LOSSES)
        + " steps",
        needed["PPO"] < budget and all(needed[name] > 1.3 * needed["PPO"] for name in ("no clip", "no ratio")),
    )
    peak = statistics.median(max(value for _, value in curve) for curve in curves["no ratio"])
    lesson.claim(
        "Without the ratio the return collapses",
        f"median of {repeats} runs: at best {peak:.0f} on the way, {last['no ratio']:.0f} after {budget:,} steps; without "
        f"the clip alone {last['no clip']:.0f}; PPO had {last['PPO']:.0f} after {shown(needed['PPO'], budget)}",
        last["no ratio"] < 0.5 * last["PPO"],
    )

    def draw(ax: Any) -> None:
        for name, found in curves.items():
            for i, curve in enumerate(found):
                style = {"ls": STYLES[name][1:], "color": COLOURS[name], "label": None if i else name}
                ax.plot(*zip(*curve, strict=True), lw=1.3, **style)
        ax.set(xlabel="environment steps", ylabel="return (mean of the last 20 episodes)", ylim=(0, 510))
        ax.legend()

    lesson.picture(
        "4-training", draw, f"CartPole-v1, {repeats} runs each, which stop at 475: the same passes, three losses."
    )


# ---------------------------------------------------------------- the race


def show_race(
    lesson: Lesson, repeats: int = 5, budget: int = 100_000, rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
) -> None:
    racers: dict[str, Callable[[Cart], None]] = {
        "actor-critic": partial(actor_critic, num_steps=NUM_STEPS),
        "PPO": ppo,
    }
    curves: dict[str, dict[float, list[Curve]]] = {name: {rate: [] for rate in rates} for name in racers}
    with lesson.progress("race", len(racers) * len(rates) * repeats) as advance:
        for name, iterate in racers.items():
            for rate in rates:
                for i in range(repeats):
                    curves[name][rate].append(run_up(Cart(derive_seed(lesson.seed, "race", i), rate), iterate, budget))
                    advance()
    steps = {name: {rate: median_steps(found) for rate, found in of_rate.items()} for name, of_rate in curves.items()}
    rows = [[name, *(shown(steps[name][rate], budget) for rate in rates)] for name in racers]
    columns = ("", *(f"rate {rate:g}" for rate in rates))
    lesson.table(f"Environment steps to a return of 475: median of {repeats} runs", columns, rows)
    best = {name: min(rates, key=steps[name].__getitem__) for name in racers}
    slow, fast = steps["actor-critic"][best["actor-critic"]], steps["PPO"][best["PPO"]]
    factor = min(slow, budget) / min(fast, budget)
    lesson.claim(
        f"PPO balances the pole in fewer environment steps than the actor-critic, each at the best of {len(rates)} rates",
        f"{shown(fast, budget)} against {shown(slow, budget)} steps: {factor:.1f} times fewer",
        factor > 1,
    )

    def draw(ax: Any) -> None:
        for name, style, colour in (("actor-critic", "--", "tab:orange"), ("PPO", "-", "tab:blue")):
            for i, curve in enumerate(curves[name][best[name]]):
                label = None if i else f"{name}, rate {best[name]:g}"
                ax.plot(*zip(*curve, strict=True), style, color=colour, lw=1.2, label=label)
        ax.axhline(475, color="tab:gray", lw=1)
        ax.set(xlabel="environment steps", ylabel="return (mean of the last 20 episodes)", ylim=(0, 510))
        ax.legend()

    lesson.picture("4-race", draw, f"CartPole-v1, {repeats} runs each, the same networks and samples of 1,024 steps.")


def run(lesson: Lesson) -> None:
    show_importance(lesson)
    show_surrogate(lesson)
    show_clip(lesson)
    show_reuse(lesson)
    show_training(lesson)
    show_race(lesson)
