"""Pictures of chapter 6. ax: matplotlib's axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.learn.pictures.chapter_5 import name_tokens

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.4"


def draw_accuracy(ax: Any, right: dict[int, list[float]]) -> None:
    """right: pairs -> the agreement of each model."""
    sizes = list(right)
    ax.plot(sizes, [sum(v) / len(v) for v in right.values()], "-", color=BLUE, label="mean")
    for size, values in right.items():
        ax.plot([size] * len(values), values, "o", color=ORANGE, label="one model" if size == sizes[0] else None)
    ax.axhline(0.5, color=GREY, ls=":", label="guessing")
    ax.set(
        xscale="log",
        xlabel="pairs learned from",
        ylabel="agreement with gold (share of held-out pairs)",
        ylim=(0.45, 1),
    )
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.legend()


def draw_scale(ax: Any, paths: dict[float, list[float]]) -> None:
    """paths: share of swapped labels -> chosen - rejected after each update."""
    for (swapped, path), style in zip(paths.items(), ("-", "--", "-."), strict=True):
        ax.plot(range(1, len(path) + 1), path, style, label=f"{swapped:.0%} of the labels swapped")
    ax.set(xscale="log", xlabel="updates", ylabel="chosen - rejected (nats of log-odds)")
    ax.legend()


def draw_values(
    ax: Any, tokens: Sequence[str], before: Sequence[float], after: Sequence[float], truth: Sequence[float]
) -> None:
    """One reply, at every second token: what two critics say, and what continuations from there get."""
    places = range(len(tokens))
    ax.plot(places, truth, "s-", color="black", ms=4, label="mean score of continuations")
    ax.plot(places, after, "o--", color=BLUE, ms=4, label="trained critic")
    ax.plot(places, before, "^:", color=ORANGE, ms=4, label="reward model, read early")
    name_tokens(ax, tokens)
    ax.set_ylabel("value before these tokens (reward units)")
    ax.legend(fontsize=8)


def draw_credit(ax: Any, before: Sequence[float], after: Sequence[float]) -> None:
    """Shares of the squared TD errors in the quarters of tokens by entropy, highest first."""
    for offset, shares, color, hatch, label in (
        (-0.2, before, ORANGE, "//", "before training"), (0.2, after, BLUE, None, "trained critic"),
    ):  # fmt: skip
        ax.bar([k + offset for k in range(4)], shares, width=0.38, color=color, hatch=hatch, alpha=0.8, label=label)
    ax.axhline(0.25, color=GREY, ls=":", label="evenly spread")
    ax.set_xticks(range(4), ["highest", "second", "third", "lowest"])
    ax.set(xlabel="quarter of the tokens, by the policy's entropy there", ylabel="share of the squared TD errors")
    ax.legend()
