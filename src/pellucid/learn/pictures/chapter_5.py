"""Pictures of chapter 5. ax, axes: matplotlib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw_tokens(ax: Any, tokens: Sequence[str], values: Sequence[float], advantages: Sequence[float]) -> None:
    """One reply: the value before each token as a line, the token's advantage as a bar."""
    places = range(len(tokens))
    ax.bar(places, advantages, color="tab:orange", alpha=0.7, label="advantage, whitened (standard deviations)")
    ax.plot(places, values, "o-", color="tab:blue", ms=3, label="value before the token (“you”s)")
    name_tokens(ax, tokens)
    ax.set_ylabel("value, advantage")
    ax.legend(fontsize=8)


def draw_curves(axes: Sequence[Any], carts: Sequence[float], replies: Sequence[float]) -> None:
    """One figure an iteration: CartPole's return and the replies' score."""
    panels = (("CartPole", carts, "mean return (steps)"), ("replies", replies, "mean score (“you”s a reply)"))
    for ax, (title, curve, unit) in zip(axes, panels, strict=True):
        ax.plot(range(1, len(curve) + 1), curve, "o-", color="tab:blue")
        ax.set(title=title, xlabel="iteration", ylabel=unit, ylim=(0, None))


def name_tokens(ax: Any, tokens: Sequence[str]) -> None:
    """The tokens of a reply along the x axis."""
    ax.set_xticks(range(len(tokens)), [token.strip() or "␣" for token in tokens], rotation=90, fontsize=7)
    ax.set_xlabel("token of the reply")
