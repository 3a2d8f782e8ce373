"""Exercises of chapter 1: a return, what follows a cut, the probability of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pellucid.core import discounted_returns
from pellucid.learn.exercises import Exercise
from pellucid.learn.tiny_mdp import machine


def check_returns(answer: Callable[..., Any]) -> None:
    for seed, (length, gamma) in enumerate([(1, 0.9), (5, 1.0), (12, 0.9), (7, 0.0)]):
        rewards = torch.randn(1, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        nothing = torch.zeros_like(rewards)
        expected = discounted_returns(rewards, nothing == 0, nothing != 0, nothing, gamma)[0].tolist()
        got = answer(rewards[0].tolist(), gamma)
        assert got is not None and len(got) == length, f"an episode of {length} rewards has {length} returns, got {got}"
        assert not _close(got, [sum(rewards[0].tolist())] * length) or length == 1, (
            "every step got the whole return; step t's starts at its own reward"
        )
        where = next((t for t in range(length) if not _close([got[t]], [expected[t]])), None)
        assert where is None, (
            f"rewards of {length} steps, gamma {gamma}: return {where} is {got[where]:.4f}, expected {expected[where]:.4f}; "
            "G_t = r_t + gamma * G_t+1, and after the last step there is nothing"
        )


def check_beyond(answer: Callable[..., Any]) -> None:
    for terminated, truncated, expected in [(False, True, 7.0), (True, False, 0.0), (True, True, 0.0)]:
        got = float(answer(terminated, truncated, 7.0))
        hint = "if it terminated there is no future, even when the clock ran out in the same step"
        if not terminated:
            hint = "the world would have gone on, so the value of the state stands for the rewards that were not seen"
        assert got == expected, f"terminated {terminated}, truncated {truncated}, value 7.0: got {got}; {hint}"


def check_logprob(answer: Callable[..., Any]) -> None:
    world = machine(horizon=3)
    policy = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
    states, actions = world.trajectories()
    expected = policy.log()[states, actions].sum(1) + world.log_dynamics(states, actions)
    got = [
        float(answer(world.start, world.dynamics, policy, s.tolist(), a.tolist()))
        for s, a in zip(states, actions, strict=True)
    ]
    total = sum(math.exp(value) for value in got)
    assert abs(total - 1) < 1e-6, (
        f"over all {len(states)} trajectories the probabilities add up to {total:.4f}, not 1: the factors are one start, "
        "T actions, and T - 1 moves from a state to the next"
    )
    assert _close(got, expected.tolist()), (
        "they add up to 1, but single ones are wrong: moves are dynamics[s_t, a_t, s_t+1]"
    )


def _close(a: Any, b: Any) -> bool:
    return all(math.isclose(float(x), float(y), rel_tol=1e-5, abs_tol=1e-6) for x, y in zip(a, b, strict=True))


EXERCISES = (
    Exercise(
        "returns_of",
        "Write the discounted return of every step of one episode, as a loop.",
        "用一个循环写出一个回合（episode）里每一步的折扣回报。",
        '''
def returns_of(rewards: list[float], gamma: float) -> list[float]:
    """rewards: one a step; the episode terminates after the last. Returns G_t = r_t + gamma * r_t+1 + gamma**2 * r_t+2 + …"""
    ...
''',
        check_returns,
    ),
    Exercise(
        "value_beyond",
        "An episode has stopped. Write what stands for the rewards after its last step: the bootstrap value.",
        "一个回合停下来了。写出最后一步之后该用什么代替未来的奖励，即 bootstrap value。",
        '''
def value_beyond(terminated: bool, truncated: bool, value: float) -> float:
    """value: what a critic says of the last state. At least one of terminated and truncated is True; both can be."""
    ...
''',
        check_beyond,
    ),
    Exercise(
        "trajectory_logprob",
        "Write the log-probability of a trajectory, from the policy and the dynamics.",
        "由策略和环境的转移概率写出一条轨迹的对数概率。",
        '''
def trajectory_logprob(start, dynamics, policy, states: list[int], actions: list[int]):
    """start: (S,), dynamics: (S,A,S), policy: (S,A), tensors of probabilities. The last action's outcome is not recorded."""
    ...
''',
        check_logprob,
    ),
)
