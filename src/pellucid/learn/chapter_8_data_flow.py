"""The whole data flow: iterations of the real `ppo` stage, read from their own record.

A run's manifest says who made each tensor and how large it is, its spans when each phase ran. They give the tokens per second
of every model, the graph of which phase waits for which, and with `list_schedule` a prediction for two and four workers.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_8 as measures
from pellucid.learn.measures.chapter_8 import Graph, Manifest, Schedule, Seconds, Spans, Worker
from pellucid.learn.pictures.chapter_8 import draw_placement, draw_schedules, draw_workflow

STEPS = 9  # iterations that are recorded; the first warms up and is not counted
PHASES = {  # phase -> the model that must be where it runs, and what it reads; who made that, the manifest knows
    "generate": ("actor", ()),
    "score": ("reward", ("input_ids",)),
    "old_logprobs": ("actor", ("input_ids",)),
    "ref_logprobs": ("reference", ("input_ids",)),
    "values": ("critic", ("input_ids",)),
    "advantages": ("actor", ("scores", "old_logprobs", "ref_logprobs", "old_values")),  # the driver's, beside the actor
    "update_critic": ("critic", ("input_ids", "old_values", "returns")),
    "update_actor": ("actor", ("input_ids", "old_logprobs", "advantages")),
    "sync_weights": ("actor", ()),
}
MODEL = {phase: model for phase, (model, _) in PHASES.items()}


def phase_seconds(spans: Spans) -> dict[str, float]:
    """Median over the iterations. The driver's arithmetic has no span: it is the gap between values and update_critic."""
    gaps = [max(0, b["ts"] - a["ts"] - a["dur"]) for a, b in pairwise(spans) if b["name"] == "update_critic"]
    found = {phase: [span["dur"] for span in spans if span["name"] == phase] for phase in PHASES}
    return {phase: median(micros) / 1e6 for phase, micros in (found | {"advantages": gaps}).items()}


def waiting_graph(manifest: Manifest) -> dict[str, set[str]]:
    """phase -> the phases that made what it reads. The engine's new weights wait for the actor's update."""
    maker = {tensor["name"]: tensor["phase"] for tensor in manifest["tensors"]}
    waits = {phase: {maker[name] for name in reads} for phase, (_, reads) in PHASES.items()}
    return waits | {"sync_weights": {"update_actor"}}


def chain(phase: str, seconds: Seconds, waits: Graph) -> tuple[float, list[str]]:
    """The longest chain of waiting that ends with this phase: its seconds and its phases."""
    before, path = max((chain(p, seconds, waits) for p in waits[phase]), default=(0.0, []))
    return before + seconds[phase], [*path, phase]


def list_schedule(seconds: Seconds, waits: Graph, worker: Worker) -> Schedule:
    """phase -> its start and end, in seconds. worker: model -> where it lives; a worker does one phase at a time.

    Again and again: of the phases whose inputs are accounted for, place the one that can start first; of several such, the
    one with the longest chain of work behind it.                                            [list scheduling, Graham 1969]
    """
    after = {phase: {p for p in waits if phase in waits[p]} for phase in waits}  # the graph, read backwards
    placed: Schedule = {}
    free = dict.fromkeys(worker.values(), 0.0)
    while len(placed) < len(waits):
        ready = [phase for phase in waits if phase not in placed and waits[phase] <= placed.keys()]
        start = {p: max([free[worker[MODEL[p]]], *(placed[before][1] for before in waits[p])]) for p in ready}
        phase = min(ready, key=lambda p: (start[p], -chain(p, seconds, after)[0]))
        placed[phase] = (start[phase], start[phase] + seconds[phase])
        free[worker[MODEL[phase]]] = placed[phase][1]
    return placed


def run(lesson: Lesson) -> None:
    manifest, spans, wall = measures.recorded_run(lesson, STEPS)
    seconds, rate, waits = phase_seconds(spans), measures.tokens_per_second(spans), waiting_graph(manifest)
    total = sum(seconds.values())
    lesson.table(*measures.phase_table(seconds, rate, MODEL))
    lesson.claim(
        "The phases are the iteration: what lies between them is less than a tenth of it",
        f"{1e3 * total:.0f} ms in phases, {1e3 * wall:.0f} ms by the clock",
        0.9 * wall < total < 1.1 * wall,
    )
    slowest = min(("score", "old_logprobs", "ref_logprobs", "values"), key=lambda phase: rate[phase])
    lesson.claim(
        "Generation, one token after the other, handles fewer tokens a second than any forward pass over known tokens",
        f"{rate['generate']:,.0f} against {rate[slowest]:,.0f} tokens/s in {slowest}",
        rate["generate"] < rate[slowest],
    )
    frozen, trained = measures.weight_versions(manifest)
    lesson.claim(
        "Nothing is stale: reward model and reference are frozen, all else comes from the weights of one iteration ago",
        f"iteration {STEPS}: versions {frozen} and {trained}",
        frozen == {0} and trained == {STEPS - 1},
    )
    caption = "One iteration: milliseconds and tokens a second of each phase, and the bytes that each arrow carries"
    lesson.picture("8-workflow", lambda ax: draw_workflow(ax, manifest, seconds, rate, PHASES), caption)
    schedules(lesson, seconds, waits)
    weights, tensors = measures.traffic(manifest, PHASES)
    lesson.claim(
        "With an engine of its own, the new weights outweigh all tensors of the batch that change place",
        f"{weights / 1e6:.2f} MB of weights, {tensors / 1e6:.2f} MB of tensors an iteration",
        weights > tensors,
    )
    caption = "Where this run's parts would live on a cluster: weights, training state, busy time, traffic an iteration"
    lesson.picture("8-placement", lambda ax: draw_placement(ax, manifest, seconds, MODEL, tensors), caption)


def schedules(lesson: Lesson, seconds: Seconds, waits: Graph) -> None:
    """One, two and four workers, predicted as if they did not slow each other."""
    lesson.table(*measures.waiting_table(waits))
    total = sum(seconds.values())
    shortest, path = max(chain(phase, seconds, waits) for phase in waits)
    lesson.say(f"Critical path: {' → '.join(path)}: {1e3 * shortest:.0f} of {1e3 * total:.0f} ms.")
    places, charts = measures.placements(lambda worker: list_schedule(seconds, waits, worker))
    lesson.table(*measures.worker_table(places, charts, total))
    best, four = measures.makespan(charts["2, best"]), measures.makespan(charts["4"])
    lesson.claim(
        "Four workers need as long as the critical path, and no placement of whole phases is faster",
        f"{1e3 * four:.1f} ms, path {1e3 * shortest:.1f} ms",
        abs(four - shortest) < 1e-9,
    )
    gain = total / four
    measured = f"{gain:.2f} times; workers idle {1 - gain / 4:.0%}"
    lesson.claim("So four models on four workers are not four times as fast, not even 2.5 times", measured, gain < 2.5)
    measured = f"{1e3 * best:.0f} against {1e3 * four:.0f} ms"
    lesson.claim("Two workers, well placed, need at most a quarter more than four", measured, best < 1.25 * four)
    caption = "One iteration on one, two and four workers (predicted): what runs where, and where a worker waits"
    lesson.picture("8-schedule", lambda ax: draw_schedules(ax, charts, places, MODEL), caption)
