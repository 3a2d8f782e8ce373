"""Pictures of chapter 3. ax, axes: matplotlib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pellucid.learn.measures.chapter_3 import LAMBDAS, Trade


def draw_lambda(axes: Sequence[Any], true: Tensor, learned: Tensor, trade: Trade) -> None:
    """Left the two critics (S,), right what λ makes of the learned one."""
    axes[0].plot(range(len(true)), true, "o-", color="tab:blue", label="true V of this policy")
    axes[0].plot(range(len(true)), learned, "s--", color="tab:orange", label="learned from 10 episodes")
    axes[0].set(xlabel="state (0 is next to the left exit)", ylabel="value (reward units)")
    axes[0].legend(fontsize=8)
    axes[1].plot(LAMBDAS, trade.bias, "o-", color="tab:blue", label="bias², exact")
    for episodes, style in ((10, "-"), (100, "--")):
        noise = [variance / episodes for variance in trade.variance]
        axes[1].plot(LAMBDAS, noise, style, marker="s", color="tab:orange", label=f"variance, {episodes} episodes")
        axes[1].plot(LAMBDAS, trade.error(episodes), style, color="black", lw=1, label=f"sum, {episodes} episodes")
    top = 1.6 * max(trade.bias[0], trade.variance[-1] / 10)
    axes[1].set(xlabel="λ", ylabel="share of the squared gradient", ylim=(0, top))
    axes[1].legend(fontsize=8, ncols=2, loc="upper center")


def draw_noise(ax: Any, noise: dict[str, float]) -> None:
    """noise: weight -> variance; the first one is what the others are shares of."""
    variances = list(noise.values())
    colours = ["tab:orange"] + (len(noise) - 1) * ["tab:blue"]
    ax.barh(list(noise), [variance / variances[0] for variance in variances], color=colours)
    ax.invert_yaxis()
    ax.set(xlabel="variance of one episode's gradient (share of reward-to-go's)", xlim=(0, 1.05))


def draw_learning(ax: Any, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    """A curve of (environment steps, return) for each of three runs."""
    for i, (curve, style) in enumerate(zip(curves, ("-", "--", ":"), strict=True)):
        ax.plot(*zip(*curve, strict=True), style, color="tab:blue", label=f"seed {i}")
    ax.set(xlabel="environment steps", ylabel="return (mean of the last 20 episodes)", ylim=(0, 510))
    ax.legend()
