"""What chapter 1 measures. Where a function returns (str, bool), it is a figure in words, and whether the claim holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pellucid.config import EnvConfig
from pellucid.core import discounted_returns
from pellucid.learn.tiny_mdp import TinyMDP
from pellucid.rollout.gym import Policy, Rollout, collect, make_environments

if TYPE_CHECKING:
    from pellucid.learn.chapter_1_trajectory import Step

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TICK = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02  # m/s², kg, kg, m, N, s


# ---------------------------------------------------------------- one trajectory

STEP_COLUMNS = ("t", "position", "velocity", "angle", "angular vel.", "action", "reward", "return, γ = 0.99")


def step_rows(steps: Sequence[Step], returns: Sequence[float]) -> list[list[Any]]:
    """Of a table with STEP_COLUMNS; the middle of a long episode is left out."""
    rows = [
        [t, *(f"{x:+.3f}" for x in s.state.tolist()), ("left", "right")[s.action], s.reward, f"{returns[t]:.3f}"]
        for t, s in enumerate(steps)
    ]
    return rows if len(rows) <= 14 else [*rows[:7], ["…"] * len(STEP_COLUMNS), *rows[-6:]]


def three_ways(steps: Sequence[Step], by_loop: Sequence[float], gamma: float) -> tuple[str, bool]:
    """The returns of one episode: from a loop, from core, and by their definition."""
    rewards = [step.reward for step in steps]
    row, ended = torch.tensor([rewards]), torch.tensor([[step.terminated or step.truncated for step in steps]])
    by_core = discounted_returns(row, torch.ones_like(ended), ended, torch.zeros_like(row), gamma)[0].tolist()
    defined = [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
    gap = max(max(abs(a - b), abs(a - c)) for a, b, c in zip(by_core, by_loop, defined, strict=True))
    return f"largest difference {gap:.1e}, over {len(steps)} steps", gap < 1e-4


# ---------------------------------------------------------------- many trajectories


class Episodes(NamedTuple):
    """first: (N,T) bool, the columns of the rollout that are the first episode of their row."""

    rollout: Rollout
    first: Tensor

    @property
    def returns(self) -> Tensor:
        """(N,): undiscounted."""
        return (self.rollout.batch.get("rewards") * self.first).sum(1)

    def discounted(self, gamma: float, beyond: Tensor) -> Tensor:
        """(N,T). beyond: (N,T), what stands for the rewards after an episode's last step."""
        batch = self.rollout.batch
        return discounted_returns(batch.get("rewards"), self.first, batch.ended, beyond, gamma)


def first_episodes(policy: Policy, seed: int, limit: int = 500, carts: int = 500) -> Episodes:
    """One whole episode of each cart.

    A first episode ends within the limit, whatever its length. "Episodes that ended in the last 500 steps" would favour short
    ones.
    """
    environments = make_environments(EnvConfig(num_envs=carts, max_episode_steps=limit), seed)
    rollout = collect(environments, policy, limit, seed, version=0)
    ended = rollout.batch.ended.long()
    return Episodes(rollout, ended.cumsum(1) - ended == 0)


def interval(x: Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval. x: (N,), independent."""
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def mean_returns(random: Episodes, made: Episodes) -> tuple[str, bool]:
    (low, low_half), (high, high_half) = interval(random.returns), interval(made.returns)
    return (
        f"random {low:.1f} ± {low_half:.1f}, hand-made {high:.1f} ± {high_half:.1f} "
        f"(mean of {len(made.first)} episodes; 95 %)",
        high - high_half > 10 * (low + low_half),
    )


# ---------------------------------------------------------------- terminated or truncated


def after_the_cut(run: Episodes, longer: Episodes) -> tuple[str, bool]:
    """longer: the same carts with a higher limit, so what followed where the shorter run was cut."""
    batch, limit = run.rollout.batch, run.first.shape[1]
    fell, cut = run.rollout.terminated & run.first, batch.ended & ~run.rollout.terminated & run.first
    rows = cut.any(1)
    before = longer.rollout.batch.get("observations")[rows, :limit]
    same = torch.equal(batch.get("observations")[rows], before)
    went_on = longer.first[rows].sum(1) - limit
    return (
        f"{int(fell.sum())} terminated, {int(cut.sum())} truncated; {int((went_on > 0).sum())} of these go on, for "
        f"{went_on.float().mean():.0f} steps on average",
        same and bool((went_on > 0).all()) and int(fell.sum() + cut.sum()) == len(run.first),
    )


def mended_returns(run: Episodes, longer: Episodes, gamma: float) -> tuple[str, bool]:
    """The returns of the cut episodes, with 0 for what followed and with what did, against those of the longer run."""
    limit, nothing = run.first.shape[1], torch.zeros_like(run.rollout.batch.bootstrap_values)
    rows = (run.rollout.batch.ended & ~run.rollout.terminated & run.first).any(1)
    uncut = longer.discounted(gamma, torch.zeros_like(longer.rollout.batch.bootstrap_values))[rows]
    beyond = nothing.clone()
    beyond[rows, limit - 1] = uncut[:, limit]  # what a perfect critic would say of the state in which each was cut
    wrong, right = (
        (run.discounted(gamma, values)[rows] - uncut[:, :limit]).abs().max().item() for values in (nothing, beyond)
    )
    return (
        f"largest error {right:.1e}; with 0, {wrong:.0f} (a reward of 1 for ever is worth 1/(1-γ) = {1 / (1 - gamma):.0f})",
        right < 0.01 and wrong > 10,
    )


# ---------------------------------------------------------------- the state


def physics(state: Tensor, action: Tensor) -> Tensor:
    """The next state, (N,4) float64: cart and pole by Newton, one Euler step          [Barto, Sutton & Anderson 1983]."""
    _, speed, angle, turning = state.unbind(-1)
    mass, sin, cos = CART + POLE, angle.sin(), angle.cos()
    push = ((2 * action - 1) * FORCE + POLE * HALF_LENGTH * turning**2 * sin) / mass
    angular = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / mass))
    linear = push - POLE * HALF_LENGTH * angular * cos / mass
    return state + TICK * torch.stack([speed, linear, turning, angular], -1)


def error_of_physics(run: Episodes) -> tuple[str, bool]:
    """Of the whole observation and the action, as a prediction of the next observation."""
    batch, first = run.rollout.batch, run.first
    predicted = physics(batch.get("observations")[first].double(), batch.input_ids[first].double())
    wrong = (predicted - run.rollout.after[first].double()).abs().max().item()
    return f"largest error of the equations of motion {wrong:.1e}, over {int(first.sum())} steps", wrong < 1e-5


def past_helps(run: Episodes) -> tuple[str, bool]:
    """The next angle predicted from position, angle and action; and from these together with those of the step before."""
    batch, later = run.rollout.batch, run.first[:, 1:]  # later: where there is a step before
    shown = batch.get("observations")[..., [0, 2]].double()  # position and angle
    shown = torch.cat([shown, batch.input_ids[..., None].double()], -1)
    now, before = shown[:, 1:][later], shown[:, :-1][later]
    angle = run.rollout.after[:, 1:, 2][later].double()
    part = torch.cat([torch.ones(len(now), 1, dtype=now.dtype), now], 1)
    misses = [best_line(features, angle).rad2deg().item() for features in (part, torch.cat([part, before], 1))]
    return (
        f"root mean square error of the best line {misses[0]:.3f}°; with the step before, {misses[1]:.5f}°",
        misses[1] < misses[0] / 20,
    )


def best_line(features: Tensor, target: Tensor) -> Tensor:
    """Root mean square error of least squares. features: (N,K); target: (N,)."""
    weights = torch.linalg.lstsq(features, target[:, None]).solution
    return (features @ weights - target[:, None]).square().mean().sqrt()


# ---------------------------------------------------------------- the probability of a trajectory

PATH_COLUMNS = ("step 0", "step 1", "step 2", "policy", "dynamics", "product", "seen")


def shares(world: TinyMDP, seen: tuple[Tensor, Tensor]) -> Tensor:
    """How often each of the world's trajectories was seen, in the order in which it lists them. seen: (n,T) twice."""
    places, number = world.places(*seen), len(world.trajectories()[0])
    return torch.bincount(places, minlength=number).double() / len(places)


def product_and_share(products: Tensor, shares: Tensor, count: int) -> tuple[str, bool]:
    """products, shares: (N,), of all trajectories. count: episodes seen."""
    apart = ((shares - products) / (products * (1 - products) / count).sqrt()).abs().max().item()
    return (
        f"{len(products)} trajectories, {count:,} episodes; the largest difference is {apart:.1f} standard errors",
        apart < 5 and abs(products.sum().item() - 1) < 1e-12,
    )


def likeliest(world: TinyMDP, policy: Tensor, dynamics: Tensor, shares: Tensor) -> list[list[Any]]:
    """Five rows of a table with PATH_COLUMNS. policy, dynamics, shares: (N,)."""
    states, actions = world.trajectories()
    rows: list[list[Any]] = []
    for i in (policy * dynamics).argsort(descending=True)[:5]:
        steps = zip(states[i], actions[i], strict=True)
        names = [f"{('cool', 'hot')[state]}, {('slow', 'fast')[action]}" for state, action in steps]
        rows.append([*names, *(x[i].item() for x in (policy, dynamics, policy * dynamics, shares))])
    return rows


def return_of_another(world: TinyMDP, policy: Tensor, seen: tuple[Tensor, Tensor], weights: Tensor) -> tuple[str, bool]:
    """The expected return of a policy, from episodes of another. policy: (S,A). seen: (n,T) twice. weights: (n,)."""
    guess, half = interval(weights * world.rewards[seen].sum(1))
    exact = world.expected_return(policy, 1.0).item()
    return (
        f"{guess:.3f} ± {half:.3f} from the other's episodes (95 % interval), {exact:.3f} exactly",
        abs(guess - exact) < 2.5 * half,
    )
