"""Chapter 1: what it computes against closed forms and other ways of counting, its claims, and its exercises."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from pellucid.learn import CHAPTERS
from pellucid.learn import chapter_1_trajectory as chapter
from pellucid.learn.exercises.chapter_1 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_1 import first_episodes, physics
from pellucid.learn.tiny_mdp import TinyMDP, machine
from pellucid.metrics import Reporter

CAREFUL = torch.tensor([[0.6, 0.4], [0.7, 0.3]], dtype=torch.float64)


def test_its_claims_hold(tmp_path: Path) -> None:
    lesson = Lesson(CHAPTERS[0], tmp_path, 0, Reporter(quiet=True))
    chapter.run(lesson)
    assert len(lesson.claims) == 8
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
    assert (tmp_path / "1-returns.png").stat().st_size < 120_000


def test_physics_is_that_of_gymnasium() -> None:
    """Its single environment is another implementation than the vector one that the chapter compares with."""
    env = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for action in (0, 1):
        state = rng.uniform(-0.2, 0.2, 4)
        env.state = tuple(state)
        env.step(action)
        after = physics(torch.from_numpy(state)[None], torch.tensor([float(action)]))
        np.testing.assert_allclose(after[0], env.state, rtol=1e-12)


def test_an_episode_by_the_loop_is_the_one_that_collect_makes() -> None:
    steps = chapter.episode(chapter.HAND_MADE, seed=3)
    rollout, first = first_episodes(chapter.HAND_MADE, seed=3, carts=1)
    assert len(steps) == int(first.sum())
    states = torch.stack([step.state for step in steps])
    assert torch.equal(states, rollout.batch.get("observations")[first])
    assert [step.action for step in steps] == rollout.batch.input_ids[first].tolist()
    assert [step.terminated for step in steps] == rollout.terminated[first].tolist()
    assert all(step.action == (step.state[2] + step.state[3] > 0) for step in steps)


def test_the_loop_for_returns_is_their_definition() -> None:
    rewards = [0.5, -1.0, 2.0, 3.0]
    for t, found in enumerate(chapter.returns_from_the_end(rewards)):
        assert found == pytest.approx(sum(chapter.GAMMA**k * reward for k, reward in enumerate(rewards[t:])))


def test_first_episodes_are_whole_and_one_a_cart() -> None:
    rollout, first = first_episodes(chapter.RANDOM, seed=1, carts=20)
    ended, lengths = rollout.batch.ended & first, first.sum(1)
    assert ended.sum(1).tolist() == [1] * 20
    assert (ended.int().argmax(1) == lengths - 1).all()
    assert rollout.batch.action_mask[first].all()


def test_expected_return_is_the_sum_over_all_trajectories() -> None:
    """By loops over python numbers, in place of the recursion."""
    world = machine(horizon=3)
    total = 0.0
    for path in itertools.product(range(2), repeat=6):
        states, actions = path[:3], path[3:]
        p = world.start[states[0]].item()
        for t in range(3):
            p *= CAREFUL[states[t], actions[t]].item()
            p *= world.dynamics[states[t], actions[t], states[t + 1]].item() if t < 2 else 1.0
        total += p * sum(0.9**t * world.rewards[states[t], actions[t]].item() for t in range(3))
    assert world.expected_return(CAREFUL, 0.9).item() == pytest.approx(total, rel=1e-12)


def test_places_are_where_the_trajectories_are_listed() -> None:
    world = machine(horizon=3)
    assert world.places(*world.trajectories()).tolist() == list(range(4**3))


def test_expected_return_of_a_world_without_choices() -> None:
    """A reward of 1 in every step: a geometric sum."""
    world = TinyMDP(torch.ones(1).double(), torch.ones(1, 1, 1).double(), torch.ones(1, 1).double(), horizon=5)
    assert world.expected_return(torch.ones(1, 1).double(), 0.8).item() == pytest.approx((1 - 0.8**5) / (1 - 0.8))


def test_sampled_trajectories_follow_the_dynamics() -> None:
    """Conditional frequencies of single moves, not the products that the chapter looks at."""
    world = machine()
    states, actions = world.sample(CAREFUL, 40_000, torch.Generator().manual_seed(0))
    for state, action in itertools.product(range(2), repeat=2):
        after = states[:, 1:][(states[:, :-1] == state) & (actions[:, :-1] == action)]
        p = world.dynamics[state, action, 1].item()
        assert after.double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / len(after)))


# ---------------------------------------------------------------- exercises


def returns_of(rewards: list[float], gamma: float) -> list[float]:
    out, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        out.append(following)
    return out[::-1]


def trajectory_logprob(start: Any, dynamics: Any, policy: Any, states: list[int], actions: list[int]) -> float:
    total = start[states[0]].log()
    for t, (state, action) in enumerate(zip(states, actions, strict=True)):
        total += policy[state, action].log()
        if t + 1 < len(states):
            total += dynamics[state, action, states[t + 1]].log()
    return total


def without_start(start: Any, *rest: Any) -> float:
    return trajectory_logprob(torch.ones_like(start), *rest)


def wrong_way_round(start: Any, dynamics: Any, *rest: Any) -> float:
    return trajectory_logprob(start, dynamics.transpose(0, 1), *rest)


RIGHT = (returns_of, lambda terminated, truncated, value: 0.0 if terminated else value, trajectory_logprob)
WRONG = [
    (0, lambda rewards, gamma: [sum(rewards)] * len(rewards), "whole return"),
    (0, lambda rewards, gamma: returns_of(rewards, 1.0), "gamma 0.9"),
    (0, lambda rewards, gamma: returns_of(rewards, gamma)[::-1], "G_t = r_t"),
    (0, lambda rewards, gamma: returns_of(rewards, gamma)[:-1], "has 1 returns"),
    (0, lambda rewards, gamma: None, "has 1 returns"),
    (1, lambda terminated, truncated, value: value if truncated else 0.0, "no future"),
    (1, lambda terminated, truncated, value: 0.0, "would have gone on"),
    (2, without_start, "not 1"),
    (2, wrong_way_round, "dynamics"),
]


@pytest.mark.parametrize(
    ("exercise", "answer"), list(zip(EXERCISES, RIGHT, strict=True)), ids=lambda x: getattr(x, "name", "")
)
def test_right_answers_pass(exercise: Any, answer: Any) -> None:
    exercise.check(answer)


@pytest.mark.parametrize(("number", "answer", "hint"), WRONG)
def test_wrong_answers_are_told_why(number: int, answer: Any, hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        EXERCISES[number].check(answer)
