"""Exercises of chapter 5: the environment, the log-probs of one pass, what a token hears from the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pellucid.core import ppo_clip
from pellucid.learn.exercises import Exercise


def check_transition(transition: Callable[..., Any]) -> None:
    cases = (
        (([5, 6], 7, 2, 9, 40), ([5, 6, 7], False), "append the token; the episode goes on"),
        (
            ([5, 6], 7, 2, 7, 40),
            ([5, 6, 7], True),
            "the stop token ends the episode, and is an action: it joins the state",
        ),
        (([5, 6, 1, 1], 1, 2, 9, 3), ([5, 6, 1, 1, 1], True), "3 tokens after the prompt reach a limit of 3"),
        (([5, 6, 1], 1, 2, 9, 3), ([5, 6, 1, 1], False), "the limit counts the reply's tokens, not the prompt's"),
        (
            ([7, 5], 3, 2, 7, 40),
            ([7, 5, 3], False),
            "only an action ends the episode: a stop id within the prompt does not",
        ),
    )
    for arguments, (state, ended), hint in cases:
        given = list(arguments[0])
        got = transition(*arguments)
        assert isinstance(got, tuple) and len(got) == 2, (
            "return two things: the next state and whether the episode ended"
        )
        assert list(got[0]) == state and bool(got[1]) == ended, f"{hint}: expected {(state, ended)}, not {got}"
        assert list(arguments[0]) == given, "the state that was given must stay as it was: make a new list"


def check_token_logprobs(token_logprobs: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(6, 11, generator=random, dtype=torch.float64)
    ids = torch.randint(11, (6,), generator=random)
    right = torch.zeros(6, dtype=torch.float64)
    for t in range(1, 6):
        right[t] = logits[t - 1, ids[t]] - logits[t - 1].exp().sum().log()
    got = token_logprobs(logits, ids)
    assert got.shape == (6,), f"one number a token: shape (6,), not {tuple(got.shape)}"
    unshifted = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert not torch.allclose(got[1:], unshifted[1:]), (
        "row t of the logits predicts the token after t: read token t at row t - 1"
    )
    assert got[0] == 0, "nothing comes before the first token, so it has no log-prob: put 0 there"
    assert torch.allclose(got, right), "take log_softmax over the vocabulary, then the entry of the token that is there"


def check_loss_slope(loss_slope: Callable[..., Any]) -> None:
    new_and_advantage = ((-1.0, 2.0), (-1.1, 2.0), (-0.5, 2.0), (-0.5, -2.0), (-2.0, 2.0), (-2.0, -2.0))
    for (new, advantage), old in zip(new_and_advantage, [-1.0] * 6, strict=True):
        logprob = torch.tensor([[new]], dtype=torch.float64, requires_grad=True)
        given = [torch.tensor([[x]], dtype=torch.float64) for x in (old, advantage)]
        loss, clipped = ppo_clip(logprob, *given, 0.2, 0.2)
        (right,) = torch.autograd.grad(loss.sum() / 50, logprob)
        got = float(loss_slope(new, old, advantage, 0.2, 50))
        ratio = torch.tensor(new - old).exp().item()
        where = f"at ratio {ratio:.2f} and advantage {advantage:+.0f}"
        if clipped:
            assert got == 0, f"{where} the clip has taken over: the loss no longer depends on log π, the slope is 0"
        hint = "d loss / d log π = -ratio · A / N, for d ratio / d log π is the ratio again; a loss falls where A is positive"
        if abs(ratio - 1) > 0.2 and not clipped:
            hint = "the ratio is out of the range on the side that A does not want: the clip does not hold it there"
        assert abs(got - right.item()) < 1e-9, f"{where} it is {right.item():.5f}, not {got:.5f}: {hint}"


EXERCISES = (
    Exercise(
        "transition",
        "The whole environment of a language model. Given the state (prompt and reply so far), the token that the policy "
        "chose, the prompt's length, the stop token and the longest reply, return the next state and whether the episode "
        "has ended.",
        "语言模型的整个环境。给定状态（prompt 加上已有的回复）、策略选出的 token、prompt 的长度、停止 token 和回复长度上限，"
        "返回下一个状态，以及这一段轨迹是否结束。",
        "def transition(state, token, prompt_length, stop_id, max_new_tokens):\n"
        '    """state: a list of token ids. Returns (next state, whether the episode has ended)."""\n'
        "    ...\n",
        check_transition,
    ),
    Exercise(
        "token_logprobs",
        "One pass over T known tokens gave logits of shape (T,V). Return (T,): in column t the log-prob of token t given the "
        "tokens before it, and 0 in column 0.",
        "对 T 个已知 token 做一次前向，得到形状为 (T,V) 的 logits。返回 (T,)："
        "第 t 列是给定前面所有 token 时 token t 的对数概率，第 0 列填 0。",
        "def token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:\n"
        '    """logits: (T,V). input_ids: (T,). Returns (T,)."""\n'
        "    ...\n",
        check_token_logprobs,
    ),
    Exercise(
        "loss_slope",
        "Return d loss / d log π of one token under PPO's clipped loss, where the loss is a mean over n tokens and the ratio "
        "is clipped to 1 ± eps. No autograd.",
        "在 PPO 的截断损失下，返回一个 token 的 d loss / d log π；"
        "损失是 n 个 token 的平均，比率截断到 1 ± eps。不用自动求导。",
        "def loss_slope(logprob: float, old_logprob: float, advantage: float, eps: float, n: int) -> float:\n"
        '    """The derivative of the mean loss with respect to this token\'s log-prob."""\n'
        "    ...\n",
        check_loss_slope,
    ),
)
