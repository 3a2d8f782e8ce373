"""The page that a record is looked into with: how soon it is there, how it scrolls, and how soon it answers.

    python -m benchmarks.inspector                    writes benchmarks/results/inspector.json
    python -m benchmarks.inspector --tiny             seconds, a small record; writes nothing unless told to

A headless Chromium over `pellucid view`, each in a process of its own, on one step of 10,000 samples of 512 tokens and a run
of 300 steps. Needs Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.figures import bar, finish
from benchmarks.harness import BenchmarkError, main
from benchmarks.inspector_browser import WINDOW, Browser, record, serve

PAGES = {
    "run": ("#/run/1", (".run-grid canvas", ".run-figures tbody tr")),
    "step": ("#/run/0/step/1", (".step-flow-panel g.step-node[data-node]", ".step-table tbody tr")),
    "samples": ("#/run/0/step/1/samples", (".samples-table tbody tr:not(.samples-spacer)",)),
    "token": ("#/run/0/step/1/sample/{middle}", ("a.token", ".token-story .token-line")),
}
"""Page -> (its address, what must be there). Run 0 is the wide step, run 1 the long run."""
PAINT_BOUND = 1.0
"""Seconds."""
FRAME_BOUND, CLICK_BOUND, TABLE_BOUND = 50.0, 100.0, 300.0
"""Milliseconds."""
COLUMNS = ("scores", "kl_sequence", "response")
TEXTS = ("lamp window", "quiet", "bright warm")
PAUSE = 0.3
"""Seconds between two clicks on tokens: the page writes its address a moment after each."""
VERSIONS = ("pellucid", "starlette", "uvicorn", "pyarrow", "selenium")


class Scale(NamedTuple):
    """samples of `tokens` each in one step; steps of the long run; clicks, jumps; seconds that a pass of the table takes."""

    samples: int
    tokens: int
    steps: int
    clicks: int
    jumps: int
    seconds: float


FULL = Scale(samples=10_000, tokens=512, steps=300, clicks=20, jumps=20, seconds=6.0)
TINY = Scale(samples=200, tokens=48, steps=4, clicks=4, jumps=3, seconds=1.0)
Round = dict[str, Any]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    scale = TINY if options.tiny else FULL
    browser = Browser()
    try:
        described = machine.describe(min(2, os.cpu_count() or 1))
        size = "tiny" if options.tiny else "full"
        shape = ("--samples", str(scale.samples), "--max-tokens", str(scale.tokens))
        runs = (
            record(f"wide-{size}", "--steps", "1", *shape, "--full"),
            record(f"long-{size}", "--steps", str(scale.steps)),
        )
        rounds = [_round(browser, runs, scale, number + 1) for number in range(options.rounds)]
    finally:
        browser.close()
    versions = {name: metadata.version(name) for name in VERSIONS} | {"browser": browser.version}
    finish(
        "inspector",
        options,
        bars(rounds),
        machine=described,
        notes=_notes(scale, browser.version),
        tables=tables(rounds),
        versions=versions,
        rounds=[kept(measured) for measured in rounds],
    )


def _round(browser: Browser, runs: Sequence[Path], scale: Scale, number: int) -> Round:
    """Every page once, each from a fresh server and an empty cache; the table and the tokens on the pages that have them."""
    measured: Round = {"pages": {}}
    for name, (place, content) in PAGES.items():
        with serve(*runs) as server:
            page = browser.load(server.address + place.format(middle=scale.samples // 2), content)
            if name == "samples":
                measured |= _table(browser, scale)
            elif name == "token":
                check_count("tokens", page["counts"][0], scale.tokens)
                measured["clicks"] = _clicks(browser, scale.clicks)
            measured["pages"][name] = page | {"server_seconds": server.seconds, "server_memory": server.memory()}
        print(f"round {number}: {name} page {page['content']:.0f} ms")
    return measured


def _table(browser: Browser, scale: Scale) -> Round:
    scroll = browser.ask(f"Probe.scroll({scale.seconds})")
    check_count("rows", scroll["rows"], scale.samples)
    return {
        "scroll": scroll,
        "jumps": browser.ask(f"Probe.jumps({scale.jumps})"),
        "sort": browser.ask(f"Probe.sort({json.dumps(COLUMNS)})"),
        "filter": browser.ask(f"Probe.filter({json.dumps(TEXTS)})"),
    }


def _clicks(browser: Browser, count: int) -> list[float]:
    times = []
    for token in browser.ask(f"Promise.resolve(Probe.tokens({count + 1}))")[1:]:  # the first is selected from the start
        time.sleep(PAUSE)
        times.append(browser.click(token))
    return times


def check_count(what: str, shown: int, expected: int) -> None:
    """Raises BenchmarkError where the page does not show what the record holds: its speed would be that of another record."""
    if shown != expected:
        raise BenchmarkError(f"the page shows {shown} {what} of {expected}; its figures do not count")


# -- what comes of the rounds


def bars(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    frames = [percentile(r["scroll"]["frames"], 95) for r in rounds]
    blank = max(float(r["scroll"]["blank"] + r["jumps"].count(None)) for r in rounds)
    ms = "ms until painted"
    limits = [
        *(
            (f"{name} page, seconds until its content is painted", _of(rounds, name, "content"), PAINT_BOUND)
            for name in PAGES
        ),
        ("scrolling through all samples, ms a frame, 95th percentile", frames, FRAME_BOUND),
        ("frames and jumps in which the table showed no rows", blank, 0),
        (f"sorting by a column, {ms}", _medians(rounds, "sort"), TABLE_BOUND),
        (f"filtering by a text, {ms} after the last key", _medians(rounds, "filter"), TABLE_BOUND),
        (f"click on a token, {ms}", _medians(rounds, "clicks"), CLICK_BOUND),
    ]
    return [bar(name, values, bound, at_least=False) for name, values, bound in limits]


def percentile(values: Sequence[float], percent: int) -> float:
    """The least of the values that at least `percent` % of them do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def tables(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    last = rounds[-1]["pages"]
    paint = [
        [
            name,
            *(f"{statistics.median(_of(rounds, name, key)):.2f}" for key in ("paint", "content", "settled")),
            f"{(sum(last[name]['payloads'].values())) / 1e6:.2f}",
            _megabytes([r["pages"][name]["server_memory"] for r in rounds]),
        ]
        for name in PAGES
    ]
    spans = {
        "scrolling, a frame": [t for r in rounds for t in r["scroll"]["frames"]],
        "jump in the table": [t for r in rounds for t in r["jumps"] if t is not None],
        "sorting by a column": [t for r in rounds for t in r["sort"]],
        "filtering by a text, after the last key": [t for r in rounds for t in r["filter"]],
        "click on a token": [t for r in rounds for t in r["clicks"]],
    }
    answers = [
        [
            name,
            len(times),
            *(f"{figure:.0f}" for figure in (statistics.median(times), percentile(times, 95), max(times))),
        ]
        for name, times in spans.items()
    ]
    payloads = {path: size for name in PAGES for path, size in last[name]["payloads"].items()}
    code = max(page["code"] for page in last.values())
    sizes = [[path, f"{size / 1e6:.3f}"] for path, size in sorted(payloads.items(), key=lambda entry: -entry[1])]
    columns = [
        "",
        "first contentful paint, s",
        "content, s",
        "nothing changes any more, s",
        "payloads, MB",
        "server, MB",
    ]
    return [
        {"title": "From the start of the navigation", "columns": columns, "rows": paint},
        {"title": "Answers, ms", "columns": ["", "times", "median", "95th percentile", "longest"], "rows": answers},
        {"title": "Payloads", "columns": ["", "MB"], "rows": [["code and styles", f"{code / 1e6:.3f}"], *sizes]},
    ]


def _of(rounds: Sequence[Round], page: str, key: str) -> list[float]:
    """Seconds, one a round."""
    return [r["pages"][page][key] / 1000 for r in rounds]


def _medians(rounds: Sequence[Round], key: str) -> list[float]:
    return [statistics.median(r[key]) for r in rounds]


def _megabytes(memory: Sequence[tuple[int, int] | None]) -> str:
    """What the server holds, and the most it held."""
    if None in memory:
        return "–"
    now, most = (statistics.median(m[i] for m in memory) / 1e6 for i in (0, 1))
    return f"{now:.0f} ({most:.0f} at most)"


def kept(measured: Round) -> Round:
    """A round as the result keeps it: without every single frame."""
    scroll = measured["scroll"]
    frames = {
        "frames": len(scroll["frames"]),
        "median": statistics.median(scroll["frames"]),
        "longest": max(scroll["frames"]),
    }
    return measured | {"scroll": scroll | frames}


def _notes(scale: Scale, browser: str) -> list[str]:
    return [
        f"{browser}, headless, software rendering, a window of {WINDOW.replace(',', ' × ')} pixels. The record is synthetic: "
        f"one step of {scale.samples:,} samples of {scale.tokens} tokens for the pages of step, samples and token, and a run "
        f"of {scale.steps} steps for the run page.",
        "Each load has a server process that has just started and an empty browser cache; the browser is running, and the "
        "record's files are in the system's cache. Content is painted when the page's own elements are in the document and "
        "two frames have begun since: the run's curves and figures, the step's diagram and tensors, rows of the table, the "
        "tokens with the story worked out.",
        f"A pass of the table takes {scale.seconds:g} s from the first row to the last. Clicks on tokens are the browser's "
        "mouse events, spread over the response. Every answer ends two frames after the change, which alone takes 17 to "
        "33 ms at 60 frames a second; a filter waits 200 ms after the last key.",
    ]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspector")
    parser.add_argument("--rounds", type=int, help="times that everything is measured (default 5; with --tiny 1)")
    parser.add_argument("--tiny", action="store_true", help="a small record; writes nothing by itself")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 5
    if options.rounds < 1:
        raise BenchmarkError("--rounds must be at least 1")
    return options


if __name__ == "__main__":
    main(command)
