"""Exercises of chapter 7: the shaped reward, a loss with the right gradient, the adaptive coefficient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pellucid.core import AdaptiveKL, kl_estimate, kl_shaped_rewards
from pellucid.learn.exercises import Exercise


def check_shaped_rewards(shaped_rewards: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(7)
    for n in (2, 1, 9):
        logprobs, ref = -torch.rand(2, n, generator=random, dtype=torch.float64)
        kl, mask = kl_estimate(logprobs[None], ref[None], "k1"), torch.ones(1, n, dtype=torch.bool)
        right = kl_shaped_rewards(torch.tensor([1.5]), kl, mask, 0.1)[0].tolist()
        got = [float(reward) for reward in shaped_rewards(1.5, logprobs.tolist(), ref.tolist(), 0.1)]
        assert len(got) == n, f"a response of {n} tokens has {n} rewards, not {len(got)}"
        hint = "the price is kl_coef · (log π − log π_ref), and it is taken off"
        assert all(abs(a - b) < 1e-9 for a, b in zip(got[:-1], right[:-1], strict=True)), hint
        assert abs(got[-1] - right[-1]) < 1e-9, "the last token pays its price like the others, and earns the score too"


def check_kl_loss_per_token(kl_loss_per_token: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(7)
    values, ref = -2 * torch.rand(2, 3, 5, generator=random, dtype=torch.float64)
    logprobs = values.clone().requires_grad_()
    loss = kl_loss_per_token(logprobs, ref)
    assert loss.shape == logprobs.shape, f"one loss a token: shape {tuple(logprobs.shape)}, not {tuple(loss.shape)}"
    assert torch.allclose(loss, kl_estimate(values, ref, "k3")), (
        "its value is k3 = exp(−l) − 1 + l, l = log π − log π_ref"
    )
    loss.sum().backward()
    assert logprobs.grad is not None and torch.allclose(logprobs.grad, values - ref), (
        "its derivative by log π must be l: multiply k3 by the live ratio exp(log π − log π.detach()), which is 1 in value"
    )


def check_next_coef(next_coef: Callable[..., Any]) -> None:
    for kl in (0.0, 5.5, 6.0, 6.6, 60.0):
        right = AdaptiveKL(0.2, 6.0, 1000.0).update(kl, 64)
        got = float(next_coef(0.2, kl, 6.0, 64, 1000.0))
        assert (got > 0.2) == (right > 0.2) or got == right, "above the target the coefficient must rise, below it fall"
        assert abs(got - right) < 1e-12, (
            f"at a KL of {kl} it becomes {right:.6f}, not {got:.6f}: clip KL/target − 1 to ±0.2"
        )


EXERCISES = (
    Exercise(
        "shaped_rewards",
        "One response has a score, and its tokens' log-probs under the policy and under the reference. Return the reward of "
        "each token, as a list: every token pays kl_coef for each nat, the last one earns the score as well.",
        "一条回复有一个得分，它的每个 token 有策略和参考模型给出的对数概率。返回每个 token 的奖励（列表）："
        "每个 token 按 kl_coef 为每 nat 付费，最后一个 token 还得到这个得分。",
        "def shaped_rewards(score: float, logprobs: list[float], ref_logprobs: list[float], kl_coef: float) -> list[float]:\n"
        '    """The reward of each token of one response."""\n'
        "    ...\n",
        check_shaped_rewards,
    ),
    Exercise(
        "kl_loss_per_token",
        "k3 has a small variance, but as a loss it has the gradient of the other KL. Return a tensor whose value is k3 and "
        "whose derivative by each log-prob is log π − log π_ref, the one that k2 has: k3 times the live ratio.",
        "k3 方差小，但作为损失，它的梯度属于另一个方向的 KL。返回一个张量：值等于 k3，"
        "对每个对数概率的导数等于 log π − log π_ref（与 k2 相同），即 k3 乘以带梯度的比率。",
        "def kl_loss_per_token(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:\n"
        '    """(B,T) in, (B,T) out; logprobs has a gradient."""\n'
        "    ...\n",
        check_kl_loss_per_token,
    ),
    Exercise(
        "next_coef",
        "Write the adaptive controller: the coefficient after n sequences whose mean KL was kl. It is multiplied by "
        "1 + (KL / target − 1, clipped to ±0.2) · n / horizon.",
        "写出自适应控制器：n 条序列的平均 KL 为 kl 之后的系数。系数乘以 1 + (KL / 目标 − 1，截断到 ±0.2) · n / horizon。",
        "def next_coef(coef: float, kl: float, target: float, n: int, horizon: float) -> float:\n"
        '    """The coefficient of the next iteration."""\n'
        "    ...\n",
        check_next_coef,
    ),
)
