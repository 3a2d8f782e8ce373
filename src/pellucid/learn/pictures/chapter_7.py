"""Pictures of chapter 7: expected gradients of the estimators, over-optimisation, coefficients fixed and adaptive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.learn.measures.chapter_7 import Run, TokenGradients


def draw_gradients(ax: Any, gradients: TokenGradients) -> None:
    tokens = range(len(gradients.forward))
    ax.bar(tokens, gradients.forward.tolist(), width=0.7, color="lightgrey", label="exact ∇KL(π‖ref)")
    square = {"marker": "s", "linestyle": "", "color": "tab:grey", "fillstyle": "none", "markersize": 10}
    ax.plot(tokens, gradients.reverse.tolist(), **square, label="exact ∇KL(ref‖π)")
    for name, marker, colour in (("k1", "x", "tab:red"), ("k2", "o", "tab:blue"), ("k3", "^", "tab:orange")):
        ax.plot(tokens, gradients.found[name].tolist(), marker, color=colour, label=f"{name} as a loss")
    ax.set(xlabel="token", ylabel="∂ / ∂ logit, nats")
    ax.legend(fontsize=8)


def draw_over_optimisation(axes: Sequence[Any], runs: Sequence[Run]) -> None:
    """Left the reward model's score, right the gold preference: of one run a line, against its distance."""
    for run, marker, colour in zip(runs, "osv^", ("tab:orange", "tab:blue", "tab:green", "tab:grey"), strict=True):
        distance = [max(point.kl, 0.0) ** 0.5 for point in run.points]
        style = {"marker": marker, "color": colour, "label": f"kl_coef {run.coef:g}"}
        axes[0].plot(distance, [point.proxy for point in run.points], **style)
        axes[1].plot(distance, [point.gold for point in run.points], **style)
    axes[0].set(xlabel="√KL, √nats", ylabel="reward model's score")
    axes[1].set(xlabel="√KL, √nats", ylabel="gold preference")
    axes[1].legend(fontsize=8)


def draw_controllers(axes: Sequence[Any], fixed: Sequence[Run], steered: Sequence[Run], target: float) -> None:
    """Left the KL, right the coefficient, by iteration. target: nats per sequence, a dotted line."""
    for runs, colour, kind in ((fixed, "tab:blue", "fixed"), (steered, "tab:orange", "adaptive")):
        for run, style in zip(runs, ("-", "--"), strict=True):
            steps = range(1, len(run.kl) + 1)
            axes[0].plot(steps, run.kl, style, color=colour, label=f"{kind}, {run.coef:g}")
            axes[1].plot(steps, run.coefs, style, color=colour)
    axes[0].axhline(target, color="black", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="iteration", ylabel="KL, nats a sequence")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="iteration", ylabel="kl_coef, reward a nat", yscale="log")
    axes[1].set_yticks([0.1, 0.2, 0.3, 0.5, 1, 2, 3], labels=["0.1", "0.2", "0.3", "0.5", "1", "2", "3"])
    axes[1].minorticks_off()
