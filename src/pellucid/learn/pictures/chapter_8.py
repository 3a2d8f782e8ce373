"""Pictures of chapter 8, drawn from the record of a run: the workflow, the schedules, the placement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pellucid.learn.measures.chapter_8 import Manifest, Phases, Schedule, Seconds, Worker

COLOURS = {"actor": "#1f77b4", "critic": "#ff7f0e", "reference": "#7f7f7f", "reward": "#2ca02c"}
PALE = {"actor": "#dbe9f6", "critic": "#ffe8d1", "reference": "#ececec", "reward": "#dcf1dc"}
HATCHES = {"actor": "", "critic": "//", "reference": "..", "reward": "xx"}
DARK = "#333333"
LABELS = {
    "generate": "actor, token by token\ngenerate",
    "score": "reward model\nscore",
    "old_logprobs": "actor\nold_logprobs",
    "ref_logprobs": "reference\nref_logprobs",
    "values": "critic\nvalues",
    "advantages": "driver\nKL, GAE",
    "update_critic": "critic\nupdate_critic",
    "update_actor": "actor\nupdate_actor",
    "sync_weights": "engine\nsync_weights",
}
SHORT = {"generate": "gen", "old_logprobs": "old", "ref_logprobs": "ref", "values": "val"}
CENTRES = {
    "generate": (0.0, 1.5),
    "old_logprobs": (3.1, 3.3),
    "score": (3.1, 2.1),
    "ref_logprobs": (3.1, 0.9),
    "values": (3.1, -0.3),
    "advantages": (6.4, 1.5),
    "update_actor": (9.7, 2.95),
    "update_critic": (9.7, 0.05),
    "sync_weights": (9.7, 4.6),
}
"""Of the workflow's boxes. Old_logprobs and values, which the updates read too, are the outer ones: no arrows cross."""
HALF = (0.87, 0.42)
"""Half the width and height of a box of the workflow."""


def draw_workflow(ax: Any, manifest: Manifest, seconds: Seconds, rate: Mapping[str, float], phases: Phases) -> None:
    """Boxes are phases, arrows the tensors that one makes and another reads, with their bytes."""
    _blank(ax, (10.6, 5.3), (-1.1, 10.8), (-1.2, 5.1))
    _group(ax, (-1.05, -0.95, 8.5, 4.8), "making the experience")
    _group(ax, (8.65, -0.95, 2.1, 4.55), "learning from it")
    _draw_flows(ax, manifest, phases)
    (x, y), (first, top) = CENTRES["sync_weights"], CENTRES["generate"]
    ax.plot([x - HALF[0] - 0.04, first], [y, y], color=DARK, linewidth=2.4, zorder=1)
    _arrow(ax, (first, y), (first, top + HALF[1] + 0.04), width=2.4)
    ax.text((x + first) / 2, y + 0.1, "the next iteration samples with the new weights", fontsize=8, ha="center")
    for phase, centre in CENTRES.items():
        milliseconds = 1e3 * seconds[phase]
        figures = f"{milliseconds:.1f} ms" if milliseconds > 0.1 else f"{milliseconds:.1g} ms"
        figures += f", {rate[phase]:,.0f} tok/s" if phase in rate else ""
        _box(ax, centre, HALF, f"{LABELS[phase]}\n{figures}", phases[phase][0], bold=phase == "generate")
    ax.set_title(f"{manifest['samples']} samples, {manifest['num_action_tokens']:,} sampled tokens", fontsize=9)


def _draw_flows(ax: Any, manifest: Manifest, phases: Phases) -> None:
    """The arrows of the tensors, each from and to a point of its own, and that of the new weights."""
    size = {tensor["name"]: tensor["bytes"] for tensor in manifest["tensors"]}
    beside, past = [], []
    for flow in _flows(manifest, phases):
        (past if flow[0] == "generate" and flow[1].startswith("update") else beside).append(flow)
    for source, target, names in beside:
        start = _port(source, [other for phase, other, _ in beside if phase == source], target, 1)
        end = _port(target, [phase for phase, other, _ in beside if other == target], source, -1)
        _arrow(ax, start, end)
        _label(ax, start, end, "\n".join(f"{name} {_bytes(size[name])}" for name in names))
    for source, target, names in past:  # an arrow would run through all the others
        x, y = CENTRES[target]
        text = f"and {source}'s " + ", ".join(f"{name} {_bytes(size[name])}" for name in names)
        ax.text(x, y - 0.64, text, fontsize=7.2, ha="center")
    actor = next(weights for weights in manifest["weights"] if weights["role"] == "actor")
    (x, bottom), (_, top) = CENTRES["update_actor"], CENTRES["sync_weights"]
    start, end = (x, bottom + HALF[1] + 0.04), (x, top - HALF[1] - 0.04)
    _arrow(ax, start, end, width=2.4)
    _label(ax, start, end, f"new weights {_bytes(actor['bytes'])}")


def _flows(manifest: Manifest, phases: Phases) -> Iterator[tuple[str, str, list[str]]]:
    """(phase that made, phase that reads, the names of the tensors)."""
    maker = {tensor["name"]: tensor["phase"] for tensor in manifest["tensors"]}
    for phase, (_, reads) in phases.items():
        for source in dict.fromkeys(maker[name] for name in reads):
            yield source, phase, [name for name in reads if maker[name] == source]


def _port(phase: str, others: list[str], other: str, side: int) -> tuple[float, float]:
    """Where the arrow to or from another phase meets the box: right (1) or left (-1), in the order of the others' heights."""
    order = sorted(others, key=lambda name: CENTRES[name][1])
    x, y = CENTRES[phase]
    return x + side * (HALF[0] + 0.04), y + 0.17 * (order.index(other) - (len(order) - 1) / 2)


def draw_schedules(
    ax: Any, charts: Mapping[str, Schedule], places: Mapping[str, Worker], model: Mapping[str, str]
) -> None:
    """charts and places: by the name of a placement. model: of each phase."""
    ax.figure.set_size_inches(10.5, 5.2)
    whole = max(end for chart in charts.values() for _, end in chart.values())
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
    top, ticks, labels = 0.0, [], []
    for name, chart in charts.items():
        worker = places[name]
        for phase, (start, end) in chart.items():
            row, role = top + worker[model[phase]], model[phase]
            style = {"color": PALE[role], "edgecolor": COLOURS[role], "hatch": HATCHES[role], "linewidth": 0.8}
            ax.barh(row, 1e3 * (end - start), left=1e3 * start, height=0.8, **style)
            if end - start > 0.03 * whole:
                text = {"ha": "center", "va": "center", "rotation": 0 if end - start > 0.12 * whole else 90}
                ax.text(500 * (start + end), row, SHORT.get(phase, phase), fontsize=7, bbox=paper, **text)
        for each in sorted(set(worker.values())):
            ticks.append(top + each)
            labels.append(f"{name}:  " + "+".join(role for role in worker if worker[role] == each))
        top += len(set(worker.values())) + 0.5
    ax.set_yticks(ticks, labels, fontsize=8)
    ax.set_ylim(top - 0.9, -0.7)
    ax.set_xlabel("time, ms (predicted from measured phases)")
    ax.set_ylabel("workers: models that live there")


def draw_placement(ax: Any, manifest: Manifest, seconds: Seconds, model: Mapping[str, str], tensors: int) -> None:
    """Sheets behind a box are its replicas or ranks. tensors: bytes that change place between the models, an iteration."""
    _blank(ax, (10.5, 5.4), (-0.4, 11.0), (-0.5, 5.3))
    _group(ax, (-0.3, 0.0, 3.0, 3.55), "rollout engines (vLLM), replicas")
    _group(ax, (4.1, 0.0, 3.1, 3.55), "trained, sharded over ranks (FSDP2, ZeRO)")
    _group(ax, (8.0, 0.0, 2.9, 3.55), "frozen, one pass")
    weights = {entry["role"]: entry["bytes"] for entry in manifest["weights"]}
    busy = dict.fromkeys(weights, 0.0) | {"engine": seconds["generate"]}
    for phase, role in model.items():
        if phase not in ("generate", "advantages"):  # the engine's and the driver's
            busy[role] += seconds[phase]
    more = {"engine": "\n+ KV cache"}  # a trained model has a gradient and Adam's two moments, each like the weights
    more |= {role: f"\n+ gradient, Adam {_bytes(3 * weights[role])}" for role in ("actor", "critic")}
    boxes = {
        "engine": ((1.15, 1.65), (1.2, 1.2), "actor"),
        "actor": ((5.6, 2.45), (1.3, 0.6), "actor"),
        "critic": ((5.6, 0.9), (1.3, 0.6), "critic"),
        "reference": ((9.45, 2.45), (1.25, 0.6), "reference"),
        "reward": ((9.45, 0.9), (1.25, 0.6), "reward"),
    }
    for name, (centre, half, role) in boxes.items():
        text = f"weights {_bytes(weights[role])}{more.get(name, '')}\nbusy {1e3 * busy[name]:.0f} ms an iteration"
        _box(ax, centre, half, f"{name}\n{text}", role, sheets=2 if name in more else 0)
    loop = f"the loop (driver): prompts in, batches between\n{_bytes(tensors)} of tensors change place, each iteration"
    _box(ax, (5.65, 4.7), (2.7, 0.42), loop, "reference")
    for start, end in (((3.7, 4.24), (1.2, 3.6)), ((5.65, 4.24), (5.65, 3.6)), ((7.6, 4.24), (9.45, 3.6))):
        _arrow(ax, start, end, both=True)
    _arrow(ax, (4.24, 2.3), (2.55, 2.3), width=5.0)
    ax.text(3.4, 2.5, f"new weights\n{_bytes(weights['actor'])}\nto each", ha="center", fontsize=8)


# -- boxes and arrows


def _blank(ax: Any, inches: tuple[float, float], x: tuple[float, float], y: tuple[float, float]) -> None:
    ax.figure.set_size_inches(*inches)
    ax.grid(False)
    ax.set_axis_off()
    ax.set(xlim=x, ylim=y)


def _box(
    ax: Any,
    centre: tuple[float, float],
    half: tuple[float, float],
    text: str,
    role: str,
    bold: bool = False,
    sheets: int = 0,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0.04", "facecolor": PALE[role], "edgecolor": COLOURS[role], "zorder": 3}
    for shift in (0.1 * i for i in range(sheets, -1, -1)):
        corner = (centre[0] - half[0] + shift, centre[1] - half[1] + shift)
        ax.add_patch(FancyBboxPatch(corner, 2 * half[0], 2 * half[1], linewidth=2.4 if bold else 1.2, **style))
    ax.text(*centre, text, ha="center", va="center", fontsize=8, zorder=4)


def _group(ax: Any, corner: tuple[float, float, float, float], title: str) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = corner
    ax.add_patch(Rectangle((x, y), width, height, fill=False, linestyle="--", edgecolor="#888888", zorder=0))
    ax.text(x + width / 2, y - 0.22, title, ha="center", fontsize=8.5)


def _arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], both: bool = False, width: float = 1.0
) -> None:
    style = {"arrowstyle": "<|-|>" if both else "-|>", "linewidth": width, "color": DARK, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style | {"mutation_scale": 10 + 3 * width}, zorder=2)


def _label(ax: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """In the middle of an arrow."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.95}
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    ax.text(*middle, text, fontsize=7.2, ha="center", va="center", zorder=5, bbox=paper)


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB" if count >= 1e3 else f"{count:.0f} B"
