"""What the two benchmarks of a whole training iteration share: Pellucid and TRL in turn, on the same work."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.environments import python_of
from benchmarks.figures import bar, case, finish, names, speedup_bar
from benchmarks.harness import BenchmarkError, Contestant, Outcome, alternate

CASES = ("dense", "ragged")
PELLUCID = "pellucid"


@dataclass(frozen=True)
class TrainingBenchmark:
    """One iteration of an algorithm, by Pellucid and by one peer.

    algo: the hyper-parameters of both, by Pellucid's names; clip_eps is both its clip bounds. options(shape): what else
    both contestants are given. workload(case, shape, tiny): see `shapes`. variants: the peer's settings in words ->
    options, of which it gets its best. bounds: case -> least speed-up. memory: case -> greatest ratio of peak memories.
    """

    name: str
    peer: str
    environment: str
    pellucid_script: str
    peer_script: str
    algo: dict[str, Any]
    options: Callable[[shapes.Shape], dict[str, Any]]
    workload: Callable[[str, shapes.Shape, bool], dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    bounds: dict[str, float]
    memory: dict[str, float]
    notes: list[str]

    def run(self, arguments: list[str]) -> None:
        """The command: both cases, or those asked for; prints, and writes the JSON."""
        options = self._parse(arguments)
        described = machine.describe(options.threads)
        print(f"{described['cpu']}, {options.threads} threads; matrix product {described['matrix_gflops']} GFLOP/s")
        cases: dict[str, Any] = {}
        bars: list[dict[str, Any]] = []
        for name in options.only:
            outcome, workload = self._measure(name, options, machine.fast_bfloat16(described))
            cases[name] = case(shapes.describe(workload), outcome)
            ours = outcome.runs[PELLUCID]
            cases[name]["contestants"][PELLUCID] |= {"phases": phases(ours), "parity": [run["parity"] for run in ours]}
            bars += self.bars(name, outcome)
        kept = {"notes": self.notes, "hyperparameters": self.algo, "tables": [phase_table(cases), parity_table(cases)]}
        finish(self.name, options, bars, cases=cases, machine=described, **kept)

    def bars(self, name: str, outcome: Outcome) -> list[dict[str, Any]]:
        """The bars of one case."""
        faster = f"{name}: iterations per second, {PELLUCID} over {self.peer}"
        made = [speedup_bar(faster, outcome, self.peer, self.bounds[name])]
        if name in self.memory:
            made.append(memory_bar(name, outcome, self.peer, self.memory[name]))
        return made

    def _measure(self, name: str, options: argparse.Namespace, bfloat16: bool) -> tuple[Outcome, dict[str, Any]]:
        shape = shapes.TINY if options.tiny else shapes.S8
        workload = self.workload(name, shape, options.tiny)
        print(f"{name}: {len(workload['prompts'])} prompts, {workload['expected_tokens']} tokens")
        model = shapes.policy(shape) if name == "dense" else shapes.stopping_policy(shape)
        entries = self._contestants(options, workload, shape, model, bfloat16)
        outcome = alternate(entries, options.rounds, required=(PELLUCID,))
        for contestant, runs in outcome.runs.items():
            for run in runs:
                shapes.check_tokens(workload, contestant, run["tokens"])
        return outcome, workload

    def _contestants(
        self,
        options: argparse.Namespace,
        workload: dict[str, Any],
        shape: shapes.Shape,
        model: Path,
        bfloat16: bool,
    ) -> list[list[Contestant]]:
        batch_size = len(workload["prompts"]) * workload["samples_per_prompt"]
        shared = {"algo": {**self.algo, "minibatch_size": batch_size}, **self.options(shape)}
        systems = [(PELLUCID, "project", self.pellucid_script, {"": {}})]
        if self.peer in options.contestants:
            systems.append((self.peer, self.environment, self.peer_script, self.variants))
        precisions = ["float32", "bfloat16"] if bfloat16 else ["float32"]
        common = {
            "model": str(model),
            "threads": options.threads,
            "workload": str(shapes.workload_file(workload)),
        }
        return [
            [
                Contestant(
                    system,
                    python_of(environment),
                    script,
                    {**common, "precision": precision, "options": {**shared, **settings}},
                    variant=f"{precision}, {words}" if words else precision,
                )
                for precision in precisions
                for words, settings in variants.items()
            ]
            for system, environment, script, variants in systems
        ]

    def _parse(self, arguments: list[str]) -> argparse.Namespace:
        systems = (PELLUCID, self.peer)
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}")
        parser.add_argument("--rounds", type=int, help="measured iterations of each (default 5; with --tiny 1)")
        parser.add_argument("--only", type=names(CASES), default=list(CASES), metavar="CASES", help=",".join(CASES))
        parser.add_argument("--contestants", type=names(systems), metavar="NAMES", help=",".join(systems))
        parser.add_argument(
            "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each contestant (default 2)"
        )
        parser.add_argument(
            "--tiny", action="store_true", help="Pellucid alone, a tiny model; writes nothing by itself"
        )
        parser.add_argument("--json", type=Path, help="where to write the result")
        options = parser.parse_args(arguments)
        options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 5
        options.contestants = options.contestants or ([PELLUCID] if options.tiny else list(systems))
        if options.rounds < 1 or options.threads < 1:
            parser.error("--rounds and --threads must be at least 1")
        if options.tiny and self.peer in options.contestants:
            raise BenchmarkError(f"--tiny builds no environments, so it has {PELLUCID} only")
        return options


def phases(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase of an iteration."""
    return {
        phase: round(statistics.median(run["phases"].get(phase, 0.0) for run in runs), 3) for phase in runs[0]["phases"]
    }


def phase_table(cases: dict[str, Any]) -> dict[str, Any]:
    """Pellucid's phases, a row each, a column a case."""
    split = {name: made["contestants"][PELLUCID]["phases"] for name, made in cases.items()}
    every = list(dict.fromkeys(phase for phases in split.values() for phase in phases))
    rows = [[phase, *(f"{phases.get(phase, 0.0):.2f}" for phases in split.values())] for phase in every]
    return {"title": "Where Pellucid's seconds go", "columns": ["phase", *split], "rows": rows}


def parity_table(cases: dict[str, Any]) -> dict[str, Any]:
    """How far the sampler's log-probs are from the trainer's: the median over the runs that compared them."""
    rows = []
    for name, made in cases.items():
        runs = [run for run in made["contestants"][PELLUCID]["parity"] if run]
        gaps = (
            [f"{statistics.median(run[kind] for run in runs):.2g}" for kind in ("mean", "p99", "max")] if runs else []
        )
        rows.append([name, made["contestants"][PELLUCID]["settings"], *(gaps or ["not compared again"] * 3)])
    columns = ["", "precision", "mean", "99th percentile", "maximum"]
    return {
        "title": "Pellucid's sampler against its trainer: |difference of a token's log-probs|, nats",
        "columns": columns,
        "rows": rows,
    }


def memory_bar(name: str, outcome: Outcome, peer: str, bound: float) -> dict[str, Any]:
    """The bar "Pellucid's peak memory is at most `bound` times the peer's": the greatest of all runs, each."""
    title = f"{name}: peak memory, {PELLUCID} over {peer}"
    if not outcome.runs.get(peer):
        return bar(title, None, bound, at_least=False, why=outcome.failures.get(peer, f"{peer} was not asked to run"))
    ours, theirs = (max(run["peak_rss_bytes"] for run in outcome.runs[system]) for system in (PELLUCID, peer))
    return bar(title, ours / theirs, bound, at_least=False)
