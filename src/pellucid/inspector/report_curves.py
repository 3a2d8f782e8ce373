"""The report's curves: which there are, and how they are drawn. One list of points in, one picture out.

SVG goes into the page, in colours that the page's style sheet sets; PNG goes beside Markdown, on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pellucid.inspector.report_read import Points
from pellucid.inspector.report_terms import METRICS
from pellucid.inspector.report_text import figure as figure_text

FEW = 60
"""Up to so many points each is marked, and lines are dashed."""
MOST_POINTS = 600
"""Points of one line; longer ones are drawn by buckets of consecutive steps."""
COLOURS = ("#0072b2", "#d55e00", "#008f68", "#a8478f", "#8f7000", "#3f97d8", "#c2483c", "#5b6770", "#9aa3ab")
"""Blue, vermilion, green, purple and so on: told apart with each kind of colour blindness."""
INK = "#454b52"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
DARK_COLOURS = ("#5cb3ec", "#f08a48", "#3cc79b", "#dd8fca", "#d1b13f", "#9ccdf2", "#ee8f88", "#a3adb6", "#6d757d")
DARK_INK = "#b9c0c7"
PHASE = re.compile(r"time/[A-Za-z0-9_.-]{1,40}")
WIDTH, PANEL_HEIGHT = 4.6, 2.35
"""Inches, at 72 points each: on a narrow screen about its real size."""
STYLE = {
    "svg.hashsalt": "pellucid",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
}


class Curve(NamedTuple):
    """panels: one above the other, each the metrics of one axis. over: their x-axes, where it is not the step."""

    name: str
    title: str
    meaning: str
    panels: tuple[tuple[str, ...], ...]
    over: tuple[tuple[str, ...], ...] = ()


CURVES = {
    "ppo": (
        Curve("score", "Score", "What is trained on, and what a judge that is never trained on says of held-out texts.",
              (("score/mean", "eval/score"), ("eval/judge",))),
        Curve("kl", "KL per sequence", "Distance from the reference policy, summed over a response.",
              (("kl/sequence", "eval/kl"),)),
        Curve("proxy", "Proxy against KL", "What the distance from the reference buys. A score that rises while the judge "
              "falls is over-optimisation.", (("score/mean", "eval/score"), ("eval/judge",)),
              (("kl/sequence", "eval/kl"), ("eval/kl",))),
        Curve("entropy", "Entropy", "Of the next-token distribution, mean over the sampled tokens.", (("policy/entropy",),)),
        Curve("length", "Response length", "Mean number of sampled tokens.", (("rollout/length", "eval/length"),)),
        Curve("clip_fraction", "Clip fraction", "Tokens whose gradient a clip bound removed.",
              (("actor/clip_fraction", "critic/clip_fraction"),)),
        Curve("explained_variance", "Explained variance", "Of the returns, by the critic; below 0 is worse than a constant.",
              (("critic/explained_variance",),)),
        Curve("value_loss", "Value loss", "Of the critic, mean over minibatches.", (("critic/value_loss",),)),
        Curve("lr", "Learning rate", "Mean over the updates of a step.", (("actor/lr", "critic/lr"),)),
    ),
    "sft": (
        Curve("nll", "Negative log-likelihood", "Of the learned tokens.", (("train/nll", "eval/nll"),)),
        Curve("grad_norm", "Gradient norm", "Global L2 norm before clipping.", (("optimizer/grad_norm",),)),
        Curve("lr", "Learning rate", "Warm-up, then linear to 0.", (("optimizer/lr",),)),
    ),
    "rm": (
        Curve("pair_loss", "Pair loss", "-log σ(chosen - rejected); a coin's is 0.69.",
              (("train/pair_loss", "eval/pair_loss"),)),
        Curve("accuracy", "Accuracy", "Pairs with chosen above rejected.", (("train/accuracy", "eval/accuracy"),)),
        Curve("margin", "Margin", "Mean of chosen - rejected.", (("train/margin", "eval/margin"),)),
        Curve("grad_norm", "Gradient norm", "Global L2 norm before clipping.", (("optimizer/grad_norm",),)),
        Curve("lr", "Learning rate", "Warm-up, then linear to 0.", (("optimizer/lr",),)),
    ),
}  # fmt: skip
UNITS = {"eval/length": "tokens", "actor/lr": "per update", "critic/lr": "per update", "optimizer/lr": "per update"}


class Drawing(NamedTuple):
    """A curve as drawn. alt: what it shows, in words; metrics: the names that it was drawn from; note: how it was thinned."""

    name: str
    title: str
    meaning: str
    alt: str
    metrics: tuple[str, ...]
    note: str
    svg: Markup
    png: bytes


def draw_all(kind: str, prefix: str, points: Points, png: bool) -> list[Drawing]:
    """Every curve of this kind of run that has points. prefix: makes names and ids unique in a page. png: else SVG."""
    drawings = [_draw_curve(curve, prefix, points, png) for curve in CURVES.get(kind, ())]
    return [drawing for drawing in [*drawings, _draw_seconds(prefix, points, png)] if drawing]


def buckets(values: Sequence[float], most: int = MOST_POINTS) -> list[np.ndarray]:
    """The values in order, cut into at most `most` runs of the same length (the last may be shorter)."""
    size = math.ceil(len(values) / most)
    array = np.asarray(values, dtype=np.float64)
    return [array[at : at + size] for at in range(0, len(array), max(size, 1))]


# ---------------------------------------------------------------- one picture each


def _draw_curve(curve: Curve, prefix: str, points: Points, png: bool) -> Drawing | None:
    kept = []
    for index, panel in enumerate(curve.panels):
        over = curve.over[index] if curve.over else ("",) * len(panel)
        lines = [(y, x, _joined(points, y, x)) for y, x in zip(panel, over, strict=True)]
        kept.append([line for line in lines if line[2]])
    kept = [lines for lines in kept if lines]
    if not kept:
        return None

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
        many = sum(map(len, kept)) > 1
        for axes, lines in zip(panels, kept, strict=True):
            first = 0 if axes is panels[0] else len(kept[0])
            for number, (y, x, rows) in enumerate(lines, first):
                _line(axes, rows, number, f"{y} over {x}" if x else y)
            axes.set_ylabel(_unit(lines[0][0]))
            _finish(axes, many)
        panels[-1].set_xlabel("nats per sequence" if curve.over else "step")
        if not curve.over:
            panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))

    flat = [line for lines in kept for line in lines]
    names = tuple(dict.fromkeys(name for y, x, _ in flat for name in (y, x) if name))
    alt = "; ".join(f"{y}{f' over {x}' if x else ''} {_span(rows)}" for y, x, rows in flat)
    how = "means" if curve.over else "line: mean, band: lowest to highest"
    note = _note(max(len(rows) for _, _, rows in flat), how)
    picture = _render(paint, len(kept), f"{prefix}{curve.name}", f"{curve.title}: {alt}", png)
    return Drawing(f"{prefix}{curve.name}", curve.title, curve.meaning, alt, names, note, *picture)


def _draw_seconds(prefix: str, points: Points, png: bool) -> Drawing | None:
    """Stacked seconds of a step by phase; phases below a hundredth of the whole, or beyond the colours, are one."""
    names = [name for name in points if PHASE.fullmatch(name)]
    steps = sorted({step for name in names for step, _ in points[name]})
    if not steps:
        return None
    seconds = {name: dict(points[name]) for name in names}
    totals = {name: sum(found.values()) for name, found in seconds.items()}
    largest = sorted(names, key=lambda name: -totals[name])[: len(COLOURS) - 1]
    large = [name for name in names if name in largest and totals[name] >= 0.01 * sum(totals.values())]
    rows = {name: [seconds[name].get(step, 0.0) for step in steps] for name in large}
    small = [name for name in names if name not in large]
    if small:
        rows["others"] = [sum(seconds[name].get(step, 0.0) for name in small) for step in steps]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        x = [part.mean() for part in buckets(steps)]
        heights = [[part.mean() for part in buckets(row)] for row in rows.values()]
        if len(x) > FEW:
            axes.stackplot(x, heights, labels=list(rows), colors=COLOURS, linewidth=0)
        else:  # an area between so few steps would suggest values in between
            bottom = np.zeros(len(x))
            for height, name, colour in zip(heights, rows, COLOURS, strict=False):
                axes.bar(x, height, 0.8, bottom=bottom, label=name, color=colour, linewidth=0)
                bottom = bottom + np.asarray(height)
        axes.set_ylabel("s per step")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        _finish(axes, len(rows) > 1)

    title, meaning = ("Seconds per step", "Wall time of a step, evaluation included.")
    if len(names) > 1:
        title, meaning = "Seconds per phase", "Wall time of a step by phase."
    meaning = f"{meaning[:-1]}; others: {', '.join(small)}." if small else meaning
    means = [f"{name} {figure_text(sum(row) / len(steps))} s" for name, row in rows.items()]
    alt = f"{', '.join(means)} a step on average"
    picture = _render(paint, 1.3 if len(rows) > 1 else 1, f"{prefix}seconds", f"{title}: {alt}", png)
    return Drawing(f"{prefix}seconds", title, meaning, alt, tuple(names), _note(len(steps), "means"), *picture)


def _joined(points: Points, y: str, x: str) -> list[tuple[float, float]]:
    """(x, y) of every step that has both; x is the step itself where none is named."""
    if not x:
        return [(float(step), value) for step, value in points.get(y, [])]
    over = dict(points.get(x, []))
    return [(over[step], value) for step, value in points.get(y, []) if step in over]


def _line(axes: Axes, rows: list[tuple[float, float]], number: int, label: str) -> None:
    xs, ys = buckets([x for x, _ in rows]), buckets([y for _, y in rows])
    x, y = [part.mean() for part in xs], [part.mean() for part in ys]
    colour = COLOURS[number % len(COLOURS)]
    few, over = len(rows) <= FEW, " over " in label
    if few:
        axes.plot(
            x, y, color=colour, linestyle=DASHES[number % 4], marker="os^D"[number % 4], markersize=3.5, label=label
        )
    elif over:  # a line through so many points would be a scribble
        axes.plot(x, y, color=colour, linestyle="none", marker=".", markersize=2.5, label=label)
    else:  # dashes would drown in the noise
        axes.plot(x, y, color=colour, linewidth=1.1, label=label)
    if len(rows) > len(ys) and not over:
        low, high = [part.min() for part in ys], [part.max() for part in ys]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Axes, legend: bool) -> None:
    axes.grid(True, color=INK, alpha=0.18, linewidth=0.6)
    axes.set_axisbelow(True)
    if legend:
        columns = 2 if len(axes.get_legend_handles_labels()[1]) > 1 else 1
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(**where, ncols=columns, frameon=False, fontsize=8)


def _unit(metric: str) -> str:
    return UNITS.get(metric) or (METRICS[metric].unit if metric in METRICS else "")


def _span(rows: list[tuple[float, float]]) -> str:
    return f"from {figure_text(rows[0][1])} to {figure_text(rows[-1][1])} in {len(rows)} points"


def _note(count: int, what: str) -> str:
    size = math.ceil(count / MOST_POINTS)
    return f"{count:,} steps drawn in buckets of {size} ({what})." if size > 1 else ""


# ---------------------------------------------------------------- figure to bytes


def _render(paint: Callable[[Figure], None], panels: float, name: str, alt: str, png: bool) -> tuple[Markup, bytes]:
    """(SVG, b"") or ("", PNG). panels: the height, in panels. The same input gives the same bytes: no dates, no versions."""
    output, none = io.BytesIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    height = 0.4 + PANEL_HEIGHT * (panels if panels < 2 else 0.85 * panels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        if png:
            figure.savefig(output, format="png", dpi=160, facecolor="white", metadata={"Software": None})
            return Markup(""), output.getvalue()
        figure.savefig(output, format="svg", transparent=True, metadata=none)
    return _inline(output.getvalue().decode(), name, alt), b""


def _inline(svg: str, name: str, alt: str) -> Markup:
    """The <svg> element alone, its ids made the page's only ones and its colours the style sheet's."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{number})")
    svg = svg.replace(INK, "var(--ink)")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def palette(dark: bool) -> dict[str, str]:
    """The colours that SVG refers to, by the name of the style sheet's variable."""
    colours, ink = (DARK_COLOURS, DARK_INK) if dark else (COLOURS, INK)
    return {f"c{number}": colour for number, colour in enumerate(colours)} | {"ink": ink}
