"""Chapter 1: the words of reinforcement learning, each on numbers that this run measures.

`episode` is the loop between policy and environment; it leaves a trajectory. Then the return and its discount, the two ways
in which an episode stops, what makes an observation a state, and the probability of a trajectory. `measures` gives each
claim its figure, and whether it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.config import EnvConfig
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_1 as measures
from pellucid.learn.pictures.chapter_1 import draw_returns
from pellucid.learn.tiny_mdp import machine
from pellucid.rollout.gym import make_environments
from pellucid.types import derive_seed

GAMMA = 0.99


class Rule(NamedTuple):
    """A policy: probabilities of the actions (push left, push right) in a state. push: a state's logit for the right."""

    push: Callable[[Tensor], Tensor]
    device = torch.device("cpu")

    def logits(self, states: Tensor) -> Tensor:
        """(…,4) -> (…,2)."""
        return self.push(states)[..., None] * torch.tensor([-1.0, 1.0])


RANDOM = Rule(lambda states: torch.zeros(states.shape[:-1]))
HAND_MADE = Rule(lambda states: 50 * (states[..., 2] + states[..., 3]).sign())  # where the pole leans and turns


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
        action = torch.multinomial(policy.logits(state).softmax(-1), 1, generator=chance)[:, 0]
        _, rewards, terminated, truncated, _ = environment.step(action.numpy())
        steps.append(Step(state[0], int(action), float(rewards[0]), bool(terminated[0]), bool(truncated[0])))
        over = steps[-1].terminated or steps[-1].truncated
    return steps


def returns_from_the_end(rewards: list[float]) -> list[float]:
    """G_t = r_t + γ · G_t+1. `core.discounted_returns` is the same for a whole batch."""
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + GAMMA * following
        returns.append(following)
    return returns[::-1]


def run(lesson: Lesson) -> None:
    steps = episode(RANDOM, derive_seed(lesson.seed, "one episode"))
    returns = returns_from_the_end([step.reward for step in steps])
    title = f"A trajectory of the random policy: {len(steps)} steps, then the pole has fallen"
    lesson.table(title, measures.STEP_COLUMNS, measures.step_rows(steps, returns))
    lesson.claim(
        "A return is a sum of rewards: `core.discounted_returns`, a loop from the end, and the definition Σ γ^k · r agree",
        *measures.three_ways(steps, returns, GAMMA),
    )
    seed = derive_seed(lesson.seed, "carts")
    random, made = (measures.first_episodes(policy, seed) for policy in (RANDOM, HAND_MADE))
    lesson.claim(
        "A policy is judged by its expected return, and that is measured over many episodes",
        *measures.mean_returns(random, made),
    )
    draw = partial(draw_returns, runs={"random": random, "hand-made": made})
    lesson.picture("1-returns", draw, "80 steps under each policy, and the returns of many episodes.", panels=2)

    longer = measures.first_episodes(HAND_MADE, seed, limit=1000)
    lesson.claim(
        "Truncation is the clock's doing, not the world's: limited to 1000 steps, the carts that were cut go on",
        *measures.after_the_cut(made, longer),
    )
    lesson.claim(
        "`bootstrap_values` mends the cut: with what would have followed, the returns are those of the uncut run",
        *measures.mended_returns(made, longer, GAMMA),
    )
    lesson.claim(
        "The observation is the state (Markov property): with the action it gives the next one, the past has nothing to add",
        *measures.error_of_physics(random),
    )
    lesson.claim(
        "Without the velocities it is not: now the past helps to predict the next angle", *measures.past_helps(random)
    )

    world, chance = machine(), torch.Generator().manual_seed(derive_seed(lesson.seed, "machine"))
    careful, bold = (torch.tensor(p, dtype=torch.float64) for p in ([[0.6, 0.4], [0.7, 0.3]], [[0.2, 0.8], [0.5, 0.5]]))
    states, actions = world.trajectories()
    policy, dynamics = careful[states, actions].prod(1), world.log_dynamics(states, actions).exp()
    seen = world.sample(careful, 200_000, chance)
    shares = measures.shares(world, seen)
    lesson.claim(
        "The probability of a trajectory is policy times dynamics: the product is how often each comes up",
        *measures.product_and_share(policy * dynamics, shares, len(seen[0])),
    )
    rows = measures.likeliest(world, policy, dynamics, shares)
    lesson.table("The five likeliest trajectories of the machine", measures.PATH_COLUMNS, rows)
    lesson.claim(
        "So the dynamics cancel between two policies: weighted by Π π'/π, the episodes of one give the return of the other",
        *measures.return_of_another(world, bold, seen, weights=(bold / careful)[seen].prod(1)),
    )
