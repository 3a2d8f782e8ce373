"""Exercises of chapter 2: the score, the loss of REINFORCE, a baseline that takes nothing from the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad

from pellucid.core import rloo
from pellucid.learn.exercises import Exercise


def check_score(answer: Callable[..., Any]) -> None:
    for seed in range(3):
        logits = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        got = torch.stack([torch.as_tensor(answer(logits, action)) for action in range(4)])
        expected = torch.stack([grad(lambda x, a=action: x.log_softmax(-1)[a])(logits) for action in range(4)])
        mean = logits.softmax(-1) @ got.double()
        assert got.shape == (4, 4), (
            f"the score of one action has an entry for each of the 4 logits, got {tuple(got.shape[1:])}"
        )
        assert mean.abs().max() < 1e-6, (
            f"the mean of the scores under the policy is {[round(x, 3) for x in mean.tolist()]} and must be 0: raising one "
            "logit lowers the others' probabilities"
        )
        assert torch.allclose(got.double(), expected, atol=1e-6), (
            "the mean over actions is 0, as it must be, but autograd disagrees: d log π(a) / d logit_k = [k = a] - π(k)"
        )


def check_loss(answer: Callable[..., Any]) -> None:
    chance = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 5, dtype=torch.float64, generator=chance)
    returns = torch.randn(3, 5, dtype=torch.float64, generator=chance)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    slope = grad(lambda x: answer(x, returns, mask))(logprobs)
    assert slope[~mask].abs().max() == 0, "steps outside the mask have a gradient: they belong to no episode"
    sign = (slope * returns)[mask].sum()
    assert sign < 0, (
        "the optimizer goes down, and down this loss the good actions become rarer: the sign is the other one"
    )
    expected = -returns * mask / mask.sum()
    assert torch.allclose(slope, expected), (
        f"the gradient should be -return / {int(mask.sum())} on each step of the mask, got for example {slope[0, 0]:.4f} "
        f"where {expected[0, 0]:.4f} was expected: divide by the steps of the whole batch, not by the rows or columns"
    )


def check_baseline(answer: Callable[..., Any]) -> None:
    for seed in range(3):
        returns = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        got = torch.as_tensor(answer(returns))
        expected = returns - rloo(returns, torch.zeros(6, dtype=torch.long))
        assert got.shape == (6,), f"every episode has a baseline of its own: 6 episodes, got shape {tuple(got.shape)}"
        assert not torch.allclose(got, returns.mean().expand(6)), (
            "this is the mean of all returns, the episode's own among them: then the baseline depends on the action, and the "
            "estimate is short by 1 / 6"
        )
        assert torch.allclose(got, expected), "expected the mean of the other episodes' returns: (sum - own) / (B - 1)"


EXERCISES = (
    Exercise(
        "score",
        "Write the gradient of log π(action) with respect to the logits of a softmax policy, without autograd.",
        "不用 autograd，写出 softmax 策略的 log π(action) 对 logits 的梯度。",
        '''
def score(logits, action: int):
    """logits: (A,) tensor. Returns (A,)."""
    ...
''',
        check_score,
    ),
    Exercise(
        "reinforce_loss",
        "Write the loss whose gradient is REINFORCE's, as a mean over the steps of the batch.",
        "写出 REINFORCE 的 loss：对批次中所有有效的步取平均，其梯度就是 REINFORCE 的梯度。",
        '''
def reinforce_loss(logprobs, returns, mask):
    """All (B,T); logprobs with a gradient; mask: True on steps that belong to an episode. Returns a scalar to minimise."""
    ...
''',
        check_loss,
    ),
    Exercise(
        "other_episodes_mean",
        "Write a baseline for each of B episodes that knows nothing of the episode's own actions: the mean of the others.",
        "为 B 个回合各写一个基线，它与该回合自己的动作无关：其余回合回报的平均值。",
        '''
def other_episodes_mean(returns):
    """returns: (B,) tensor, B at least 2. Returns (B,)."""
    ...
''',
        check_baseline,
    ),
)
