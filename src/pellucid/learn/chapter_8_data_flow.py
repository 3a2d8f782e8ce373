"""The whole data flow: iterations of the real `ppo` stage, read from their own record.

A run's manifest says who made each tensor and how large it is, its spans say when each phase ran. From these two files come
the tokens per second of every model, the graph of which phase waits for which, and a prediction of what the same phases would
take on two and four workers: `list_schedule`, written out below.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from pellucid.learn import flow_pictures
from pellucid.learn.lesson import Lesson
from pellucid.learn.small_run import recorded_iterations, small_run
from pellucid.trace import manifest_path, read_manifest, read_spans

STEPS = 9  # iterations that are recorded; the first warms up and is not counted
PASSES = ("score", "old_logprobs", "ref_logprobs", "values")
READS = {"generate": ()} | dict.fromkeys(PASSES, ("input_ids",)) | {
    "advantages": ("scores", "old_logprobs", "ref_logprobs", "old_values"),
    "update_critic": ("input_ids", "old_values", "returns"),
    "update_actor": ("input_ids", "old_logprobs", "advantages"),
}  # fmt: skip
"""What each phase reads. Who made it, the manifest knows."""
NEEDS = {
    "generate": "actor", "score": "reward", "old_logprobs": "actor", "ref_logprobs": "reference", "values": "critic",
    "advantages": "actor", "update_critic": "critic", "update_actor": "actor", "sync_weights": "actor",
}  # fmt: skip
"""The model that must be where the phase runs; the driver's arithmetic, advantages, is put beside the actor."""
MODELS = ("actor", "critic", "reference", "reward")

Spans, Seconds, Graph = list[dict[str, Any]], Mapping[str, float], Mapping[str, set[str]]
Schedule = dict[str, tuple[float, float]]  # phase -> (start, end), seconds


def run(lesson: Lesson) -> None:
    record = lesson.folder / "record"
    with tempfile.TemporaryDirectory() as folder:
        config = small_run(lesson, Path(folder), sft_steps=80, rm_steps=20, ppo_steps=STEPS)
        algo = config.algo.model_copy(update={"old_logprobs": "trainer"})  # as with an engine that is another program
        trace = config.trace.model_copy(update={"alternatives": 0})
        walls = recorded_iterations(
            lesson, config.model_copy(update={"algo": algo, "trace": trace, "eval_data": None}), record
        )
    manifest = read_manifest(manifest_path(record, STEPS))
    spans = [span for span in read_spans(record / "spans.json") if span["args"]["step"] > 1]
    seconds, waits = phase_seconds(spans), dependencies(manifest)
    show_phases(lesson, manifest, spans, seconds, median(walls[1:]))
    show_workers(lesson, seconds, waits)
    show_bytes(lesson, manifest, seconds)


# -- from the record


def phase_seconds(spans: Spans) -> dict[str, float]:
    """Median over the iterations. The driver's arithmetic has no span: it is the gap between values and update_critic."""
    found: dict[str, list[float]] = {phase: [] for phase in NEEDS}
    end = 0.0
    for span in spans:
        if span["name"] == "update_critic":
            found["advantages"].append(max(0.0, span["ts"] - end) / 1e6)
        found[span["name"]].append(span["dur"] / 1e6)
        end = span["ts"] + span["dur"]
    return {phase: median(values) for phase, values in found.items()}


def tokens_per_second(spans: Spans) -> dict[str, float]:
    """Median over the iterations, of the phases that go over tokens."""
    pairs = [(s["name"], s["args"]["tokens"] / s["dur"] * 1e6) for s in spans if s["args"]["tokens"]]
    return {phase: median(rate for name, rate in pairs if name == phase) for phase, _ in pairs}


def dependencies(manifest: Mapping[str, Any]) -> dict[str, set[str]]:
    """phase -> the phases that made what it reads. The engine's new weights wait for the actor's update."""
    maker = {tensor["name"]: tensor["phase"] for tensor in manifest["tensors"]}
    graph = {phase: {maker[name] for name in names} for phase, names in READS.items()}
    return graph | {"sync_weights": {"update_actor"}}


# -- what it allows


def chain(phase: str, seconds: Seconds, waits: Graph) -> tuple[float, list[str]]:
    """The longest chain of waiting that ends with this phase: its seconds and its phases."""
    before, path = max((chain(p, seconds, waits) for p in waits[phase]), default=(0.0, []))
    return before + seconds[phase], [*path, phase]


def list_schedule(seconds: Seconds, waits: Graph, worker: Mapping[str, int]) -> Schedule:
    """When each phase starts and ends. worker: model -> where it lives; a worker does one phase at a time.

    Again and again: of the phases whose inputs are accounted for, place the one that can start first; of several such, the
    one with the longest chain of work behind it.                                            [list scheduling, Graham 1969]
    """

    def behind(phase: str) -> float:
        return seconds[phase] + max((behind(p) for p in waits if phase in waits[p]), default=0.0)

    placed: Schedule = {}
    free = dict.fromkeys(worker.values(), 0.0)
    while len(placed) < len(waits):
        ready = [phase for phase in waits if phase not in placed and waits[phase] <= placed.keys()]
        start = {p: max([free[worker[NEEDS[p]]], *(placed[before][1] for before in waits[p])]) for p in ready}
        phase = min(ready, key=lambda p: (start[p], -behind(p)))
        free[worker[NEEDS[phase]]] = start[phase] + seconds[phase]
        placed[phase] = (start[phase], free[worker[NEEDS[phase]]])
    return placed


def makespan(schedule: Schedule) -> float:
    return max(end for _, end in schedule.values())


def placements(seconds: Seconds, waits: Graph) -> dict[str, dict[str, int]]:
    """One worker, the best and the worst way to put four models on two, and a worker for each. model -> worker."""
    one, four = dict.fromkeys(MODELS, 0), dict(zip(MODELS, range(4), strict=True))
    two = [dict(zip(MODELS, (0, *rest), strict=True)) for rest in product((0, 1), repeat=3) if any(rest)]
    two.sort(key=lambda worker: makespan(list_schedule(seconds, waits, worker)))
    return {"1": one, "2, best": two[0], "2, worst": two[-1], "4": four}


# -- what is shown


def show_phases(lesson: Lesson, manifest: dict[str, Any], spans: Spans, seconds: Seconds, wall: float) -> None:
    rate, total = tokens_per_second(spans), sum(seconds.values())
    rows = [
        [p, NEEDS[p], 1e3 * s, f"{s / total:.1%}", f"{rate[p]:,.0f}" if p in rate else ""] for p, s in seconds.items()
    ]
    lesson.table("One iteration, medians", ["phase", "model", "ms", "share", "tokens/s"], rows)
    lesson.claim(
        "The phases are the iteration: what lies between them is less than a tenth of it",
        f"{1e3 * total:.0f} ms in phases, {1e3 * wall:.0f} ms by the clock", 0.9 * wall < total < 1.1 * wall,
    )  # fmt: skip
    slowest = min(PASSES, key=lambda p: rate[p])
    lesson.claim(
        "Generation, one token after the other, handles fewer tokens a second than any forward pass over known tokens",
        f"{rate['generate']:,.0f} against {rate[slowest]:,.0f} tokens/s in {slowest}", rate["generate"] < rate[slowest],
    )  # fmt: skip
    versions = {t["name"]: t["weight_version"] for t in manifest["tensors"]}
    frozen = {versions.pop(name) for name in ("scores", "ref_logprobs")}
    lesson.claim(
        "Nothing is stale: reward model and reference are frozen, all else comes from the weights of one iteration ago",
        f"iteration {STEPS}: versions {frozen} and {set(versions.values())}",
        frozen == {0} and set(versions.values()) == {STEPS - 1},
    )  # fmt: skip
    lesson.picture(
        "8-workflow", lambda ax: flow_pictures.workflow(ax, manifest, seconds, rate, READS, NEEDS),
        "One iteration: milliseconds and tokens a second of each phase, and the bytes that each arrow carries",
    )  # fmt: skip


def show_workers(lesson: Lesson, seconds: Seconds, waits: Graph) -> None:
    lesson.table(
        "Which phase waits for which", ["phase", "waits for"], [[p, " ".join(sorted(w))] for p, w in waits.items()]
    )
    shortest, path = max(chain(phase, seconds, waits) for phase in waits)
    total, places = sum(seconds.values()), placements(seconds, waits)
    lesson.say(f"Critical path: {' → '.join(path)}: {1e3 * shortest:.0f} of {1e3 * total:.0f} ms.")
    charts = {name: list_schedule(seconds, waits, worker) for name, worker in places.items()}
    time, rows = {name: makespan(chart) for name, chart in charts.items()}, []
    for name, worker in places.items():
        spread = " | ".join("+".join(m for m in MODELS if worker[m] == w) for w in sorted(set(worker.values())))
        rows.append(
            [name, spread, 1e3 * time[name], total / time[name], f"{abs(1 - total / time[name] / int(name[0])):.0%}"]
        )
    rows.append(["4, each phase split in four without loss", "all | all | all | all", 1e3 * total / 4, 4.0, "0%"])
    lesson.table(
        "Predicted from the measured phases, as if workers did not slow each other",
        ["workers", "models", "ms", "speed-up", "idle"], rows,
    )  # fmt: skip
    lesson.claim(
        "Four workers need as long as the critical path, and no placement of whole phases is faster",
        f"{1e3 * time['4']:.1f} ms, path {1e3 * shortest:.1f} ms", abs(time["4"] - shortest) < 1e-9,
    )  # fmt: skip
    lesson.claim(
        "So four models on four workers are not four times as fast, not even 2.5 times",
        f"{total / time['4']:.2f} times; workers idle {1 - total / time['4'] / 4:.0%}", total < 2.5 * time["4"],
    )  # fmt: skip
    lesson.claim(
        "Two workers, well placed, need at most a quarter more than four",
        f"{1e3 * time['2, best']:.0f} against {1e3 * time['4']:.0f} ms", time["2, best"] < 1.25 * time["4"],
    )  # fmt: skip
    lesson.picture(
        "8-schedule", lambda ax: flow_pictures.gantt(ax, charts, places, NEEDS),
        "One iteration on one, two and four workers (predicted): what runs where, and where a worker waits",
    )  # fmt: skip


def show_bytes(lesson: Lesson, manifest: dict[str, Any], seconds: Seconds) -> None:
    made = {tensor["name"]: (NEEDS[tensor["phase"]], tensor["bytes"]) for tensor in manifest["tensors"]}
    sent = {(name, NEEDS[phase]) for phase, names in READS.items() for name in names if made[name][0] != NEEDS[phase]}
    traffic, weights = sum(made[name][1] for name, _ in sent), {w["role"]: w for w in manifest["weights"]}
    size = weights["actor"]["bytes"]
    lesson.claim(
        "With an engine of its own, the new weights outweigh all tensors of the batch that change place",
        f"{size / 1e6:.2f} MB of weights, {traffic / 1e6:.2f} MB of tensors an iteration", size > traffic,
    )  # fmt: skip
    lesson.picture(
        "8-placement", lambda ax: flow_pictures.placement(ax, weights, seconds, NEEDS, traffic),
        "Where this run's parts would live on a cluster: weights, training state, busy time, traffic of one iteration",
    )  # fmt: skip
