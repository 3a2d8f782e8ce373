"""Exercises of chapter 4: importance sampling, the clipped loss, and how far a policy has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pellucid.core import ppo_clip
from pellucid.learn.exercises import Exercise


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_importance_mean(answer: Callable[..., Any]) -> None:
    """Every action once, and its share of the samples put into the values: the mean is then a sum that is known."""
    for seed in range(3):
        old, new = _numbers(seed, 2, 5).log_softmax(1)
        worth = _numbers(seed + 10, 5)
        share = worth * old.exp() * 5  # as if each action had been sampled as often as the old policy takes it
        got = float(answer(new, old, share))
        expected, swapped = (new.exp() * worth).sum().item(), ((2 * old - new).exp() * worth).sum().item()
        ratio = (new - old).exp()
        assert abs(got - swapped) > 1e-6, "the ratio is upside down: it is new / old, exp(logprobs - old_logprobs)"
        assert abs(got - (ratio * share).sum().item() / ratio.sum().item()) > 1e-6, (
            "divided by the sum of the ratios: that estimate has less variance, but a bias; divide by the number of samples"
        )
        assert abs(got - expected) < 1e-9, f"expected the mean of ratio · value, {expected:.4f}, got {got:.4f}"


def check_clipped_loss(answer: Callable[..., Any]) -> None:
    for ratio in (0.5, 0.9, 1.0, 1.1, 1.5):
        for advantage in (2.0, -2.0):
            logprobs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
            old, weight = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
            got, (right, _) = answer(logprobs, old, weight, 0.2), ppo_clip(logprobs, old, weight, 0.2, 0.2)
            where = f"ratio {ratio}, A = {advantage:+.0f}"
            assert got.shape == (1,), "return the loss of each step, not their mean"
            wrong = abs(got.item() - right.item()) > 1e-9
            assert not (wrong and abs(got.item() + ratio * advantage) < 1e-9), (
                f"{where}: the ratio is past the clip on the side that A asks for, so the loss stays at {right.item():.2f}"
            )
            assert not wrong, (
                f"{where}: the loss is {right.item():.2f}, got {got.item():.2f}: the larger of -ratio · A and "
                "-clip(ratio) · A, the pessimistic choice"
            )
            slope = torch.autograd.grad(got.sum(), logprobs)[0] if got.requires_grad else torch.zeros(1).double()
            expected = torch.autograd.grad(right.sum(), logprobs)[0]
            assert torch.allclose(slope, expected), (
                f"{where}: the value is right, but its slope is not {expected.item():.2f}"
            )


def check_mean_kl(answer: Callable[..., Any]) -> None:
    for seed in range(3):
        old, new = _numbers(seed, 2, 6, 3)
        expected = kl_divergence(Categorical(logits=old), Categorical(logits=new)).mean().item()
        backwards = kl_divergence(Categorical(logits=new), Categorical(logits=old)).mean().item()
        got = float(answer(old, new))
        assert abs(got - backwards) > 1e-9, (
            "this is KL(new ‖ old): here the mean is over the old policy, which the sample came from"
        )
        assert abs(got - 6 * expected) > 1e-9, "summed over the states: take their mean"
        assert abs(got - expected) < 1e-9, (
            f"expected {expected:.4f} nats, got {got:.4f}: Σ over actions p_old · (log p_old - log p_new), mean over states"
        )


EXERCISES = (
    Exercise(
        "importance_mean",
        "Estimate the mean of values under the new policy from actions that the old policy sampled. It must be unbiased.",
        "用旧策略采样的动作，估计 values 在新策略下的均值。估计必须是无偏的。",
        '''
def importance_mean(logprobs, old_logprobs, values):
    """All (N,), of the sampled actions. Returns a scalar."""
    ...
''',
        check_importance_mean,
    ),
    Exercise(
        "clipped_loss",
        "Write PPO's clipped loss of each step, with torch's own operations.",
        "用 torch 自带的运算，写出每一步的 PPO 截断损失。",
        '''
def clipped_loss(logprobs, old_logprobs, advantages, eps: float):
    """All (N,); logprobs with a gradient. Returns (N,), to be minimised."""
    ...
''',
        check_clipped_loss,
    ),
    Exercise(
        "mean_kl",
        "Write how far a policy has moved since it sampled: KL(old ‖ new) of its actions, as a mean over states.",
        "策略自采样以来移动了多远：写出动作分布的 KL(旧 ‖ 新)，并对状态取平均。",
        '''
def mean_kl(old_logits, new_logits):
    """Both (N,A), of N states. Returns a scalar, in nats."""
    ...
''',
        check_mean_kl,
    ),
)
