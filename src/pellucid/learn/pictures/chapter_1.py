"""Pictures of chapter 1. axes: matplotlib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.learn.measures.chapter_1 import Episodes


def draw_returns(axes: Sequence[Any], runs: dict[str, Episodes]) -> None:
    """Left the beginning of one episode under each policy, right the returns of all."""
    for (name, run), color, style in zip(runs.items(), ("tab:orange", "tab:blue"), "-:", strict=True):
        angle = run.rollout.batch.get("observations")[0, run.first[0], 2].rad2deg()
        axes[0].plot(angle, style, color=color, label=name)
        axes[1].hist(run.returns, bins=range(0, 521, 20), color=color, alpha=0.75, label=name)
    axes[0].axhline(12, color="gray", lw=0.8, ls="--")
    axes[0].axhline(-12, color="gray", lw=0.8, ls="--", label="here it has fallen")
    axes[0].set(xlim=(0, 80), ylim=(-13, 13), xlabel="step (0.02 s each)", ylabel="angle of the pole (degrees)")
    axes[1].set(xlabel="return of an episode (sum of rewards)", ylabel=f"episodes of {len(run.first)}")
    axes[0].legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    axes[1].legend(loc="upper center")
