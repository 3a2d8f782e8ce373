"""What chapter 6 measures on a critic, before and after it has learned: what it knows, and which tokens get the credit."""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.core import explained_variance, gae
from pellucid.learn.language_pictures import draw_credit, draw_values
from pellucid.learn.lesson import Lesson
from pellucid.types import Batch


def measure_values(lesson: Lesson, batch: Batch, before: Tensor, after: Tensor) -> None:
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


def measure_deltas(lesson: Lesson, batch: Batch, before: Tensor, after: Tensor, entropy: Tensor) -> None:
    """δ_t = r_t + V_{t+1} - V_t, which is `gae` with λ = 0: what each token adds to what is expected."""
    mask, scores = batch.action_mask, batch.get("scores")
    deltas = [
        gae(batch.get("rewards"), v, mask, batch.ended, batch.bootstrap_values, gamma=1.0, lam=0.0)[0]
        for v in (before, after)
    ]
    first = mask & (mask.cumsum(1) == 1)
    gap = max((d.sum(1) - (scores - v[first])).abs().max().item() for d, v in zip(deltas, (before, after), strict=True))
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


def measure_against_continuations(
    lesson: Lesson, texts: list[str], rows: list[int], truth: Tensor, before: Tensor, after: Tensor
) -> None:
    """truth, before, after: (n,), of n prefixes: the mean score of replies that go on from there, and what two critics say.
    texts: the tokens that follow each. rows: the reply that each prefix is of."""
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
