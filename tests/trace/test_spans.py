"""spans.json: whole JSON in Chrome's format after every append, mended when it is opened again, in order within a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_runs import ppo_config, save_models

from pellucid.metrics import Reporter
from pellucid.stages.run import train_ppo
from pellucid.trace import read_spans
from pellucid.trace.spans import Span, SpanFile

SECOND = 1_700_000_000.25
"""Since the epoch."""


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["ph"] == "X"]


def fill(path: Path, steps: int = 3) -> SpanFile:
    """Three spans in each step, a second apart."""
    file = SpanFile(path)
    for step in range(1, steps + 1):
        start = SECOND + 10 * step
        file.append(step, [Span("generate", start, 0.5, 70), Span("values", start + 1, 0.25, 90, rank=1)])
        file.append(step, [Span("checkpoint", start + 2, 0.125)])
    return file


def test_the_file_is_whole_json_after_every_append(tmp_path):
    path = tmp_path / "spans.json"
    file = SpanFile(path)
    assert spans(path) == []
    for step in range(1, 5):
        file.append(step, [Span("score", SECOND + step, 0.5), Span("record", SECOND + step + 0.5, 0.1)])
        assert [(span["name"], span["args"]["step"]) for span in spans(path)] == [
            (name, k) for k in range(1, step + 1) for name in ("score", "record")
        ]
        before = path.read_bytes()
        file.append(step, [])
        assert path.read_bytes() == before, "nothing to append leaves the file as it is"
    assert read_spans(path) == spans(path)
    assert len(path.read_text().splitlines()) == len(events(path)) + 2, "one event a line"


def test_the_fields_are_chromes(tmp_path):
    fill(tmp_path / "spans.json", steps=1)
    found = events(tmp_path / "spans.json")
    names = {event["pid"]: event["args"]["name"] for event in found if event["ph"] == "M"}
    assert all(event["name"] == "process_name" and event["tid"] == 0 for event in found if event["ph"] == "M")
    assert sorted(names.values()) == ["actor", "critic", "driver", "reference", "reward", "rollout"]
    generate, values, checkpoint = spans(tmp_path / "spans.json")
    assert {key: generate[key] for key in ("name", "cat", "ph", "tid")} == {
        "name": "generate", "cat": "phase", "ph": "X", "tid": 0,
    }  # fmt: skip
    assert (generate["ts"], generate["dur"]) == (1_700_000_010_250_000, 500_000), "microseconds, whole ones"
    assert generate["args"] == {"step": 1, "role": "rollout", "rank": 0, "kind": "token by token", "tokens": 70}
    assert values["args"] == {"step": 1, "role": "critic", "rank": 1, "kind": "all at once", "tokens": 90}
    assert values["tid"] == 1, "a thread for each rank"
    assert checkpoint["args"] == {"step": 1, "role": "driver", "rank": 0, "kind": "driver", "tokens": None}
    assert [names[span["pid"]] for span in (generate, values, checkpoint)] == ["rollout", "critic", "driver"]


@pytest.mark.parametrize("after_step", [0, 1, 3, 9])
def test_opening_again_drops_the_steps_beyond(tmp_path, after_step):
    path = tmp_path / "spans.json"
    fill(path)
    before = spans(path)
    file = SpanFile(path, after_step)
    assert spans(path) == [span for span in before if span["args"]["step"] <= after_step]
    assert sum(event["ph"] == "M" for event in events(path)) == 6, "the names of the processes once"
    file.append(after_step + 1, [Span("generate", SECOND + 99, 0.5)])
    assert spans(path)[-1]["ts"] == 1_700_000_099_250_000


def test_a_file_cut_at_any_byte_is_read_up_to_the_cut_and_mended(tmp_path):
    path, again = tmp_path / "spans.json", tmp_path / "again.json"
    fill(path)
    whole, text = spans(path), path.read_text()
    # An event is there from the byte on that closes it; the others are told apart by their place in the text.
    ends = [text.index(json.dumps(span)) + len(json.dumps(span)) for span in whole]
    assert ends == sorted(set(ends)) and len(ends) == 9
    for cut in range(len(text)):
        again.write_text(text[:cut])
        there = [span for span, end in zip(whole, ends, strict=True) if end <= cut]
        assert read_spans(again) == there, f"cut at byte {cut}"
        if cut % 37 == 0 or cut in ends:
            SpanFile(again, 9).append(4, [Span("score", SECOND, 1.0)])
            assert [span["name"] for span in spans(again)] == [*(span["name"] for span in there), "score"]


def test_a_missing_file_has_no_spans_and_others_do_no_harm(tmp_path):
    path = tmp_path / "spans.json"
    assert read_spans(path) == []
    for foreign in (b"", b"\n\n", b"not json", b"[1, 2]", b'{"traceEvents": []}', b"\xff\xfe\x00[", b"null", b'"X"'):
        path.write_bytes(foreign)
        assert read_spans(path) == []
        SpanFile(path)
        assert spans(path) == []


@pytest.mark.parametrize("arguments", ["null", "[]", '{"step": "one"}'])
def test_events_that_are_not_ours_do_no_harm(tmp_path, arguments):
    path = tmp_path / "spans.json"
    path.write_text('[\n{"name": "x", "ph": "X", "ts": 0, "dur": 1, "args": ' + arguments + "}\n]\n")
    SpanFile(path).append(1, [Span("score", SECOND, 1.0)])
    assert spans(path)[-1]["name"] == "score"


# ---------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    config = ppo_config(
        save_models(folder / "models"), folder / "runs" / "run", total_steps=3, run__checkpoint_every=2, trace__every=2,
        trace__alternatives=2, eval_data__source=str(folder / "runs" / "prompts.jsonl"), eval__every=2,
    )  # fmt: skip
    train_ppo(config, reporter=Reporter(quiet=True))
    return folder / "runs" / "run"


def test_a_step_is_its_phases_in_order(run_dir):
    passes = ["generate", "score", "old_logprobs", "alternatives", "ref_logprobs", "values"]
    every = [*passes, "update_critic", "update_actor", "sync_weights"]
    late = {1: ["record"], 2: ["record", "evaluate", "checkpoint"], 3: ["record", "evaluate", "checkpoint"]}
    found = spans(run_dir / "spans.json")
    for step, more in late.items():
        assert [span["name"] for span in found if span["args"]["step"] == step] == every + more
    assert [span["args"]["step"] for span in found] == sorted(span["args"]["step"] for span in found)


def test_spans_of_a_run_do_not_overlap(run_dir):
    """One process does one thing at a time. Two clocks are read, so an end may be off by their drift within a phase."""
    found = spans(run_dir / "spans.json")
    for before, after in itertools.pairwise(found):
        assert before["ts"] <= after["ts"]
        assert before["ts"] + before["dur"] <= after["ts"] + 100, f"{before['name']} and {after['name']}, microseconds"
    assert all(span["dur"] >= 0 for span in found)


def test_seconds_and_tokens_are_those_of_metrics_and_samples(run_dir):
    rows = {row["step"]: row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}
    seen = set()
    for span in spans(run_dir / "spans.json"):
        name, step, tokens = span["name"], span["args"]["step"], span["args"]["tokens"]
        if name != "checkpoint":
            assert span["dur"] == pytest.approx(rows[step][f"time/{name}"] * 1e6, abs=1)
        samples = pq.read_table(run_dir / "rollouts" / f"step-{step:06d}.parquet")
        whole, sampled = (sum(map(sum, samples[mask].to_pylist())) for mask in ("attention_mask", "action_mask"))
        assert sampled < whole
        passes = dict.fromkeys(["score", "old_logprobs", "alternatives", "ref_logprobs", "values"], whole)
        updates = dict.fromkeys(["update_critic", "update_actor"], 2 * whole)  # two epochs
        assert tokens == (passes | updates | {"generate": sampled}).get(name)
        seen.add(name)
    assert {"generate", "alternatives", "update_actor", "checkpoint"} <= seen
