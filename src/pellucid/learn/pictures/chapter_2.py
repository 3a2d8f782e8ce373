"""Pictures of chapter 2. ax: matplotlib's axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw_estimates(ax: Any, guesses: dict[str, Tensor], exact: Tensor) -> None:
    """guesses: weight -> (n,S*A), estimates of the gradient. exact: (S,A), the gradient. One component of them is shown."""
    edges = [i / 20 - 2 for i in range(81)]
    looks = zip(guesses.items(), ("tab:orange", "tab:green", "tab:blue"), ("-", "--", ":"), strict=True)
    for (name, guess), color, style in looks:
        ax.hist(guess[:, 1], bins=edges, histtype="step", lw=1.6, color=color, ls=style, label=name)
    ax.axvline(exact[0, 1].item(), color="black", lw=1, label="exactly")
    count = max(len(guess) for guess in guesses.values())
    ax.set(xlabel="gradient for the logit of (cool, fast), reward units", ylabel=f"estimates of {count:,}")
    ax.legend(fontsize=8)


def draw_learning(ax: Any, curves: dict[str, list[list[float]]], episodes: int) -> None:
    """curves: weight -> for each run the mean return of each update's episodes."""
    for (name, runs), color, style in zip(curves.items(), ("tab:blue", "tab:orange"), ("-", "--"), strict=True):
        by_update, updates = torch.tensor(runs), range(1, len(runs[0]) + 1)
        ax.fill_between(updates, by_update.amin(0), by_update.amax(0), color=color, alpha=0.15, lw=0)
        ax.plot(updates, by_update.median(0).values, style, color=color, label=name)
    ax.set(xlabel=f"update ({episodes} episodes each)", ylabel="mean return (steps)", ylim=(0, 510))
    ax.legend(title=f"weights; median and range of {len(runs)} runs")
