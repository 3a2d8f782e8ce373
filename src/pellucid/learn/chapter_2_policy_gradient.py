"""Chapter 2: the policy gradient, exactly on a problem that can be listed, then by REINFORCE on CartPole.

`estimates` is the whole idea: a trajectory's estimate of the gradient is Σ_t weight_t · ∇ log π(a_t | s_t). What the weights
may be, and how noisy each choice is, is computed without sampling. `reinforce` is the algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from pellucid.core import aggregate, discounted_returns, masked_mean
from pellucid.learn.chapter_1_trajectory import first_episodes
from pellucid.learn.lesson import Lesson
from pellucid.learn.tiny_mdp import TinyMDP, machine
from pellucid.models import MLPPolicy
from pellucid.types import derive_seed

GAMMA = 0.9  # of the small problem
ITERATIONS, CARTS, RUNS = 50, 16, 3


# ---------------------------------------------------------------- exactly


def estimates(logits: Tensor, states: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """What each trajectory says the gradient is: Σ_t weight_t · ∇ log π(a_t | s_t). (S,A), (N,T) three times -> (N,S,A)."""

    def weighted(x: Tensor, states: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
        return (weights * x.log_softmax(-1)[states, actions]).sum()

    return vmap(grad(weighted), in_dims=(None, 0, 0, 0))(logits, states, actions, weights)


def probabilities(world: TinyMDP, logits: Tensor) -> Tensor:
    """Of every trajectory: (N,)."""
    states, actions = world.trajectories()
    return (logits.log_softmax(-1)[states, actions].sum(1) + world.log_dynamics(states, actions)).exp()


def mean_and_variance(world: TinyMDP, logits: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Of the estimate, over all trajectories with their probabilities: (S,A), and the sum of the variances of its numbers."""
    each, p = estimates(logits, *world.trajectories(), weights), probabilities(world, logits)
    mean = (p[:, None, None] * each).sum(0)
    return mean, (p * (each - mean).square().sum((1, 2))).sum().item()


def exact_gradient(world: TinyMDP, logits: Tensor, gamma: float, h: float = 1e-5) -> Tensor:
    """(S,A): the slope of the expected return, by moving one logit at a time up and down."""
    gradient = torch.zeros_like(logits)
    for i in range(logits.numel()):
        nudge = torch.zeros(logits.numel(), dtype=logits.dtype)
        nudge[i] = h
        up, down = (
            world.expected_return((logits + sign * nudge.view_as(logits)).softmax(-1), gamma) for sign in (1, -1)
        )
        gradient.view(-1)[i] = (up - down) / (2 * h)
    return gradient


def rewards_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(N,T) -> (N,T), of trajectories that end after T."""
    nothing = torch.zeros_like(rewards)
    return discounted_returns(rewards, nothing == 0, nothing != 0, nothing, gamma)


def weightings(world: TinyMDP, logits: Tensor) -> dict[str, Tensor]:
    """What ∇ log π(a_t | s_t) may be multiplied by, over all trajectories: each (N,T)."""
    states, actions = world.trajectories()
    to_go = rewards_to_go(world.rewards[states, actions], GAMMA)
    fade = GAMMA ** torch.arange(world.horizon, dtype=to_go.dtype)
    return {
        "whole return": to_go[:, :1].expand_as(to_go),
        "reward-to-go": fade * to_go,
        "reward-to-go less the value": fade * (to_go - values(world, logits, to_go)),
        "reward-to-go less 10": fade * (to_go - 10),
        "reward-to-go without γ^t": to_go,
    }


def values(world: TinyMDP, logits: Tensor, to_go: Tensor) -> Tensor:
    """The value function: mean reward-to-go of all trajectories that are in the same state at the same step. (N,T)."""
    (states, _), p, found = world.trajectories(), probabilities(world, logits)[:, None], torch.zeros_like(to_go)
    for state in range(len(world.start)):
        here = states == state
        found += here * (p * here * to_go).sum(0) / (p * here).sum(0)
    return found


def asymmetry(world: TinyMDP, logits: Tensor, weights: Tensor) -> float:
    """Of the derivatives of the mean estimate, relative to the largest. Those of a gradient, a Hessian, have none."""

    def mean(x: Tensor) -> Tensor:
        each = estimates(x, *world.trajectories(), weights)
        return (probabilities(world, x)[:, None, None] * each).sum(0).flatten()

    matrix = jacrev(mean)(logits).view(logits.numel(), -1)
    return ((matrix - matrix.T).abs().max() / matrix.abs().max()).item()


def show_exactly(lesson: Lesson, world: TinyMDP, logits: Tensor) -> None:
    slope, weights, found = exact_gradient(world, logits, GAMMA), weightings(world, logits), {}
    for name, weight in weights.items():
        mean, variance = mean_and_variance(world, logits, weight)
        found[name] = (mean, variance, ((mean - slope).abs().max() / slope.abs().max()).item())
    rows = [[name, f"{error:.0e}", variance] for name, (_, variance, error) in found.items()]
    head = ("weight of ∇ log π(a_t | s_t)", "its mean is off by", "variance")
    lesson.table(f"All {len(weights['reward-to-go'])} trajectories of the machine, γ = {GAMMA}", head, rows)
    whole, to_go, centred, shifted, unfaded = found.values()
    lesson.claim(
        "Policy gradient theorem: the mean of the estimate over all trajectories is the slope of the expected return",
        f"largest difference from finite differences {whole[2]:.0e} of the largest component",
        whole[2] < 1e-7,
    )
    same = (whole[0] - to_go[0]).abs().max().item()
    lesson.claim(
        "Reward-to-go has the same mean as the whole return, and here less variance",
        f"means apart by {same:.0e}; variance {whole[1]:.1f} and {to_go[1]:.1f}, a factor of {whole[1] / to_go[1]:.1f}",
        same < 1e-12 and to_go[1] < whole[1],
    )
    lesson.claim(
        "A baseline leaves the mean alone, whatever it is; a good one lowers the variance, a bad one raises it",
        f"variance {to_go[1]:.1f} without, {centred[1]:.1f} with the value function, {shifted[1]:.0f} with 10",
        max(centred[2], shifted[2]) < 1e-7 and centred[1] < to_go[1] < shifted[1],
    )
    kept, dropped = (asymmetry(world, logits, weights[name]) for name in ("reward-to-go", "reward-to-go without γ^t"))
    lesson.claim(
        "Without γ^t, as everybody runs it, the mean is not the gradient of the discounted return, nor of anything else",
        f"off by {unfaded[2]:.0%}; asymmetry of its derivatives {dropped:.3f}, with γ^t {kept:.0e}",
        unfaded[2] > 0.01 and dropped > 1e-3 and kept < 1e-9,
    )


def show_exception(lesson: Lesson) -> None:
    """A reward of +1, then of -1, whatever the actions: the whole return is always 0."""
    there, one = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    world = TinyMDP(1 - there, there.expand(2, 2, 2), torch.cat([one, -one]), horizon=2)
    logits, rewards = torch.zeros(2, 2, dtype=torch.float64), rewards_to_go(world.rewards[world.trajectories()], 1.0)
    whole, to_go = (mean_and_variance(world, logits, w)[1] for w in (rewards[:, :1].expand_as(rewards), rewards))
    lesson.claim(
        "That reward-to-go has less variance is no law: where what comes later undoes what came before, it has more",
        f"rewards +1, then -1: variance {whole:.1f} with the whole return, {to_go:.1f} with reward-to-go",
        whole == 0 and to_go > 0.1,
    )


def show_samples(lesson: Lesson, world: TinyMDP, logits: Tensor, batches: int = 4000, size: int = 20) -> None:
    """The same from samples, as everything after this has to do it."""
    chance = torch.Generator().manual_seed(derive_seed(lesson.seed, "samples"))
    states, actions = world.sample(logits.softmax(-1), batches * size, chance)
    index = ((states * 2 + actions) * 4 ** torch.arange(world.horizon).flip(0)).sum(1)
    slope, guesses = exact_gradient(world, logits, GAMMA), {}
    for name, weights in list(weightings(world, logits).items())[:3]:
        guesses[name] = estimates(logits, states, actions, weights[index]).view(batches, size, -1).mean(1)
    apart = [
        ((guess.mean(0) - slope.flatten()).abs() / (guess.std(0) / batches**0.5)).max().item()
        for guess in guesses.values()
    ]
    lesson.claim(
        f"From samples: the mean of {batches:,} estimates, each from {size} episodes, is the exact gradient",
        f"at most {max(apart):.1f} standard errors away, with three kinds of weights",
        max(apart) < 5,
    )

    def draw(ax: Any) -> None:
        edges = [i / 20 - 2 for i in range(81)]
        for (name, guess), color, style in zip(
            guesses.items(), ("tab:orange", "tab:green", "tab:blue"), ("-", "--", ":"), strict=True
        ):
            ax.hist(guess[:, 1], bins=edges, histtype="step", lw=1.6, color=color, ls=style, label=name)
        ax.axvline(slope[0, 1].item(), color="black", lw=1, label="exactly")
        ax.set(xlabel="gradient for the logit of (cool, fast), reward units", ylabel=f"estimates of {batches:,}")
        ax.legend(fontsize=8)

    lesson.picture(
        "2-estimates", draw, f"Estimates of one slope, each from {size} episodes: one mean, three variances."
    )


# ---------------------------------------------------------------- CartPole


def reinforce(seed: int, whole: bool, advance: Callable[[], None]) -> list[float]:
    """REINFORCE [Williams 1992]. whole: weights are whole returns, else reward-to-go less a baseline. Returns the mean return
    of each iteration's episodes, which the policy played before it was changed."""
    policy = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "policy"), "cpu")
    adam, curve = torch.optim.Adam(policy.module.parameters(), lr=3e-3), []
    for step in range(ITERATIONS):
        rollout, mask = first_episodes(policy, derive_seed(seed, "carts", step), carts=CARTS)
        batch, rewards = rollout.batch, rollout.batch.get("rewards")
        returns = discounted_returns(rewards, mask, batch.ended, batch.bootstrap_values, gamma=0.99)
        weights = returns[:, :1].expand_as(returns) if whole else returns - masked_mean(returns, mask)
        logprobs, _ = policy.logprobs_of(batch, temperature=1.0)
        adam.zero_grad()
        aggregate(-weights * logprobs, mask, "token").backward()
        adam.step()
        curve.append((rewards * mask).sum(1).mean().item())
        advance()
    return curve


def show_learning(lesson: Lesson) -> None:
    curves: dict[str, list[list[float]]] = {"reward-to-go less its mean": [], "whole return": []}
    with lesson.progress("REINFORCE", 2 * RUNS * ITERATIONS) as advance:
        for name, runs in curves.items():
            runs += [reinforce(derive_seed(lesson.seed, run), name == "whole return", advance) for run in range(RUNS)]
    to_go, whole = ([sum(run[-5:]) / 5 for run in runs] for runs in curves.values())
    first = median(run[0] for run in curves["reward-to-go less its mean"])
    each = ", ".join(f"{value:.0f}" for value in to_go)
    lesson.claim(
        f"REINFORCE learns CartPole in {ITERATIONS} updates of {CARTS} episodes each",
        f"mean return {first:.0f} to {median(to_go):.0f} (last 5 updates; median of {RUNS} runs: {each})",
        median(to_go) > 10 * first,
    )
    lesson.claim(
        "Less noise is faster learning: with the whole return it gets less far in the same number of episodes",
        f"{median(whole):.0f} (median of {RUNS} runs)",
        median(whole) < 0.8 * median(to_go),
    )

    def draw(ax: Any) -> None:
        updates = range(1, ITERATIONS + 1)
        for (name, runs), color, style in zip(curves.items(), ("tab:blue", "tab:orange"), ("-", "--"), strict=True):
            by_update = torch.tensor(runs)
            ax.fill_between(updates, by_update.amin(0), by_update.amax(0), color=color, alpha=0.15, lw=0)
            ax.plot(updates, by_update.median(0).values, style, color=color, label=name)
        ax.set(xlabel=f"update ({CARTS} episodes each)", ylabel="mean return (steps)", ylim=(0, 510))
        ax.legend(title=f"weights; median and range of {RUNS} runs")

    lesson.picture("2-learning", draw, "REINFORCE on CartPole, with two kinds of weights.")


def show_noise(lesson: Lesson) -> None:
    """How much the gradients of single episodes differ, under the policy that nothing was taught."""
    policy = MLPPolicy(4, (64, 64), 2, derive_seed(lesson.seed, "policy"), "cpu")
    rollout, mask = first_episodes(policy, derive_seed(lesson.seed, "noise"))
    batch, weights = rollout.batch, list(policy.module.parameters())
    to_go = discounted_returns(batch.get("rewards"), mask, batch.ended, batch.bootstrap_values, gamma=1.0)
    kinds = (to_go[:, :1].expand_as(to_go), to_go, to_go - masked_mean(to_go, mask))
    gradients: list[list[Tensor]] = [[] for _ in kinds]
    for i in range(len(batch)):
        row = batch.select(torch.tensor([i]))
        logprobs, _ = policy.logprobs_of(row, temperature=1.0)
        for kind, found in zip(kinds, gradients, strict=True):
            objective = (kind[i] * logprobs[0])[mask[i]].sum()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(objective, weights, retain_graph=True)]))
    whole, plain, centred = (torch.stack(found).var(0).sum().item() for found in gradients)
    lesson.claim(
        "So it is on CartPole (γ = 1): reward-to-go is less noisy than the whole return, and less so again with a baseline",
        f"variance of an episode's gradient, relative: {whole / plain:.1f}, 1, {centred / plain:.2f} ({len(batch)} episodes, "
        f"{sum(w.numel() for w in weights):,} weights)",
        whole > 1.3 * plain > 1.3 * 1.3 * centred,
    )


def run(lesson: Lesson) -> None:
    world, chance = machine(horizon=4), torch.Generator().manual_seed(derive_seed(lesson.seed, "logits"))
    logits = torch.randn(2, 2, dtype=torch.float64, generator=chance) / 2
    show_exactly(lesson, world, logits)
    show_exception(lesson)
    show_samples(lesson, world, logits)
    show_noise(lesson)
    show_learning(lesson)
