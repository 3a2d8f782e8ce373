"""What chapter 8 measures: iterations with their record, rates and traffic read from it, and the rows of the tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pellucid.learn.lesson import Lesson
from pellucid.learn.small_run import recorded_iterations, small_run
from pellucid.trace import manifest_path, read_manifest, read_spans

MODELS = ("actor", "critic", "reference", "reward")
Worker = dict[str, int]  # model -> the worker on which it lives


class Recorded(NamedTuple):
    manifest: dict[str, Any]  # of the last iteration
    spans: list[dict[str, Any]]  # of all but the first, which warms up
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


def tokens_per_second(spans: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """phase -> median over the iterations, of the phases that go over tokens."""
    pairs = [(s["name"], s["args"]["tokens"] / s["dur"] * 1e6) for s in spans if s["args"]["tokens"]]
    return {phase: median(rate for name, rate in pairs if name == phase) for phase, _ in pairs}


def weight_versions(manifest: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """Versions of the weights that made the tensors: of the frozen models, and of those that are trained."""
    versions = {tensor["name"]: tensor["weight_version"] for tensor in manifest["tensors"]}
    frozen = {versions.pop(name) for name in ("scores", "ref_logprobs")}
    return frozen, set(versions.values())


def traffic(
    manifest: Mapping[str, Any], reads: Mapping[str, Iterable[str]], model: Mapping[str, str]
) -> tuple[int, int]:
    """Bytes of the actor's weights, and of all tensors that another model reads than the one that made them."""
    made = {tensor["name"]: (model[tensor["phase"]], tensor["bytes"]) for tensor in manifest["tensors"]}
    sent = {(name, model[phase]) for phase, names in reads.items() for name in names if made[name][0] != model[phase]}
    actor = next(weights for weights in manifest["weights"] if weights["role"] == "actor")
    return actor["bytes"], sum(made[name][1] for name, _ in sent)


# -- workers


def makespan(schedule: Mapping[str, tuple[float, float]]) -> float:
    return max(end for _, end in schedule.values())


def placements(seconds_on: Callable[[Worker], float]) -> dict[str, Worker]:
    """One worker, the best and the worst way to put four models on two, and a worker for each."""
    one, four = dict.fromkeys(MODELS, 0), dict(zip(MODELS, range(4), strict=True))
    two = [dict(zip(MODELS, (0, *rest), strict=True)) for rest in product((0, 1), repeat=3) if any(rest)]
    two.sort(key=seconds_on)
    return {"1": one, "2, best": two[0], "2, worst": two[-1], "4": four}


# -- rows


def phase_rows(
    seconds: Mapping[str, float], rate: Mapping[str, float], model: Mapping[str, str]
) -> Iterator[list[Any]]:
    total = sum(seconds.values())
    for phase, each in seconds.items():
        yield [phase, model[phase], 1e3 * each, f"{each / total:.1%}", f"{rate[phase]:,.0f}" if phase in rate else ""]


def worker_rows(places: Mapping[str, Worker], seconds: Mapping[str, float], total: float) -> Iterator[list[Any]]:
    """seconds: of an iteration, by placement. total: of all phases together. Idle: of the workers' time, on average."""
    for name, worker in places.items():
        count, speed_up = len(set(worker.values())), total / seconds[name]
        groups = ["+".join(m for m in MODELS if worker[m] == w) for w in sorted(set(worker.values()))]
        models = " | ".join(groups) if count > 1 else "all"
        yield [name, models, 1e3 * seconds[name], speed_up, f"{abs(1 - speed_up / count):.0%}"]
    yield ["4, each phase split in four without loss", "all | all | all | all", 1e3 * total / 4, 4.0, "0%"]
