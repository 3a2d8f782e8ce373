"""Exercises of chapter 6: the pair loss, the terminal reward, where a critic puts the credit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pellucid.core import bradley_terry, gae, kl_shaped_rewards
from pellucid.learn.exercises import Exercise


def check_pair_loss(pair_loss: Callable[..., Any]) -> None:
    for chosen, rejected in ((0.3, 0.3), (1.0, 0.0), (-2.0, 1.5), (8.0, 5.0)):
        right = bradley_terry(
            torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
        ).item()
        got = float(pair_loss(chosen, rejected))
        assert chosen != rejected or abs(got - math.log(2)) < 1e-9, "equal scores give even odds: the loss is log 2"
        assert abs(got - right) < 1e-9, (
            f"at {chosen} against {rejected} it is {right:.4f}, not {got:.4f}: -log sigmoid(chosen - rejected)"
        )
    try:
        far = float(pair_loss(-800.0, 800.0))
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise AssertionError(
            f"at -800 against 800 it raised {error}: write it so that no exponential overflows"
        ) from error
    assert abs(far - 1600) < 1e-6, (
        f"at -800 against 800 the loss is 1600, not {far}: exp overflows or log(0) was cut off"
    )


def check_terminal_rewards(terminal_rewards: Callable[..., Any]) -> None:
    scores = torch.tensor([1.5, -2.0, 0.25])
    mask = torch.tensor(
        [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool
    )  # the second has a token in between that the policy did not choose
    right = kl_shaped_rewards(scores, torch.zeros(mask.shape), mask, 0.0)
    got = terminal_rewards(scores, mask)
    assert got.shape == mask.shape, f"one reward a column: shape {tuple(mask.shape)}, not {tuple(got.shape)}"
    assert not got[~mask].any(), (
        "only actions are rewarded: the score belongs on the last action, not in a column of padding"
    )
    assert torch.equal(got.sum(1), scores), "the rewards of a reply must add up to its score: put it there once"
    assert torch.equal(got, right), "the score stands on the last action; all before it get 0"


def check_td_errors(td_errors: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(6)
    for n in (4, 1, 7):
        values, score = torch.randn(n, generator=random, dtype=torch.float64), 1.25
        rewards = torch.zeros(1, n, dtype=torch.float64)
        rewards[0, -1] = score
        mask, ended, nothing = torch.ones(1, n, dtype=torch.bool), rewards != 0, torch.zeros_like(rewards)
        right, _ = gae(rewards, values[None], mask, ended, nothing, 1.0, 0.0)
        got = [float(delta) for delta in td_errors(values.tolist(), score)]
        assert len(got) == n, f"a reply of {n} tokens has {n} TD errors, not {len(got)}"
        total = score - values[0].item()
        last = right[0, -1].item()
        assert abs(got[-1] - last) < 1e-9, (
            f"beyond the last token the value is 0, so its TD error is score - V: {last:.4f}"
        )
        assert abs(sum(got) - total) < 1e-9, (
            "they must add up to the score minus the first value: V(t+1) - V(t), not the reverse"
        )
        assert all(abs(a - b) < 1e-9 for a, b in zip(got, right[0].tolist(), strict=True)), "δ_t = r_t + V(t+1) - V(t)"


EXERCISES = (
    Exercise(
        "pair_loss",
        "Return the Bradley-Terry loss of one pair, -log sigmoid(chosen - rejected), as a float; it must also be right where "
        "the scores are 1,600 apart.",
        "返回一个偏好对的 Bradley-Terry 损失 -log sigmoid(chosen - rejected)，类型为 float；两个得分相差 1600 时也必须正确。",
        'def pair_loss(chosen: float, rejected: float) -> float:\n    """In nats."""\n    ...\n',
        check_pair_loss,
    ),
    Exercise(
        "terminal_rewards",
        "Each row of a batch has a score and a mask of the tokens that the policy chose. Return the token rewards: the score "
        "on the last action of its row, 0 elsewhere. Rows have different lengths, and a mask may have holes.",
        "批次的每一行有一个得分，以及一个标出策略所选 token 的 mask。"
        "返回每个 token 的奖励：得分放在该行最后一个动作上，其余为 0。"
        "各行长度不同，mask 中间可能有空缺。",
        "def terminal_rewards(scores: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:\n"
        '    """scores: (B,). action_mask: (B,T) bool. Returns (B,T)."""\n'
        "    ...\n",
        check_terminal_rewards,
    ),
    Exercise(
        "td_errors",
        "One reply: the critic's value before each of its tokens, and the score that came with the last one. Return the TD "
        "error of each token, with γ = 1.",
        "一条回复：critic 在每个 token 之前给出的价值，以及随最后一个 token 到来的得分。"
        "取 γ = 1，返回每个 token 的 TD 误差。",
        'def td_errors(values: list[float], score: float) -> list[float]:\n    """δ_t of each token."""\n    ...\n',
        check_td_errors,
    ),
)
