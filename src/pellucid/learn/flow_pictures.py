"""Drawings of chapter 8, made from the record of a run: the workflow, the schedules, the placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"actor": "#1f77b4", "critic": "#ff7f0e", "reference": "#7f7f7f", "reward": "#2ca02c"}
PALE = {"actor": "#dbe9f6", "critic": "#ffe8d1", "reference": "#ececec", "reward": "#dcf1dc"}
HATCHES = {"actor": "", "critic": "//", "reference": "..", "reward": "xx"}
LABELS = {
    "generate": "actor, token by token\ngenerate", "score": "reward model\nscore", "old_logprobs": "actor\nold_logprobs",
    "ref_logprobs": "reference\nref_logprobs", "values": "critic\nvalues", "advantages": "driver\nKL, GAE",
    "update_actor": "actor\nupdate_actor", "update_critic": "critic\nupdate_critic", "sync_weights": "engine\nsync_weights",
}  # fmt: skip
PLACES = {
    "generate": (0.0, 1.5), "score": (2.6, 3.3), "old_logprobs": (2.6, 2.1), "ref_logprobs": (2.6, 0.9),
    "values": (2.6, -0.3), "advantages": (5.3, 1.5),
    "update_actor": (7.9, 2.7), "update_critic": (7.9, 0.3), "sync_weights": (7.9, 4.3),
}  # fmt: skip
SHORT = {"generate": "gen", "old_logprobs": "old", "ref_logprobs": "ref", "values": "val"}
HALF = (0.82, 0.42)
"""Half the width and height of a box of the workflow."""


def workflow(
    ax: Any,
    manifest: Mapping[str, Any],
    seconds: Mapping[str, float],
    rate: Mapping[str, float],
    reads: Mapping[str, Sequence[str]],
    needs: Mapping[str, str],
) -> None:
    """Boxes are phases, arrows the tensors that one makes and another reads, with their bytes."""
    _blank(ax, (11.5, 6.2), (-1.0, 9.0), (-1.1, 5.0))
    size = {tensor["name"]: tensor["bytes"] for tensor in manifest["tensors"]}
    maker = {tensor["name"]: tensor["phase"] for tensor in manifest["tensors"]}
    for phase, names in reads.items():
        for source in dict.fromkeys(maker[name] for name in names):
            if (source, phase[:6]) == ("generate", "update"):
                continue  # said below the boxes: an arrow would run through all others
            carried = "\n".join(f"{name} {_bytes(size[name])}" for name in names if maker[name] == source)
            _flow(ax, source, phase, carried)
    for phase in ("update_actor", "update_critic"):
        x, y = PLACES[phase]
        ax.text(x, y - 0.62, f"and generate's input_ids, {_bytes(size['input_ids'])}", fontsize=6.3, ha="center")
    weights = next(w for w in manifest["weights"] if w["role"] == "actor")
    _flow(ax, "update_actor", "sync_weights", f"new weights {_bytes(weights['bytes'])}")
    (x0, y0), (x1, y1) = PLACES["sync_weights"], PLACES["generate"]
    ax.plot([x0 - HALF[0] - 0.04, x1], [y0, y0], color="#333333", linewidth=2.2, zorder=1)
    _arrow(ax, (x1, y0), (x1, y1 + HALF[1] + 0.04), width=2.2)
    ax.text((x0 + x1) / 2, y0 + 0.1, "the next iteration samples with them", fontsize=7, ha="center")
    for phase, (x, y) in PLACES.items():
        figures = f"{1e3 * seconds[phase]:.1f} ms" + (f", {rate[phase]:,.0f} tok/s" if phase in rate else "")
        _box(ax, x, y, *HALF, f"{LABELS[phase]}\n{figures}", needs[phase], bold=phase == "generate")
    title = (
        f"{manifest['samples']} samples, {manifest['num_action_tokens']:,} sampled tokens; blue actor, orange critic, "
    )
    ax.set_title(title + "green reward model, grey reference", fontsize=9)


def gantt(
    ax: Any,
    charts: Mapping[str, Mapping[str, tuple[float, float]]],
    places: Mapping[str, Mapping[str, int]],
    needs: Mapping[str, str],
) -> None:
    """charts: name -> phase -> (start, end) in seconds. places: name -> model -> worker."""
    ax.figure.set_size_inches(10.5, 5.2)
    whole = max(end for chart in charts.values() for _, end in chart.values())
    top, ticks, labels = 0.0, [], []
    for name, chart in charts.items():
        worker = places[name]
        for phase, (start, end) in chart.items():
            row, model = top + worker[needs[phase]], needs[phase]
            style = {"color": PALE[model], "edgecolor": COLOURS[model], "hatch": HATCHES[model], "linewidth": 0.8}
            ax.barh(row, 1e3 * (end - start), left=1e3 * start, height=0.8, **style)
            if end - start > 0.03 * whole:
                turn = 0 if end - start > 0.12 * whole else 90
                ax.text(500 * (start + end), row, SHORT.get(phase, phase), ha="center", va="center", fontsize=6.5,
                        rotation=turn)  # fmt: skip
        for w in sorted(set(worker.values())):
            ticks.append(top + w)
            labels.append(f"{name}:  " + "+".join(m for m in worker if worker[m] == w))
        top += len(set(worker.values())) + 0.5
    ax.set_yticks(ticks, labels, fontsize=8)
    ax.set_ylim(top - 0.9, -0.7)
    ax.set_xlabel("time, ms (predicted from measured phases)")
    ax.set_ylabel("workers: models that live there")


def placement(
    ax: Any,
    weights: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    needs: Mapping[str, str],
    batch: int,
) -> None:
    """weights: role -> its entry of the manifest. batch: bytes of tensors between the models, an iteration."""
    _blank(ax, (10.5, 5.4), (-0.4, 10.3), (-0.5, 5.1))
    _group(ax, (-0.3, 0.0, 2.9, 3.4), "rollout engines (vLLM)")
    _group(ax, (3.5, 0.0, 3.3, 3.4), "trained, sharded over ranks (FSDP2, ZeRO)")
    _group(ax, (7.3, 0.0, 2.9, 3.4), "frozen, one pass")
    boxes = {
        "engine": (1.15, 1.7, "actor"), "actor": (5.15, 2.5, "actor"), "critic": (5.15, 0.95, "critic"),
        "reference": (8.75, 2.5, "reference"), "reward": (8.75, 0.95, "reward"),
    }  # fmt: skip
    for name, (x, y, role) in boxes.items():
        phases = (
            ["generate"]
            if name == "engine"
            else [p for p, m in needs.items() if m == name and p not in ("generate", "advantages")]
        )
        busy = 1e3 * sum(seconds[p] for p in phases)
        held, trained = weights[role]["bytes"], name in ("actor", "critic")
        lines = [name, f"weights {_bytes(held)}"]
        if trained:  # one gradient and Adam's two moments, each as large as the weights
            lines.append(f"+ gradient, Adam {_bytes(3 * held)}")
        elif name == "engine":
            lines.append("+ KV cache")
        lines.append(f"busy {busy:.0f} ms an iteration")
        _box(ax, x, y, 1.3, 0.62, "\n".join(lines), role, bold=False)
    _box(ax, 5.15, 4.55, 2.6, 0.42, "the loop (driver): prompts in, batches between\n"
         f"{_bytes(batch)} of tensors change place, each iteration", "reference", bold=False)  # fmt: skip
    for x in (1.15, 5.15, 8.75):
        _arrow(ax, (5.15 if x == 5.15 else 5.15 + (x - 5.15) * 0.6, 4.1), (x, 3.45), both=True)
    _arrow(ax, (3.8, 2.5), (2.5, 1.9), width=2.6)
    ax.text(3.05, 2.5, f"new weights\n{_bytes(weights['actor']['bytes'])}\nto each", ha="center", fontsize=7.5)


def _blank(ax: Any, inches: tuple[float, float], x: tuple[float, float], y: tuple[float, float]) -> None:
    ax.figure.set_size_inches(*inches)
    ax.grid(False)
    ax.set_axis_off()
    ax.set(xlim=x, ylim=y)


def _box(ax: Any, x: float, y: float, half_x: float, half_y: float, text: str, model: str, bold: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (x - half_x, y - half_y), 2 * half_x, 2 * half_y, boxstyle="round,pad=0.04", facecolor=PALE[model],
        edgecolor=COLOURS[model], linewidth=2.4 if bold else 1.2, zorder=3,
    )  # fmt: skip
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=7.8, zorder=4)


def _group(ax: Any, corner: tuple[float, float, float, float], title: str) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = corner
    ax.add_patch(Rectangle((x, y), width, height, fill=False, linestyle="--", edgecolor="#555555"))
    ax.text(x + width / 2, y - 0.25, title, ha="center", fontsize=8)


def _arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], both: bool = False, width: float = 1.0
) -> None:
    style = {"arrowstyle": "<->" if both else "-|>", "linewidth": width, "color": "#444444"}
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=2)


def _flow(ax: Any, source: str, target: str, text: str) -> None:
    """An arrow from box to box with its text; one that passes the driver bends around it."""
    (x0, y0), (x1, y1) = PLACES[source], PLACES[target]
    if x0 == x1:
        start, end, bend = (x0, y0 + HALF[1] + 0.04), (x1, y1 - HALF[1] - 0.04), 0.0
    else:
        start, end = (x0 + HALF[0] + 0.04, y0), (x1 - HALF[0] - 0.04, y1)
        bend = 0.0 if "advantages" in (source, target) or source == "generate" else -0.25 if y1 > 1.5 else 0.25
    style = {
        "arrowstyle": "-|>",
        "linewidth": 1.0,
        "color": "#777777" if bend else "#333333",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", xy=end, xytext=start, arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"}, zorder=1)
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - bend * (end[0] - start[0]) / 2)
    ax.text(*middle, text, fontsize=6.3, ha="center", va="center", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9})  # fmt: skip


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB" if count >= 1e3 else f"{count:.0f} B"
