"""Exercises of chapter 3: the TD error, GAE as a loop, and a value function that is solved and not learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pellucid.core import gae
from pellucid.learn.exercises import Exercise


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _one_row(rewards: Tensor, values: Tensor, ended: Tensor, beyond: Tensor, gamma: float, lam: float) -> Tensor:
    row = [x[None] for x in (rewards, values)]
    return gae(*row, torch.ones_like(ended)[None], ended[None], beyond[None], gamma, lam)[0][0]


def check_td_errors(answer: Callable[..., Any]) -> None:
    rewards, values, next_values = _numbers(0, 3, 6)
    terminated = torch.tensor([False, False, True, False, False, True])
    got = torch.as_tensor(answer(rewards, values, next_values, terminated, 0.9), dtype=torch.float64)
    assert got.shape == (6,), f"one TD error a step: 6 of them, got shape {tuple(got.shape)}"
    beyond = torch.where(terminated, 0, next_values)
    expected = _one_row(rewards, values, torch.ones(6, dtype=torch.bool), beyond, 0.9, 0.0)
    forgotten = rewards + 0.9 * next_values - values
    assert not torch.allclose(got, forgotten), (
        "after a terminated step no reward comes any more: there the next value counts as 0, whatever the critic says of it"
    )
    assert not torch.allclose(got, -expected), "the sign is the other one: better than expected is positive"
    assert torch.allclose(got, expected), (
        "expected r_t + γ · V(s_t+1) - V(s_t), the next value discounted and the own not"
    )


def check_gae_loop(answer: Callable[..., Any]) -> None:
    for seed, lam in ((1, 0.95), (2, 0.0), (3, 1.0)):
        rewards, values = _numbers(seed, 2, 5)
        last_value = 1.7
        got = torch.as_tensor(answer(rewards.tolist(), values.tolist(), last_value, 0.9, lam), dtype=torch.float64)
        assert got.shape == (5,), f"one advantage a step: 5 of them, got shape {tuple(got.shape)}"
        ended, beyond = torch.tensor([False] * 4 + [True]), torch.tensor([0.0] * 4 + [last_value], dtype=torch.float64)
        expected = _one_row(rewards, values, ended, beyond, 0.9, lam)
        assert abs(got[-1] - expected[-1]) < 1e-9, (
            f"λ = {lam}: the last advantage is r + γ · last_value - V = {expected[-1]:.4f}, got {got[-1]:.4f}: the episode "
            "was cut there, so something is still to come"
        )
        assert torch.allclose(got, expected), (
            f"λ = {lam}: the last advantage is right and the others are not: A_t = δ_t + γ λ A_t+1, from the end to the start"
        )


def check_solve_values(answer: Callable[..., Any]) -> None:
    for seed in range(3):
        transition = _numbers(seed, 4, 4).softmax(1) * 0.9  # one step in ten ends the episode
        rewards = _numbers(seed + 10, 4)
        got = torch.as_tensor(answer(transition, rewards, 0.95), dtype=torch.float64)
        assert got.shape == (4,), f"a value for each of the 4 states, got shape {tuple(got.shape)}"
        values = torch.zeros(4, dtype=torch.float64)
        for _ in range(1000):
            values = rewards + 0.95 * transition @ values
        wrong = (got - rewards - 0.95 * transition @ got).abs().max().item()
        assert torch.allclose(got, values), (
            f"V must equal r + γ P V, and differs from it by up to {wrong:.3f}: it solves (I - γ P) V = r"
        )


EXERCISES = (
    Exercise(
        "td_errors",
        "Write the TD error of each step from the critic's values before and after it. Some steps terminated the episode.",
        "由每一步之前和之后的价值，写出各步的 TD 误差。其中有些步终止（terminated）了回合。",
        '''
def td_errors(rewards, values, next_values, terminated, gamma: float):
    """All (T,) tensors; terminated: bool. Returns (T,)."""
    ...
''',
        check_td_errors,
    ),
    Exercise(
        "gae_loop",
        "Write GAE for one episode as a loop from its end. It was cut after the last step, and last_value is the critic's "
        "value of what came then.",
        "用一个从后往前的循环，为一个回合写出 GAE。该回合在最后一步之后被截断（truncated），"
        "last_value 是 critic 对其后状态的估值。",
        '''
def gae_loop(rewards: list[float], values: list[float], last_value: float, gamma: float, lam: float):
    """rewards, values: T numbers each. Returns a list of T advantages."""
    ...
''',
        check_gae_loop,
    ),
    Exercise(
        "solve_values",
        "Write the exact value function of a policy from its transition probabilities and expected rewards.",
        "已知策略下的状态转移概率和期望奖励，求出精确的价值函数。",
        '''
def solve_values(transition, rewards, gamma: float):
    """transition: (S,S) tensor, P(s' given s); a row sums to less than 1 where the episode may end. rewards: (S,).
    Returns (S,)."""
    ...
''',
        check_solve_values,
    ),
)
