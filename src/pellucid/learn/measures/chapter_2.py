"""What chapter 2 measures. Where a function returns (str, bool), it is a figure in words, and whether the claim holds.

Estimator is the type of the chapter's `estimates`: logits (S,A), states, actions and weights (N,T) -> gradients (N,S,A).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev

from pellucid.core import discounted_returns, masked_mean
from pellucid.learn.measures.chapter_1 import first_episodes
from pellucid.learn.tiny_mdp import TinyMDP
from pellucid.models import MLPPolicy
from pellucid.types import derive_seed

Estimator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# ---------------------------------------------------------------- exactly


def probabilities(world: TinyMDP, logits: Tensor) -> Tensor:
    """Of every trajectory: (N,)."""
    states, actions = world.trajectories()
    return (logits.log_softmax(-1)[states, actions].sum(1) + world.log_dynamics(states, actions)).exp()


def rewards_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(N,T) -> (N,T), of trajectories that end after T."""
    nothing = torch.zeros_like(rewards)
    return discounted_returns(rewards, nothing == 0, nothing != 0, nothing, gamma)


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


class Moments(NamedTuple):
    """Of an estimate. mean: (S,A). variance: summed over its numbers. error: of the mean, relative to the exact gradient."""

    mean: Tensor
    variance: float
    error: float


class Listing:
    """All N trajectories of a world, and what is a mean over samples elsewhere as a sum.

    paths: states and actions, (N,T) each. probabilities: (N,), under the policy softmax(logits). to_go: (N,T), the return
    from each step on. values: (N,T), V(s_t), the mean of to_go over all that are in the same state at the same step.
    slope: (S,A), the gradient of the expected return.
    """

    def __init__(self, world: TinyMDP, logits: Tensor, gamma: float) -> None:
        self.world, self.logits = world, logits
        self.paths, self.probabilities = world.trajectories(), probabilities(world, logits)
        self.to_go = rewards_to_go(world.rewards[self.paths], gamma)
        self.slope, self.values = exact_gradient(world, logits, gamma), torch.zeros_like(self.to_go)
        p = self.probabilities[:, None]
        for state in range(len(world.start)):
            here = self.paths[0] == state
            self.values += here * (p * here * self.to_go).sum(0) / (p * here).sum(0)

    def moments(self, each: Tensor) -> Moments:
        """each: (N,S,A), what each trajectory says the gradient is."""
        p, slope = self.probabilities, self.slope
        mean = (p[:, None, None] * each).sum(0)
        variance = (p * (each - mean).square().sum((1, 2))).sum().item()
        return Moments(mean, variance, ((mean - slope).abs().max() / slope.abs().max()).item())


def asymmetry(estimates: Estimator, every: Listing, weights: Tensor) -> float:
    """Of the derivatives of the mean estimate, relative to the largest. Those of a gradient, a Hessian, have none."""

    def mean(x: Tensor) -> Tensor:
        each = estimates(x, *every.paths, weights)
        return (probabilities(every.world, x)[:, None, None] * each).sum(0).flatten()

    matrix = jacrev(mean)(every.logits).view(every.logits.numel(), -1)
    return ((matrix - matrix.T).abs().max() / matrix.abs().max()).item()


MOMENT_COLUMNS = ("weight of ∇ log π(a_t | s_t)", "its mean is off by", "variance")


def moment_rows(found: dict[str, Moments]) -> list[tuple[str, str, float]]:
    """Of a table with MOMENT_COLUMNS. found: weight -> moments of the estimate, here and below."""
    return [(name, f"{moments.error:.0e}", moments.variance) for name, moments in found.items()]


def theorem(found: dict[str, Moments]) -> tuple[str, bool]:
    error = found["whole return"].error
    return f"largest difference from finite differences {error:.0e} of the largest component", error < 1e-7


def reward_to_go(found: dict[str, Moments]) -> tuple[str, bool]:
    whole, to_go = found["whole return"], found["reward-to-go"]
    apart = (whole.mean - to_go.mean).abs().max().item()
    return (
        f"means apart by {apart:.0e}; variance {whole.variance:.1f} and {to_go.variance:.1f}, a factor of "
        f"{whole.variance / to_go.variance:.1f}",
        apart < 1e-12 and to_go.variance < whole.variance,
    )


def baselines(found: dict[str, Moments]) -> tuple[str, bool]:
    plain, value, ten = (found[f"reward-to-go{less}"] for less in ("", " less the value", " less 10"))
    return (
        f"variance {plain.variance:.1f} without, {value.variance:.1f} with the value function, {ten.variance:.0f} with 10",
        max(value.error, ten.error) < 1e-7 and value.variance < plain.variance < ten.variance,
    )


def without_fade(
    estimates: Estimator, every: Listing, weights: dict[str, Tensor], found: dict[str, Moments]
) -> tuple[str, bool]:
    error = found["reward-to-go without γ^t"].error
    kept, dropped = (asymmetry(estimates, every, weights[f"reward-to-go{end}"]) for end in ("", " without γ^t"))
    return (
        f"off by {error:.0%}; asymmetry of its derivatives {dropped:.3f}, with γ^t {kept:.0e}",
        error > 0.01 and dropped > 1e-3 and kept < 1e-9,
    )


def undone_reward(estimates: Estimator) -> tuple[str, bool]:
    """A reward of +1, then of -1, whatever the actions: the whole return is always 0."""
    there, one = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    world = TinyMDP(1 - there, there.expand(2, 2, 2), torch.cat([one, -one]), horizon=2)
    every = Listing(world, torch.zeros(2, 2, dtype=torch.float64), gamma=1.0)
    weights = (every.to_go[:, :1].expand_as(every.to_go), every.to_go)
    whole, to_go = (every.moments(estimates(every.logits, *every.paths, weight)).variance for weight in weights)
    return (
        f"rewards +1, then -1: variance {whole:.1f} with the whole return, {to_go:.1f} with reward-to-go",
        whole == 0 and to_go > 0.1,
    )


# ---------------------------------------------------------------- from samples


def sample(
    estimates: Estimator, every: Listing, weights: dict[str, Tensor], seed: int, batches: int, episodes: int
) -> dict[str, Tensor]:
    """The estimate from each of many batches of episodes, with the first three kinds of weights: (batches, S*A) each."""
    chance = torch.Generator().manual_seed(seed)
    paths = every.world.sample(every.logits.softmax(-1), batches * episodes, chance)
    places, guesses = every.world.places(*paths), {}
    for name, weight in list(weights.items())[:3]:
        each = estimates(every.logits, *paths, weight[places])
        guesses[name] = each.view(batches, episodes, -1).mean(1)
    return guesses


def centres(guesses: dict[str, Tensor], slope: Tensor) -> tuple[str, bool]:
    apart = [
        ((guess.mean(0) - slope.flatten()).abs() / (guess.std(0) / len(guess) ** 0.5)).max().item()
        for guess in guesses.values()
    ]
    return f"at most {max(apart):.1f} standard errors away, with three kinds of weights", max(apart) < 5


# ---------------------------------------------------------------- CartPole


def noise_on_cartpole(seed: int) -> tuple[str, bool]:
    """How much the gradients of single episodes differ, under the policy that nothing was taught."""
    policy = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "policy"), "cpu")
    rollout, mask = first_episodes(policy, derive_seed(seed, "noise"))
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
    return (
        f"variance of an episode's gradient, relative: {whole / plain:.1f}, 1, {centred / plain:.2f} "
        f"({len(batch)} episodes, {sum(w.numel() for w in weights):,} weights)",
        whole > 1.3 * plain > 1.3 * 1.3 * centred,
    )


def last_returns(runs: list[list[float]]) -> list[float]:
    """Of each run: the mean of its last five updates."""
    return [sum(run[-5:]) / 5 for run in runs]


def learned(runs: list[list[float]]) -> tuple[str, bool]:
    first, last = median(run[0] for run in runs), last_returns(runs)
    each = ", ".join(f"{value:.0f}" for value in last)
    return (
        f"mean return {first:.0f} to {median(last):.0f} (last 5 updates; median of {len(runs)} runs: {each})",
        median(last) > 10 * first,
    )


def less_learned(whole: list[list[float]], better: list[list[float]]) -> tuple[str, bool]:
    less, more = median(last_returns(whole)), median(last_returns(better))
    return f"{less:.0f} (median of {len(whole)} runs)", less < 0.8 * more
