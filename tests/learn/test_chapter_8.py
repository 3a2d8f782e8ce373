"""Chapter 8: the exercises' checks, what phases read, the schedules against all orders, the claims."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_runs
import torch

from pellucid.learn import CHAPTERS
from pellucid.learn.chapter_8_data_flow import MODEL, PHASES, chain, list_schedule, phase_seconds, waiting_graph
from pellucid.learn.exercises.chapter_8 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_8 import (
    MODELS,
    Schedule,
    Worker,
    makespan,
    placements,
    tokens_per_second,
    worker_table,
)
from pellucid.learn.small_run import recorded_iterations
from pellucid.metrics import Reporter
from pellucid.stages.advantages import ADVANTAGES
from pellucid.stages.checks import old_logprobs
from pellucid.stages.ppo import sampling_params, shape_rewards
from pellucid.stages.scoring import score_samples
from pellucid.stages.state import PPOState
from pellucid.trace import manifest_path, read_manifest, read_spans
from pellucid.types import Batch, collate

CHECKS = {exercise.name: exercise.check for exercise in EXERCISES}
WAITS: dict[str, set[str]] = {
    "generate": set(),
    "score": {"generate"},
    "old_logprobs": {"generate"},
    "ref_logprobs": {"generate"},
    "values": {"generate"},
    "advantages": {"score", "old_logprobs", "ref_logprobs", "values"},
    "update_critic": {"generate", "values", "advantages"},
    "update_actor": {"generate", "old_logprobs", "advantages"},
    "sync_weights": {"update_actor"},
}
QUIET = Reporter(quiet=True)


# ---------------------------------------------------------------- exercises


def waits_for(made_by: dict[str, str], reads: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    return {phase: {made_by[name] for name in names} for phase, names in reads.items()}


def critical_seconds(seconds: dict[str, float], waits: dict[str, set[str]]) -> float:
    def end(phase: str) -> float:
        return seconds[phase] + max(map(end, waits[phase]), default=0.0)

    return max(map(end, seconds))


def role_bytes(parameters: int, trained: bool) -> int:
    return parameters * (16 if trained else 4)


RIGHT: dict[str, Callable[..., Any]] = {
    "waits_for": waits_for,
    "critical_seconds": critical_seconds,
    "role_bytes": role_bytes,
}
WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("waits_for", lambda made, reads: {p: set(names) for p, names in reads.items()}, "waits for the makers"),
    ("waits_for", lambda made, reads: {p: {made[n] for n in names} for p, names in reads.items() if names}, "an entry"),
    ("critical_seconds", lambda seconds, waits: sum(seconds.values()), "latest end"),
    ("critical_seconds", lambda seconds, waits: 2 * sum(seconds.values()), "more than all"),
    ("critical_seconds", lambda seconds, waits: max(seconds.values()), "latest end"),
    ("role_bytes", lambda n, trained: 4 * n, "two moments"),
    ("role_bytes", lambda n, trained: n * (12 if trained else 4), "two moments"),
    ("role_bytes", lambda n, trained: 16 * n, "a frozen model"),
]


def test_every_exercise_has_an_answer() -> None:
    assert len(EXERCISES) == 3 and set(RIGHT) == set(CHECKS)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answer_passes(name: str) -> None:
    CHECKS[name](RIGHT[name])


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_wrong_answer_is_told_why(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        CHECKS[name](answer)


# ---------------------------------------------------------------- what the record says


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PPOState]:
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("tiny")
    config = tiny_runs.ppo_config(
        tiny_runs.save_models(folder), folder / "run", algo__old_logprobs="trainer", total_steps=3
    )
    yield PPOState(config, None, None, QUIET)
    torch.set_num_threads(threads)


def test_phases_read_what_the_chapter_says(state: PPOState) -> None:
    """A phase works on a batch that holds what it reads and nothing else, and on nothing less."""
    config, workers = state.config, state.workers
    samples = workers.engine.generate(state.prompts, sampling_params(config, 1, state.stop_ids))
    bare = collate(samples, pad_id=0)
    whole = bare.having(scores=score_samples(samples, workers.reward, config))
    work: dict[str, Callable[[Batch], Any]] = {
        "old_logprobs": lambda b: old_logprobs(b, workers.actor, config.algo, 1),
        "ref_logprobs": lambda b: {"ref_logprobs": workers.reference.logprobs(b)[0]},
        "values": lambda b: {"old_values": workers.critic.values(b)},  # type: ignore[union-attr]
        "advantages": lambda b: ADVANTAGES["gae"](shape_rewards(b, 0.1), config.algo),
        "update_critic": lambda b: workers.critic.update(b, 1)[1],  # type: ignore[union-attr]
        "update_actor": lambda b: workers.actor.update(b, 0.1, 1)[1],
    }
    for phase, run in work.items():
        optional = [name for name in PHASES[phase][1] if getattr(bare, name) is None]
        only = bare.having(**{name: whole.get(name) for name in optional})
        for name in optional:
            with pytest.raises(ValueError, match=f"batch has no {name} yet"):
                run(replace(only, **{name: None}))
        made = run(only)
        assert all(value.isfinite().all() for value in made.values())
        whole = whole.having(**{name: value for name, value in made.items() if getattr(whole, name) is None})


def test_graph_of_a_recorded_run(state: PPOState, tmp_path: Path) -> None:
    """The manifest of a real iteration gives the graph that one would write by hand; every phase has its time and rate."""
    walls = recorded_iterations(Lesson(CHAPTERS[7], tmp_path, 0, QUIET), state.config, tmp_path / "record")
    assert len(walls) == 3 and min(walls) > 0
    assert waiting_graph(read_manifest(manifest_path(tmp_path / "record", 3))) == WAITS
    spans = read_spans(tmp_path / "record" / "spans.json")
    seconds = phase_seconds(spans)
    assert list(seconds) == list(MODEL) and seconds["advantages"] > 0
    assert tokens_per_second(spans).keys() == set(WAITS) - {"advantages", "sync_weights"}


def test_times_of_made_up_spans() -> None:
    def span(name: str, start: int, duration: int, tokens: int | None = None) -> dict[str, Any]:
        return {"name": name, "ts": start, "dur": duration, "args": {"tokens": tokens}}

    spans = [span("values", 0, 100, 50), span("update_critic", 130, 400), span("values", 1000, 300, 50)]
    seconds = phase_seconds([*spans, span("update_critic", 1310, 200), *all_others(span)])
    right = {"values": 200e-6, "update_critic": 300e-6, "advantages": 20e-6}
    assert seconds == pytest.approx(dict.fromkeys(MODEL, 0.0) | right)
    assert tokens_per_second(spans) == pytest.approx({"values": (50 / 100e-6 + 50 / 300e-6) / 2})


def all_others(span: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    return [span(name, 0, 0) for name in MODEL if name not in ("values", "update_critic", "advantages")]


# ---------------------------------------------------------------- schedules


def random_seconds(seed: int) -> dict[str, float]:
    random = Random(seed)
    return {phase: random.uniform(0.1, 3.0) for phase in MODEL}


def placed_on(seconds: dict[str, float]) -> tuple[dict[str, Worker], dict[str, Schedule]]:
    return placements(lambda worker: list_schedule(seconds, WAITS, worker))


def orders() -> Iterator[tuple[str, ...]]:
    """Every order of the phases in which none comes before what it waits for."""
    passes = ("score", "old_logprobs", "ref_logprobs", "values")
    ends = [("update_actor", "sync_weights", "update_critic"), ("update_actor", "update_critic", "sync_weights")]
    ends.append(("update_critic", "update_actor", "sync_weights"))
    for middle, end in itertools.product(itertools.permutations(passes), ends):
        yield ("generate", *middle, "advantages", *end)


def shortest_of_all(seconds: dict[str, float], worker: dict[str, int]) -> float:
    """The best that any schedule can do: each order of the phases, every phase as early as it can."""
    found = []
    for order in orders():
        end: dict[str, float] = {}
        free = dict.fromkeys(worker.values(), 0.0)
        for phase in order:
            place = worker[MODEL[phase]]
            end[phase] = free[place] = max([free[place], *(end[p] for p in WAITS[phase])]) + seconds[phase]
        found.append(max(end.values()))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_schedule_is_lawful_and_close_to_the_best_of_all(seed: int) -> None:
    seconds = random_seconds(seed)
    places, charts = placed_on(seconds)
    for name, worker in places.items():
        placed = charts[name]
        assert placed.keys() == WAITS.keys()
        for phase, (start, end) in placed.items():
            assert end == pytest.approx(start + seconds[phase])
            assert all(placed[p][1] <= start + 1e-12 for p in WAITS[phase])
        for a, b in itertools.combinations(placed, 2):
            if worker[MODEL[a]] == worker[MODEL[b]]:
                assert placed[a][1] <= placed[b][0] + 1e-12 or placed[b][1] <= placed[a][0] + 1e-12
        best = shortest_of_all(seconds, worker)
        assert best - 1e-9 <= makespan(placed) <= 1.35 * best, name


@pytest.mark.parametrize("seed", range(8))
def test_one_worker_takes_the_sum_and_four_the_critical_path(seed: int) -> None:
    seconds = random_seconds(seed)
    _, charts = placed_on(seconds)
    passes = max(seconds[p] for p in ("score", "old_logprobs", "ref_logprobs", "values"))
    updates = max(seconds["update_critic"], seconds["update_actor"] + seconds["sync_weights"])
    longest = seconds["generate"] + passes + seconds["advantages"] + updates
    assert makespan(charts["1"]) == pytest.approx(sum(seconds.values()))
    assert makespan(charts["4"]) == pytest.approx(longest)
    assert max(chain(phase, seconds, WAITS)[0] for phase in WAITS) == pytest.approx(longest)


def test_placements_on_two_are_the_extremes_of_seven() -> None:
    seconds = random_seconds(0)
    splits = [side for n in (1, 2, 3) for side in itertools.combinations(MODELS[1:], n)]
    assert len(splits) == 7  # the actor on the first worker, some of the others on the second
    times = [makespan(list_schedule(seconds, WAITS, {m: int(m in side) for m in MODELS})) for side in splits]
    _, charts = placed_on(seconds)
    found = [makespan(charts[f"2, {which}"]) for which in ("best", "worst")]
    assert found == pytest.approx([min(times), max(times)])


def test_workers_are_idle_where_nothing_runs() -> None:
    """The last column is the part of all workers' time in which no phase runs, added up phase by phase."""
    seconds = random_seconds(1)
    places, charts = placed_on(seconds)
    _, _, rows = worker_table(places, charts, sum(seconds.values()))
    for name, models, milliseconds, speed_up, idle in rows[:-1]:
        workers, whole = len(set(places[name].values())), makespan(charts[name])
        busy = sum(end - start for start, end in charts[name].values())
        assert idle == f"{abs(workers * whole - busy) / (workers * whole):.0%}"
        assert milliseconds == pytest.approx(1e3 * whole) and speed_up == pytest.approx(busy / whole)
        assert models.count("|") + 1 == workers


@pytest.mark.slow
def test_claims_hold(tmp_path: Path) -> None:
    lesson = Lesson(CHAPTERS[7], tmp_path, 0, QUIET)
    CHAPTERS[7].load().run(lesson)
    assert len(lesson.claims) == 7
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
