"""What comes of the runs: ratios, bars, and the JSON of a result."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Outcome, Run


def speedups(fast: list[Run], slow: list[Run], per_token: bool = True) -> list[float]:
    """How many times faster, round by round. per_token compares tokens per second, else plain seconds."""
    pairs = zip(fast, slow, strict=True)
    if per_token:
        return [(f["tokens"] / f["seconds"]) / (s["tokens"] / s["seconds"]) for f, s in pairs]
    return [s["seconds"] / f["seconds"] for f, s in pairs]


def bar(
    name: str, values: Sequence[float] | float | None, bound: float, at_least: bool = True, why: str = ""
) -> dict[str, Any]:
    """One bar of a benchmark: the median of `values` against `bound`.

    values: one a round; or a single figure; or None where it could not be measured, and then `why` says so.
    """
    listed = [] if values is None else [values] if isinstance(values, (int, float)) else list(values)
    made: dict[str, Any] = {"name": name, "value": None, "bar": bound, "at_least": at_least, "holds": None}
    if not listed:
        return {**made, "why": why or "not measured"}
    value = statistics.median(listed)
    made |= {"value": round(value, 4), "holds": value >= bound if at_least else value <= bound}
    return made | {"min": round(min(listed), 4), "max": round(max(listed), 4)}


def speedup_bar(name: str, outcome: Outcome, peer: str, bound: float, per_token: bool = True) -> dict[str, Any]:
    """The bar "pellucid is at least `bound` times as fast as peer", or why it could not be measured."""
    if peer in outcome.failures:
        return bar(name, None, bound, why=f"{peer} could not run: {outcome.failures[peer]}")
    if not outcome.runs.get(peer):
        return bar(name, None, bound, why=f"{peer} was not asked to run")
    return bar(name, speedups(outcome.runs["pellucid"], outcome.runs[peer], per_token), bound)


def summary(runs: list[Run]) -> dict[str, Any]:
    """seconds of each run, their median, min and max; tokens of each run; the median rate; the greatest memory."""
    seconds = [round(run["seconds"], 4) for run in runs]
    tokens = [run["tokens"] for run in runs]
    rate = statistics.median(run["tokens"] / run["seconds"] for run in runs)
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "tokens": tokens,
        "tokens_per_second": round(rate, 1),
        "peak_rss_bytes": max(run.get("peak_rss_bytes", 0) for run in runs),
    }


def case(workload: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """One workload's part of a result: who took part with which settings, and how long each run took."""
    contestants: dict[str, Any] = {}
    for name, runs in outcome.runs.items():
        contestants[name] = {**summary(runs), "versions": outcome.versions.get(name, {})}
        if name in outcome.chosen:
            contestants[name] |= {"settings": outcome.chosen[name]}
        if name in outcome.tried:
            contestants[name] |= {"tried_tokens_per_second": outcome.tried[name]}
        if name != "pellucid" and "pellucid" in outcome.runs:
            ratios = speedups(outcome.runs["pellucid"], runs)
            contestants[name]["pellucid_is_faster"] = round(statistics.median(ratios), 3)
    for name, reason in outcome.failures.items():
        contestants[name] = {"could_not_run": reason}
    return {"workload": workload, "contestants": contestants}


def write_result(
    name: str,
    *,
    bars: list[dict[str, Any]],
    machine: dict[str, Any],
    cases: dict[str, Any] | None = None,
    path: Path | None = None,
    **more: Any,
) -> Path:
    """benchmarks/results/NAME.json (or `path`), whole or not at all.

    cases: case name -> `case(...)`. machine: `machine.describe()`. more: "notes" (list of sentences), "tables" (list of
    {"title", "columns", "rows"}), or what else the benchmark wants to keep.
    """
    result = {
        "benchmark": name,
        "command": "python -m " + shlex.join([f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "cases": cases or {},
        "bars": bars,
        **more,
    }
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    return partial.replace(target)


def show_bars(bars: list[dict[str, Any]], say: Callable[[str], None] = print) -> None:
    for b in bars:
        sign = "≥" if b["at_least"] else "≤"
        if b["value"] is None:
            say(f"not measured  {b['name']} {sign} {b['bar']}: {b['why']}")
        else:
            say(f"{'holds' if b['holds'] else 'FAILS':12}  {b['name']}: {b['value']:.3g} {sign} {b['bar']}")


def finish(name: str, options: argparse.Namespace, bars: list[dict[str, Any]], **result: Any) -> None:
    """Show the bars, and write the result: to --json, or to its place; a rehearsal (--tiny) only where --json asks.

    result: the other arguments of `write_result`.
    """
    show_bars(bars)
    if options.json or not options.tiny:
        print(f"written: {write_result(name, bars=bars, path=options.json, **result)}")


def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, for argparse."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return parse
