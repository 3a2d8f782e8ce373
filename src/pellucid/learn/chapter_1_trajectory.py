"""Chapter 1: the words of reinforcement learning, each on numbers that this run measures.

A cart balances a pole. `episode` is the loop between policy and environment; its result is a trajectory. Then the return
and its discount, the returns of two policies, the two ways in which an episode stops, what makes an observation a state,
and the probability of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.config import EnvConfig
from pellucid.core import discounted_returns
from pellucid.learn.lesson import Lesson
from pellucid.learn.tiny_mdp import machine
from pellucid.models import MLPPolicy
from pellucid.rollout.gym import Rollout, collect, make_environments
from pellucid.types import Batch, derive_seed

CARTS, LIMIT, GAMMA = 500, 500, 0.99
GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TICK = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02  # m/s², kg, kg, m, N, s


class Rule:
    """A policy: probabilities of the actions (push left, push right) in a state. push: a state's logit for the right."""

    device = torch.device("cpu")

    def __init__(self, push: Callable[[Tensor], Tensor]) -> None:
        self.push = push

    def logits(self, states: Tensor) -> Tensor:
        """(…,4) -> (…,2)."""
        push = self.push(states)
        return torch.stack([-push, push], -1)


RANDOM = Rule(lambda states: torch.zeros(states.shape[:-1]))
HAND_MADE = Rule(lambda states: 50 * (states[..., 2] + states[..., 3]).sign())  # where the pole leans and turns


# ---------------------------------------------------------------- a trajectory


class Step(NamedTuple):
    """state: position (m), velocity (m/s), angle (rad), angular velocity (rad/s)."""

    state: Tensor
    action: int
    reward: float
    terminated: bool
    truncated: bool


def episode(policy: Rule, seed: int) -> list[Step]:
    """The loop at the bottom of every RL system: the policy answers to a state, the environment to an action."""
    environment = make_environments(EnvConfig(num_envs=1), seed)
    chance, steps, over = torch.Generator().manual_seed(seed), [], False
    while not over:
        state = torch.from_numpy(environment.observations.copy())
        probabilities = policy.logits(state).softmax(-1)
        action = torch.multinomial(probabilities, 1, generator=chance)[:, 0]
        _, rewards, terminated, truncated, _ = environment.step(action.numpy())
        steps.append(Step(state[0], int(action), float(rewards[0]), bool(terminated[0]), bool(truncated[0])))
        over = steps[-1].terminated or steps[-1].truncated
    return steps


def show_trajectory(lesson: Lesson) -> None:
    steps = episode(RANDOM, derive_seed(lesson.seed, "one episode"))
    rewards = [step.reward for step in steps]
    by_hand, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + GAMMA * following
        by_hand.insert(0, following)
    row, ended = torch.tensor([rewards]), torch.tensor([[step.terminated or step.truncated for step in steps]])
    returns = discounted_returns(row, torch.ones_like(ended), ended, torch.zeros_like(row), GAMMA)[0]
    rows = [
        [t, *(f"{x:+.3f}" for x in s.state.tolist()), ("left", "right")[s.action], s.reward, f"{returns[t]:.3f}"]
        for t, s in enumerate(steps)
    ]
    shown = rows if len(rows) <= 14 else [*rows[:7], ["…"] * 8, *rows[-6:]]
    head = ("t", "position", "velocity", "angle", "angular vel.", "action", "reward", f"return, γ = {GAMMA}")
    lesson.table(f"A trajectory of the random policy: {len(steps)} steps, then the pole has fallen", head, shown)
    defined = [sum(GAMMA ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
    gap = max(max(abs(a - b), abs(a - c)) for a, b, c in zip(returns.tolist(), by_hand, defined, strict=True))
    lesson.claim(
        "A return is a sum of rewards: `core.discounted_returns`, a loop from the end, and the definition Σ γ^k · r agree",
        f"largest difference {gap:.1e}, over {len(steps)} steps",
        gap < 1e-4,
    )


# ---------------------------------------------------------------- many trajectories


def first_episodes(
    policy: Rule | MLPPolicy, seed: int, limit: int = LIMIT, carts: int = CARTS
) -> tuple[Rollout, Tensor]:
    """One whole episode of each cart, and where they are: (N,T) bool.

    A first episode ends within the limit, whatever its length. "Episodes that ended in the last 500 steps" would favour short
    ones.
    """
    environments = make_environments(EnvConfig(num_envs=carts, max_episode_steps=limit), seed)
    rollout = collect(environments, policy, limit, seed, version=0)  # type: ignore[arg-type]
    ended = rollout.batch.ended.long()
    return rollout, ended.cumsum(1) - ended == 0


def interval(x: Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval. x: (N,), independent."""
    return x.mean().item(), 1.96 * x.std().item() / math.sqrt(len(x))


def show_returns(lesson: Lesson, runs: dict[str, tuple[Rollout, Tensor]]) -> None:
    returns = {name: (run.batch.get("rewards") * first).sum(1) for name, (run, first) in runs.items()}
    (low, low_half), (high, high_half) = (interval(x) for x in returns.values())
    lesson.claim(
        "A policy is judged by its expected return, and that is measured over many episodes",
        f"random {low:.1f} ± {low_half:.1f}, hand-made {high:.1f} ± {high_half:.1f} (mean of {CARTS} episodes; 95 %)",
        high - high_half > 10 * (low + low_half),
    )

    def draw(axes: Any) -> None:
        for (name, (run, first)), color, style in zip(runs.items(), ("tab:orange", "tab:blue"), "-:", strict=False):
            angle = run.batch.get("observations")[0, first[0], 2].rad2deg()
            axes[0].plot(angle, style, color=color, label=name)
            axes[1].hist(returns[name], bins=range(0, 521, 20), color=color, alpha=0.75, label=name)
        axes[0].axhline(12, color="gray", lw=0.8, ls="--")
        axes[0].axhline(-12, color="gray", lw=0.8, ls="--", label="here it has fallen")
        axes[0].set(xlim=(0, 80), ylim=(-13, 13), xlabel="step (0.02 s each)", ylabel="angle of the pole (degrees)")
        axes[1].set(xlabel="return of an episode (sum of rewards)", ylabel=f"episodes of {CARTS}")
        axes[0].legend(loc="upper right", bbox_to_anchor=(1, 0.9))
        axes[1].legend(loc="upper center")

    lesson.picture(
        "1-returns",
        draw,
        "80 steps under each policy, and the returns of many episodes.",
        panels=2,
    )


# ---------------------------------------------------------------- terminated or truncated


def show_endings(lesson: Lesson, run: Rollout, first: Tensor, seed: int) -> None:
    """The same carts with twice the limit: what followed where the shorter run was cut."""
    batch = run.batch
    fell, cut = run.terminated & first, batch.ended & ~run.terminated & first
    longer, longer_first = first_episodes(HAND_MADE, seed, 2 * LIMIT)
    rows = cut.any(1)
    same = torch.equal(batch.get("observations")[rows], longer.batch.get("observations")[rows, :LIMIT])
    went_on = longer_first[rows].sum(1) - LIMIT
    lesson.claim(
        f"Truncation is the clock's doing, not the world's: limited to {2 * LIMIT} steps, the carts that were cut go on",
        f"{int(fell.sum())} terminated, {int(cut.sum())} truncated; {int((went_on > 0).sum())} of these go on, for "
        f"{went_on.float().mean():.0f} steps on average",
        same and bool((went_on > 0).all()) and int(fell.sum() + cut.sum()) == CARTS,
    )
    nothing = torch.zeros_like(batch.bootstrap_values)
    uncut = returns_of(longer.batch, longer_first, torch.zeros_like(longer.batch.bootstrap_values))[rows]
    beyond = nothing.clone()
    beyond[rows, LIMIT - 1] = uncut[:, LIMIT]  # what a perfect critic would say of the state in which each was cut
    wrong, right = (
        (returns_of(batch, first, values)[rows] - uncut[:, :LIMIT]).abs().max().item() for values in (nothing, beyond)
    )
    lesson.claim(
        "`bootstrap_values` mends the cut: with what would have followed, the returns are those of the uncut run",
        f"largest error {right:.1e}; with 0, {wrong:.0f} (a reward of 1 for ever is worth 1/(1-γ) = {1 / (1 - GAMMA):.0f})",
        right < 0.01 and wrong > 10,
    )


def returns_of(batch: Batch, mask: Tensor, beyond: Tensor) -> Tensor:
    return discounted_returns(batch.get("rewards"), mask, batch.ended, beyond, GAMMA)


# ---------------------------------------------------------------- the state


def physics(state: Tensor, action: Tensor) -> Tensor:
    """The next state, (N,4) float64: cart and pole by Newton, one Euler step          [Barto, Sutton & Anderson 1983]."""
    _, speed, angle, turning = state.unbind(-1)
    mass, sin, cos = CART + POLE, angle.sin(), angle.cos()
    push = ((2 * action - 1) * FORCE + POLE * HALF_LENGTH * turning**2 * sin) / mass
    angular = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / mass))
    linear = push - POLE * HALF_LENGTH * angular * cos / mass
    return state + TICK * torch.stack([speed, linear, turning, angular], -1)


def show_state(lesson: Lesson, run: Rollout, first: Tensor) -> None:
    """Predict the next angle from the whole observation, from a part of it, and from this part with some history."""
    batch, later = run.batch, first[:, 1:]  # later: where there is a step before
    observations, actions, after = batch.get("observations").double(), batch.input_ids.double(), run.after.double()
    now, before = observations[:, 1:][later], observations[:, :-1][later]
    action, action_before, angle = actions[:, 1:][later], actions[:, :-1][later], after[:, 1:, 2][later]
    wrong = (physics(observations[first], actions[first]) - after[first]).abs().max().item()
    lesson.claim(
        "The observation is the state (Markov property): with the action it gives the next one, the past has nothing to add",
        f"largest error of the equations of motion {wrong:.1e}, over {int(first.sum())} steps",
        wrong < 1e-5,
    )
    ones, places = torch.ones_like(action)[:, None], [0, 2]
    part = torch.cat([ones, now[:, places], action[:, None]], 1)
    history = torch.cat([part, before[:, places], action_before[:, None]], 1)
    misses = [best_line(features, angle).rad2deg().item() for features in (part, history)]
    lesson.claim(
        "Without the velocities it is not: now the past helps to predict the next angle",
        f"root mean square error of the best line {misses[0]:.3f}°; with the step before, {misses[1]:.5f}°",
        misses[1] < misses[0] / 20,
    )


def best_line(features: Tensor, target: Tensor) -> Tensor:
    """Root mean square error of least squares. features: (N,K); target: (N,)."""
    weights = torch.linalg.lstsq(features, target[:, None]).solution
    return (features @ weights - target[:, None]).square().mean().sqrt()


# ---------------------------------------------------------------- the probability of a trajectory


def show_probability(lesson: Lesson, count: int = 200_000) -> None:
    """p(τ) = start(s0) · Π π(a_t | s_t) · Π P(s_t+1 | s_t, a_t), in a world whose P is known."""
    world, chance = machine(), torch.Generator().manual_seed(derive_seed(lesson.seed, "machine"))
    careful, bold = (torch.tensor(p, dtype=torch.float64) for p in ([[0.6, 0.4], [0.7, 0.3]], [[0.2, 0.8], [0.5, 0.5]]))
    states, actions = world.trajectories()
    choices = careful[states, actions].log().sum(1)
    products = (choices + world.log_dynamics(states, actions)).exp()
    seen_states, seen_actions = world.sample(careful, count, chance)
    index = (seen_states * 2 + seen_actions) @ torch.tensor([16, 4, 1])
    shares = torch.bincount(index, minlength=len(products)).double() / count
    apart = ((shares - products) / (products * (1 - products) / count).sqrt()).abs().max().item()
    lesson.claim(
        "The probability of a trajectory is policy times dynamics: the product is how often each comes up",
        f"{len(products)} trajectories, {count:,} episodes; the largest difference is {apart:.1f} standard errors",
        apart < 5 and abs(products.sum().item() - 1) < 1e-12,
    )
    rows = [
        [*(f"{'cool hot'.split()[s]}, {'slow fast'.split()[a]}" for s, a in zip(states[i], actions[i], strict=True)),
         choices[i].exp().item(), (products[i] / choices[i].exp()).item(), products[i].item(), shares[i].item()]
        for i in products.argsort(descending=True)[:5]
    ]  # fmt: skip
    head = ("step 0", "step 1", "step 2", "policy", "dynamics", "product", "seen")
    lesson.table("The five likeliest trajectories of the machine", head, rows)
    ratio = (bold / careful)[seen_states, seen_actions].prod(1)
    guess, half = interval(ratio * world.rewards[seen_states, seen_actions].sum(1))
    exact = world.expected_return(bold, 1.0).item()
    lesson.claim(
        "So the dynamics cancel between two policies: weighted by Π π'/π, the episodes of one give the return of the other",
        f"{guess:.3f} ± {half:.3f} from the other's episodes (95 % interval), {exact:.3f} exactly",
        abs(guess - exact) < 2.5 * half,
    )


def run(lesson: Lesson) -> None:
    show_trajectory(lesson)
    seed = derive_seed(lesson.seed, "carts")
    runs = {"random": first_episodes(RANDOM, seed), "hand-made": first_episodes(HAND_MADE, seed)}
    show_returns(lesson, runs)
    show_endings(lesson, *runs["hand-made"], seed)
    show_state(lesson, *runs["random"])
    show_probability(lesson)
