"""What chapter 8 measures: iterations with their record, rates and traffic read from it, and the rows of the tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pellucid.learn.lesson import Lesson
from pellucid.learn.small_run import recorded_iterations, small_run
from pellucid.trace import manifest_path, read_manifest, read_spans

MODELS = ("actor", "critic", "reference", "reward")
Worker = dict[str, int]  # model -> the worker on which it lives
Manifest, Spans = Mapping[str, Any], list[dict[str, Any]]
Seconds, Graph = Mapping[str, float], Mapping[str, set[str]]  # phase -> how long it takes, what it waits for
Schedule = dict[str, tuple[float, float]]  # phase -> its start and end, in seconds
Phases = Mapping[str, tuple[str, tuple[str, ...]]]  # phase -> the model that must be there, the tensors that it reads
Table = tuple[str, list[str], list[list[Any]]]  # title, columns, rows


class Recorded(NamedTuple):
    manifest: Manifest  # of the last iteration
    spans: Spans  # of all but the first, which warms up
    wall: float  # median seconds of an iteration, by a clock outside of it


def recorded_run(lesson: Lesson, steps: int) -> Recorded:
    """So many iterations of the `ppo` stage; their record stays in the lesson's folder."""
    record = lesson.folder / "record"
    with tempfile.TemporaryDirectory() as folder:
        config = small_run(lesson, Path(folder), sft_steps=80, rm_steps=20, ppo_steps=steps)
        algo = config.algo.model_copy(update={"old_logprobs": "trainer"})  # as with an engine that is another program
        trace = config.trace.model_copy(update={"alternatives": 0})
        config = config.model_copy(update={"algo": algo, "trace": trace, "eval_data": None})
        walls = recorded_iterations(lesson, config, record)
    spans = [span for span in read_spans(record / "spans.json") if span["args"]["step"] > 1]
    return Recorded(read_manifest(manifest_path(record, steps)), spans, median(walls[1:]))


# -- from the record


def tokens_per_second(spans: Spans) -> dict[str, float]:
    """phase -> median over the iterations, of the phases that go over tokens."""
    pairs = [(s["name"], s["args"]["tokens"] / s["dur"] * 1e6) for s in spans if s["args"]["tokens"]]
    return {phase: median(rate for name, rate in pairs if name == phase) for phase, _ in pairs}


def weight_versions(manifest: Manifest) -> tuple[set[int], set[int]]:
    """Versions of the weights that made the tensors: of the frozen models, and of those that are trained."""
    versions = {tensor["name"]: tensor["weight_version"] for tensor in manifest["tensors"]}
    frozen = {versions.pop(name) for name in ("scores", "ref_logprobs")}
    return frozen, set(versions.values())


def traffic(manifest: Manifest, phases: Phases) -> tuple[int, int]:
    """Bytes of the actor's weights, and of all tensors that another model reads than the one that made them."""
    made = {tensor["name"]: (phases[tensor["phase"]][0], tensor["bytes"]) for tensor in manifest["tensors"]}
    sent = {(name, model) for model, reads in phases.values() for name in reads if made[name][0] != model}
    actor = next(weights for weights in manifest["weights"] if weights["role"] == "actor")
    return actor["bytes"], sum(made[name][1] for name, _ in sent)


# -- workers


def makespan(schedule: Schedule) -> float:
    return max(end for _, end in schedule.values())


def placements(schedule: Callable[[Worker], Schedule]) -> tuple[dict[str, Worker], dict[str, Schedule]]:
    """One worker, the best and the worst way to put four models on two, and a worker for each; with their schedules."""
    one, four = dict.fromkeys(MODELS, 0), dict(zip(MODELS, range(4), strict=True))
    two = [dict(zip(MODELS, (0, *rest), strict=True)) for rest in product((0, 1), repeat=3) if any(rest)]
    two.sort(key=lambda worker: makespan(schedule(worker)))
    places = {"1": one, "2, best": two[0], "2, worst": two[-1], "4": four}
    return places, {name: schedule(worker) for name, worker in places.items()}


# -- tables


def phase_table(seconds: Seconds, rate: Mapping[str, float], model: Mapping[str, str]) -> Table:
    rows, total = [], sum(seconds.values())
    for phase, each in seconds.items():
        speed = f"{rate[phase]:,.0f}" if phase in rate else ""
        rows.append([phase, model[phase], 1e3 * each, f"{each / total:.1%}", speed])
    return "One iteration, medians", ["phase", "model", "ms", "share", "tokens/s"], rows


def waiting_table(waits: Graph) -> Table:
    rows = [[phase, " ".join(sorted(before))] for phase, before in waits.items()]
    return "Which phase waits for which", ["phase", "waits for"], rows


def worker_table(places: Mapping[str, Worker], charts: Mapping[str, Schedule], total: float) -> Table:
    """total: seconds of all phases together. Idle: the part of the workers' time in which they wait."""
    rows = []
    for name, worker in places.items():
        workers, seconds = sorted(set(worker.values())), makespan(charts[name])
        models = " | ".join("+".join(m for m in MODELS if worker[m] == w) for w in workers) if workers[1:] else "all"
        idle = f"{abs(1 - total / seconds / len(workers)):.0%}"
        rows.append([name, models, 1e3 * seconds, total / seconds, idle])
    rows.append(["4, each phase split in four without loss", "all | all | all | all", 1e3 * total / 4, 4.0, "0%"])
    title = "Predicted from the measured phases, as if workers did not slow each other"
    return title, ["workers", "models", "ms", "speed-up", "idle"], rows
