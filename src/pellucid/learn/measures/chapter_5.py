"""What chapter 5 measures on a language model that is a policy: passes, states, discount, actions, the loss of a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pellucid.core import aggregate, discounted_returns, masked_mean, ppo_clip
from pellucid.learn.lesson import Lesson
from pellucid.learn.pictures.chapter_5 import draw_tokens
from pellucid.models import CausalLM
from pellucid.rollout import EmbeddedEngine
from pellucid.types import Batch, Prompt, Sample, SamplingParams, collate

Episode = tuple[list[int], list[float]]
"""Token ids of prompt and reply, and the reply's log-probs."""
COLUMNS = ("token", "log π", "V before it", "reward", "A, whitened", "ratio", "d loss / d log π · N")


def show_passes(lesson: Lesson, policy: CausalLM, samples: list[Sample], episodes: list[Episode]) -> None:
    """episodes: of the same requests as the samples, token ids and log-probs that were made one token at a time."""
    batch = collate(samples, pad_id=0)
    with torch.no_grad():
        at_once, _ = policy.logprobs_of(batch, 1.0)
    one_by_one = torch.tensor([value for _, logprobs in episodes for value in logprobs])
    same = all(ids == sample.input_ids for (ids, _), sample in zip(episodes, samples, strict=True))
    gap = (one_by_one - at_once[batch.action_mask]).abs().max().item() if same else float("inf")
    lesson.claim(
        "Sampling needs one pass after the other, a token each; a single pass over all the tokens gives the same log-probs",
        f"{len(one_by_one)} passes for {len(samples)} replies, then 1; log-probs apart by {gap:.1e} nats at most", gap < 1e-4,
    )  # fmt: skip


def show_states(lesson: Lesson, policy: CausalLM, prompts: list[Prompt], params: SamplingParams) -> None:
    """Start again in the middle of replies: the greedy policy must go on as before, as nothing else is in the state."""
    engine = EmbeddedEngine(policy.hf, num_slots=64)
    greedy = replace(params, temperature=0.0)
    replies = [sample.input_ids for sample in engine.generate(prompts, greedy)]
    cuts = [(row, t) for row, ids in enumerate(replies) for t in range(len(prompts[row].input_ids) + 1, len(ids))]
    starts = [Prompt(i, replies[row][:t], "") for i, (row, t) in enumerate(cuts)]
    ends = engine.generate(starts, greedy)
    same = sum(end.input_ids[: len(replies[row])] == replies[row] for end, (row, _) in zip(ends, cuts, strict=True))
    lesson.claim(
        "The state is the prefix and nothing else: resumed from any of its prefixes, a greedy reply goes on as it did",
        f"{same} of {len(cuts)} prefixes",
        same == len(cuts),
    )


def show_discount(lesson: Lesson, batch: Batch) -> None:
    mask, scores, ended = batch.action_mask, batch.get("scores"), batch.ended
    whole = discounted_returns(batch.get("rewards"), mask, ended, batch.bootstrap_values, gamma=1.0)
    gap = (whole - scores[:, None])[mask].abs().max().item()
    lesson.claim(
        "With γ = 1 the return of every token of a reply is the reply's score",
        f"largest difference {gap:.1e}, over {int(mask.sum())} tokens", gap < 1e-5,
    )  # fmt: skip
    share = discounted_returns(ended.float(), mask, ended, batch.bootstrap_values, gamma=0.95)  # of a score of 1
    first, lengths = share[mask & (mask.cumsum(1) == 1)], mask.sum(1)
    lesson.claim(
        "With γ = 0.95 the first of n tokens sees γ^(n-1) of the score: of two with the same score above 0 the shorter wins",
        f"{first.max():.2f} of it for {int(lengths.min())} tokens, {first.min():.2f} for {int(lengths.max())}",
        torch.allclose(first, 0.95 ** (lengths - 1.0), rtol=1e-4) and first.min() < first.max(),
    )


def show_actions(lesson: Lesson, policy: CausalLM, batch: Batch) -> None:
    with torch.no_grad():
        _, entropy = policy.logprobs_of(batch, 1.0, entropy=True)
    assert entropy is not None
    size, mean = policy.hf.config.vocab_size, masked_mean(entropy, batch.action_mask)
    lesson.claim(
        "The policy has as many actions as there are tokens, but supervised training has left it few to choose from",
        f"{size} tokens; mean entropy {mean:.2f} nats, that of {mean.exp():.1f} equally likely ones",
        mean.exp().item() < size / 20,
    )


def show_tokens(lesson: Lesson, tokenizer: Any, policy: CausalLM, batch: Batch) -> None:
    """After an iteration's updates: every number of one reply, token by token, and the derivative of the loss."""
    mask, old, advantages = batch.action_mask, batch.get("old_logprobs"), batch.get("advantages")
    logprobs, _ = policy.logprobs_of(batch, 1.0)
    loss, clipped = ppo_clip(logprobs, old, advantages, 0.2, 0.2)
    (slope,) = torch.autograd.grad(aggregate(loss, mask, "token"), logprobs)
    ratio, count = (logprobs - old).detach().exp(), mask.sum()
    expected = torch.where(clipped | ~mask, 0, -ratio * advantages / count)
    gap = ((slope - expected).abs().max() / slope.abs().max()).item()
    lesson.claim(
        "What a token hears from the loss is d loss / d log π = -ratio · A / N, or 0 where the ratio is clipped",
        f"{int((clipped & mask).sum())} of {int(count)} tokens clipped; largest error {gap:.1e} of the largest derivative",
        gap < 1e-5,
    )
    row = int(batch.get("scores").median(0).indices)
    places = mask[row].nonzero()[:, 0].tolist()
    tokens = [tokenizer.decode([int(batch.input_ids[row, t])]) for t in places]
    fields = (old, batch.get("old_values"), batch.get("rewards"), advantages, ratio, slope * count)
    rows = [[repr(token), *(f"{x[row, t]:+.3f}" for x in fields)] for token, t in zip(tokens, places, strict=True)]
    lesson.table("A reply of median score, after the updates of iteration 4", COLUMNS, rows)
    values, gains = fields[1][row, places].tolist(), advantages[row, places].tolist()
    lesson.picture(
        "5-tokens", lambda ax: draw_tokens(ax, tokens, values, gains),
        "A reply of median score: what the critic expects before each token, and the advantage that the token gets.",
    )  # fmt: skip
