"""Pictures of chapter 4. ax, axes: matplotlib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pellucid.learn.measures.chapter_4 import Reuse, Runs

COLOURS = {"PPO": "tab:blue", "no clip": "tab:orange", "no ratio": "tab:green"}
STYLES = {"PPO": "o-", "no clip": "s--", "no ratio": "^:"}


def draw_importance(ax: Any, kl: Tensor, second: Tensor) -> None:
    """Over the distances: kl per action, second: E[ratio²] of one action."""
    for length, style in ((1, "o-"), (5, "s--"), (50, "^:")):
        ax.plot(kl, second**length, style, ms=4, label=f"{length} action{'s' * (length > 1)}")
    ax.set(xlabel="KL(old ‖ new) per action (nats)", ylabel="1 + variance of the ratio", yscale="log", ylim=(0.8, 1e8))
    ax.legend()


def draw_clip(axes: Sequence[Any], ratio: Tensor, losses: dict[float, Tensor], clip: float) -> None:
    """losses: advantage, 1 and -1 -> the clipped loss at each ratio."""
    for ax, (sign, loss) in zip(axes, losses.items(), strict=True):
        ax.plot(ratio, -ratio * sign, "--", color="tab:gray", label="-ratio · A")
        ax.plot(ratio, -ratio.clamp(1 - clip, 1 + clip) * sign, ":", color="tab:orange", lw=2, label="-clip(ratio) · A")
        ax.plot(ratio, loss, color="tab:blue", label="the larger of the two: the loss")
        ax.set(title=f"A = {sign:+.0f}", xlabel="ratio", ylabel="loss", xlim=(0, 2))
        ax.set_ylim((-2.05, 0.05) if sign > 0 else (-0.05, 2.05))
        ax.legend(fontsize=8)


def draw_passes(axes: Sequence[Any], passes: Sequence[int], reuse: dict[str, Reuse]) -> None:
    """For each loss: left the KL, right the return."""
    for name, found in reuse.items():
        axes[0].plot(passes[1:], found.kl[1:], STYLES[name], color=COLOURS[name], label=name)
        axes[1].plot(passes, found.returns, STYLES[name], color=COLOURS[name], label=name)
    axes[0].set(xlabel="passes over one sample", ylabel="KL(old ‖ now) (nats)", yscale="log")
    axes[1].set(xlabel="passes over one sample", ylabel="true return (steps)", ylim=(0, 510))
    for ax in axes:
        ax.legend()


def draw_training(ax: Any, runs: dict[str, Runs]) -> None:
    """Every run of each loss."""
    for name, found in runs.items():
        _draw_runs(ax, found, name, ls=STYLES[name][1:], color=COLOURS[name], lw=1.3)
    _label_curves(ax)


def draw_race(ax: Any, actor_critic: Runs, ppo: Runs) -> None:
    """Every run of both, each at its best rate, and the goal."""
    _draw_runs(ax, actor_critic, f"actor-critic, rate {actor_critic.rate:g}", ls="--", color="tab:orange", lw=1.2)
    _draw_runs(ax, ppo, f"PPO, rate {ppo.rate:g}", ls="-", color="tab:blue", lw=1.2)
    ax.axhline(475, color="tab:gray", lw=1)
    _label_curves(ax)


def _draw_runs(ax: Any, runs: Runs, label: str, **style: Any) -> None:
    for i, curve in enumerate(runs.curves):
        ax.plot(*zip(*curve, strict=True), label=None if i else label, **style)


def _label_curves(ax: Any) -> None:
    ax.set(xlabel="environment steps", ylabel="return (mean of the last 20 episodes)", ylim=(0, 510))
    ax.legend()
