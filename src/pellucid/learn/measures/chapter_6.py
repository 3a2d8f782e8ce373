"""What chapter 6 measures, and claims: how right a reward model is, what its loss determines, what a critic knows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.core import bradley_terry, explained_variance
from pellucid.learn.lesson import Lesson
from pellucid.learn.pictures.chapter_6 import draw_accuracy, draw_credit, draw_scale, draw_values
from pellucid.learn.small_writer import Writer
from pellucid.models import CausalLM
from pellucid.rollout import EmbeddedEngine
from pellucid.types import Batch, Prompt, Sample

CONTINUATIONS = 32
"""Replies drawn from one prefix, to measure its value without a critic."""


# ---------------------------------------------------------------- pairs


def show_agreement(lesson: Lesson, gaps: dict[tuple[int, int], Tensor], updates: int) -> None:
    """gaps: (pairs learned from, number of the model) -> chosen - rejected, (P,), on held-out pairs."""
    sizes = sorted({size for size, _ in gaps})
    of = {size: [gap for (pairs, _), gap in gaps.items() if pairs == size] for size in sizes}
    right = {size: [(gap > 0).float().mean().item() for gap in of[size]] for size in sizes}
    width = {size: sum(gap.abs().mean().item() for gap in of[size]) / len(of[size]) for size in sizes}
    mean = {size: sum(values) / len(values) for size, values in right.items()}
    few, many = sizes[0], sizes[-1]
    lesson.table(
        f"After {updates} updates, on {len(of[few][0])} held-out pairs without noise",
        ("pairs", "agreement with gold", "mean |chosen - rejected|"),
        [(size, mean[size], width[size]) for size in sizes],
    )
    lesson.picture("6-pairs", partial(draw_accuracy, right=right), "Agreement with the hidden preference.")
    lesson.claim(
        "More pairs, better agreement with the gold preference on pairs of prompts that no training saw",
        f"{mean[few]:.1%} with {few} pairs, {mean[many]:.1%} with {many:,}",
        mean[many] > mean[few] + 0.1 and mean[few] > 0.5,
    )
    lesson.claim(
        "Scores far apart are no sign of a good model: learned by heart, few pairs spread the scores more than many do",
        f"held-out scores lie {width[few]:.1f} apart after {few} pairs, {width[many]:.1f} after {many:,}",
        width[few] > width[many] and mean[few] < mean[many],
    )


# ---------------------------------------------------------------- what the loss determines


def fit(swapped: float, updates: int) -> list[float]:
    """Two replies, and labels of which a share is swapped: chosen - rejected after each update, at learning rate 1."""
    gap, path = torch.zeros(1, requires_grad=True), []
    for _ in range(updates):
        loss = (1 - swapped) * bradley_terry(gap, 0 * gap) + swapped * bradley_terry(0 * gap, gap)
        (slope,) = torch.autograd.grad(loss.sum(), gap)
        gap = (gap.detach() - slope).requires_grad_()
        path.append(gap.item())
    return path


def show_zero(lesson: Lesson, chosen: Tensor, rejected: Tensor) -> None:
    """What changes no loss. chosen, rejected: (P,), the scores of pairs, a prompt each."""
    by_prompt = 5 * torch.randn(len(chosen), generator=torch.Generator().manual_seed(lesson.seed))
    losses = [
        bradley_terry(chosen + c, rejected + c).mean().item()
        for c in (torch.zeros(1), torch.full((1,), 7.0), by_prompt)
    ]
    gap = max(losses) - min(losses)
    lesson.claim(
        "Only differences count: a constant on all scores changes no loss, nor does a constant for each prompt",
        f"loss {losses[0]:.4f}; with 7 on all scores, and with another number for each prompt, {gap:.1e} apart",
        gap < 1e-5,
    )


def show_scale(lesson: Lesson) -> None:
    """What settles how far apart scores lie."""
    paths = {swapped: fit(swapped, 3000) for swapped in (0.0, 0.1, 0.3)}
    odds = torch.tensor(9.0).log().item()
    lesson.picture("6-scale", partial(draw_scale, paths=paths), "What sets the scale: the share of swapped labels.")
    lesson.claim(
        "The scale is that of odds: where a tenth of the labels is swapped, the best gap is log(0.9 / 0.1)",
        f"{paths[0.1][-1]:.4f} against {odds:.4f}",
        abs(paths[0.1][-1] - odds) < 1e-3,
    )
    lesson.claim(
        "Without noise there is no best gap: it grows for as long as one trains",
        f"{paths[0.0][29]:.1f} after 30 updates, {paths[0.0][299]:.1f} after 300, {paths[0.0][2999]:.1f} after 3,000",
        paths[0.0][2999] > paths[0.0][299] + 1 > paths[0.0][29] + 2,
    )


# ---------------------------------------------------------------- credit


def show_terminal_reward(lesson: Lesson, batch: Batch) -> None:
    """batch: the replies whose mean score the shift has made 0."""
    scores, rewards = batch.get("scores"), batch.get("rewards")
    lesson.claim(
        "After the shift the policy's replies score 0 on average; a score is one reward, on the last token, and 0 before",
        f"mean {scores.mean().abs():.1e}, standard deviation {scores.std():.2f}, {int((rewards != 0).sum())} rewards "
        f"for {len(batch)} replies of {int(batch.action_mask.sum())} tokens",
        scores.mean().abs().item() < 1e-4
        and torch.equal(rewards[batch.ended], scores)
        and not rewards[~batch.ended].any(),
    )


def show_values(lesson: Lesson, batch: Batch, before: Tensor, after: Tensor) -> None:
    """How much of the score the critic knows, in each fifth of a reply."""
    mask, returns = batch.action_mask, batch.get("returns")
    fifth = (5 * (mask.cumsum(1) - 1) / mask.sum(1, keepdim=True)).long()
    parts = [mask & (fifth == k) for k in range(5)]
    knows = [[explained_variance(v, returns, part).item() for part in parts] for v in (before, after)]
    lesson.table(
        "Explained variance of the scores of held-out replies", ("part of the reply", "reward model", "trained critic"),
        [(f"fifth {k + 1}", knows[0][k], knows[1][k]) for k in range(5)],
    )  # fmt: skip
    whole = [explained_variance(v, returns, mask).item() for v in (before, after)]
    lesson.claim(
        "A reward model is no value function: read before a reply's end it predicts the score worse than a constant would, "
        "until it is trained as a critic",
        f"explained variance {whole[0]:.2f} before, {whole[1]:.2f} after", whole[0] < 0 < whole[1],
    )  # fmt: skip
    lesson.claim(
        "The critic knows more, the more of the reply it has seen",
        "explained variance " + ", ".join(f"{share:.2f}" for share in knows[1]) + " in the fifths of a reply",
        knows[1] == sorted(knows[1]) and knows[1][0] > 0,
    )


@torch.no_grad()
def entropies(policy: CausalLM, batch: Batch) -> Tensor:
    """Of the policy before each token: (B,T), in nats."""
    _, entropy = policy.logprobs_of(batch, 1.0, entropy=True)
    assert entropy is not None
    return entropy


def show_deltas(
    lesson: Lesson, batch: Batch, values: Sequence[Tensor], deltas: Sequence[Tensor], entropy: Tensor
) -> None:
    """values, deltas: of two critics, before training and after, and their TD errors. entropy: (B,T), the policy's."""
    mask, scores = batch.action_mask, batch.get("scores")
    first = mask & (mask.cumsum(1) == 1)
    gap = max((d.sum(1) - (scores - v[first])).abs().max().item() for d, v in zip(deltas, values, strict=True))
    lesson.claim(
        "The TD errors of a reply add up to its score minus the value of its prompt, whatever the critic says in between",
        f"largest difference {gap:.1e}, over {len(batch)} replies", gap < 1e-4,
    )  # fmt: skip
    quarters = entropy[mask].argsort(descending=True).tensor_split(4)
    shares = [[(d[mask][q].square().sum() / d[mask].square().sum()).item() for q in quarters] for d in deltas]
    lesson.picture("6-credit", lambda ax: draw_credit(ax, *shares), "Where the squared TD errors are.")
    lesson.claim(
        "Credit goes to the tokens that decide: where the policy was undecided the critic's expectation moves most",
        f"of the squared TD errors {shares[1][0]:.0%} lie on the quarter of tokens with the highest entropy, "
        f"{shares[1][3]:.0%} on the quarter with the lowest (before training {shares[0][0]:.0%} and {shares[0][3]:.0%})",
        shares[1][0] > 0.25 > shares[1][3],
    )


class Prefixes(NamedTuple):
    """n prefixes of replies. rows, columns: the reply that each is of, and where it ends. texts: the tokens that follow."""

    rows: list[int]
    columns: list[int]
    texts: list[str]


def go_on(engine: EmbeddedEngine, writer: Writer, samples: list[Sample]) -> tuple[Prefixes, list[Sample]]:
    """Every second prefix of six replies, and CONTINUATIONS replies from each: a value, measured without a critic, as a
    language model can be started again from wherever it has been."""
    rows = [i for i, s in enumerate(samples) if s.stop_reason == "stop" and 18 < len(s.response_ids) < 40][:6]
    places = [(i, t) for i in rows for t in range(len(samples[i].prompt.input_ids), len(samples[i].input_ids), 2)]
    texts = [writer.tokenizer.decode(samples[i].input_ids[t : t + 2]) for i, t in places]
    starts = [Prompt(n, samples[i].input_ids[:t], "") for n, (i, t) in enumerate(places)]
    drawn = engine.generate(starts, writer.params("continuations", samples_per_prompt=CONTINUATIONS))
    return Prefixes([i for i, _ in places], [t for _, t in places], texts), drawn


def show_continuations(lesson: Lesson, prefixes: Prefixes, scores: Tensor, before: Tensor, after: Tensor) -> None:
    """scores: of the replies that `go_on` drew, (n * CONTINUATIONS,). before, after: (B,T), the values of two critics."""
    rows, columns, texts = prefixes
    truth = scores.view(len(rows), -1).mean(1)
    before, after = before[rows, columns], after[rows, columns]
    fit_before, fit_after = (torch.corrcoef(torch.stack([truth, v]))[0, 1].item() for v in (before, after))
    lesson.claim(
        "What the critic says of a prefix is what replies from there get",
        f"correlation with the mean score of continuations, over {len(truth)} prefixes: {fit_after:.2f}; "
        f"of the reward model {fit_before:.2f}",
        fit_after > max(fit_before, 0.7),
    )
    of = {row: [n for n, r in enumerate(rows) if r == row] for row in rows}
    here = max(of.values(), key=lambda places: (truth[places].max() - truth[places].min()).item())
    curves = [series[here].tolist() for series in (before, after, truth)]
    lesson.picture(
        "6-values", lambda ax: draw_values(ax, [texts[n] for n in here], *curves),
        f"One held-out reply: of {len(of)}, the one whose value changes most.",
    )  # fmt: skip
