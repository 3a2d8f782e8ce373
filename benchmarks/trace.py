"""What the record costs: PPO iterations with every token recorded, with alternatives too, and without a record.

    python -m benchmarks.trace                        writes benchmarks/results/trace.json
    python -m benchmarks.trace --tiny                 seconds, a tiny model; writes nothing unless told to

The bar is on the seconds of the phase "record" within the iteration that it belongs to; the same iteration without a record
runs in turn, to show that nothing hides elsewhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.figures import bar, case, finish, names
from benchmarks.harness import BenchmarkError, Contestant, Outcome, alternate, main
from benchmarks.ppo_iteration import ALGO, workload
from benchmarks.ppo_iteration import options as models_of
from benchmarks.training import CASES, phases

BOUND = 0.05
ALTERNATIVES = 4
CONTESTANTS: dict[str, dict[str, Any]] = {
    "recorded": {"record": True},
    "recorded with alternatives": {"record": True, "config": {"trace": {"alternatives": ALTERNATIVES}}},
    "not recorded": {},
}
NOTES = [
    "A run is one PPO iteration as in the benchmark of that name. Its record is every column of docs/record.md for all 64 "
    "samples: a Parquet file and a manifest with hashes and histograms, both synced to disk.",
    f"Alternatives are the {ALTERNATIVES} likeliest tokens at each action: one more pass of the actor over the batch, off by "
    "default.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    described = machine.describe(options.threads)
    shape = shapes.TINY if options.tiny else shapes.S8
    cases: dict[str, Any] = {}
    bars: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for name in options.only:
        work = workload(name, shape, options.tiny)
        outcome = _measure(name, shape, work, options, machine.fast_bfloat16(described))
        cases[name] = case(shapes.describe(work), outcome)
        for contestant, runs in outcome.runs.items():
            cases[name]["contestants"][contestant]["phases"] = phases(runs)
        share = shares(outcome.runs["recorded"])
        bars.append(bar(f"{name}: the record's share of the iteration", share, BOUND, at_least=False))
        rows += _rows(name, outcome)
    columns = ["", "", "seconds", "of these the record", "alternatives", "MB on disk"]
    tables = [{"title": "One iteration", "columns": columns, "rows": rows}]
    finish("trace", options, bars, cases=cases, machine=described, notes=NOTES, hyperparameters=ALGO, tables=tables)


def shares(runs: list[dict[str, Any]]) -> list[float]:
    """The record's seconds over the iteration's, run by run."""
    return [run["phases"]["record"] / run["seconds"] for run in runs]


def _measure(
    name: str, shape: shapes.Shape, work: dict[str, Any], options: argparse.Namespace, bfloat16: bool
) -> Outcome:
    model = shapes.policy(shape) if name == "dense" else shapes.stopping_policy(shape)
    size = len(work["prompts"]) * work["samples_per_prompt"]
    spec = {
        "model": str(model),
        "threads": options.threads,
        "workload": str(shapes.workload_file(work)),
        "precision": "bfloat16" if bfloat16 else "float32",
    }
    shared = {"algo": {**ALGO, "minibatch_size": size}, **models_of(shape)}
    entries = [
        Contestant(title, sys.executable, "ppo_pellucid.py", {**spec, "options": {**shared, **settings}})
        for title, settings in CONTESTANTS.items()
    ]
    outcome = alternate(entries, options.rounds, required=tuple(CONTESTANTS))
    for title, runs in outcome.runs.items():
        for run in runs:
            shapes.check_tokens(work, title, run["tokens"])
    return outcome


def _rows(name: str, outcome: Outcome) -> list[list[str]]:
    def median(runs: list[dict[str, Any]], phase: str) -> str:
        found = [run["phases"][phase] for run in runs if phase in run["phases"]]
        return f"{statistics.median(found):.3f}" if found else "–"

    return [
        [
            name,
            title,
            f"{statistics.median(run['seconds'] for run in runs):.2f}",
            median(runs, "record"),
            median(runs, "alternatives"),
            f"{runs[-1]['recorded_bytes'] / 1e6:.2f}" if "recorded_bytes" in runs[-1] else "–",
        ]
        for title, runs in outcome.runs.items()
    ]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace")
    parser.add_argument("--rounds", type=int, help="measured iterations of each (default 5; with --tiny 1)")
    parser.add_argument("--only", type=names(CASES), default=list(CASES), metavar="CASES", help=",".join(CASES))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default 2)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; writes nothing by itself")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 5
    if options.rounds < 1 or options.threads < 1:
        raise BenchmarkError("--rounds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main(command)
