"""What the inspector says of a run against the files themselves, read here by other means."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inspector_payloads import get, strict, unpacked
from records import HOSTILE, write_run

from pellucid.inspector.library import NotThere, RunLibrary
from pellucid.inspector.rollout_payloads import discounted


def test_a_quickstart_is_three_runs(library):
    runs = get(library, "runs.json")
    assert [run["name"] for run in runs["runs"]] == ["demo", "demo/sft", "demo/rm"]
    assert [run["id"] for run in runs["runs"]] == ["0", "1", "2"]
    assert get(library, "run/1/state.json")["steps"] == []
    assert get(library, "run/1/metrics.json")["columns"]["train/nll"][0] == 3.0


def test_state_of_a_finished_run(library, recorded):
    state = get(library, "run/0/state.json")
    assert state["finished"] and state["steps"] == [1, 2] and state["rows"] == 3 and state["faults"] == []
    newest = max(
        path.stat().st_mtime for path in recorded.rglob("*.*") if path.parent.name in ("demo", "rollouts", "manifests")
    )
    assert state["last_change"] == pytest.approx(newest, abs=1e-3)


def test_the_revision_changes_when_a_file_does_and_not_otherwise(damaged):
    library = RunLibrary([damaged])
    before = get(library, "run/0/state.json")
    assert get(library, "run/0/state.json") == before and not before["finished"]
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "score/mean": 1.5}\n')
    after = get(library, "run/0/state.json")
    assert after["revision"] != before["revision"] and after["rows"] == before["rows"] + 1
    (damaged / "manifests/step-000002.json").unlink()
    assert get(library, "run/0/state.json")["revision"] != after["revision"]


def test_config_is_the_text_and_the_tree(library, recorded):
    config = get(library, "run/0/config.json")
    assert config["toml"] == (recorded / "config.toml").read_text()
    assert config["config"]["algo"]["gae_lambda"] == 0.95
    assert config["summary"] == json.loads((recorded / "summary.json").read_text())


def test_metrics_are_columns_with_null_where_a_step_has_none(library, recorded):
    rows = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    columns = get(library, "run/0/metrics.json")["columns"]
    assert next(iter(columns)) == "step" and set(columns) == {name for row in rows for name in row}
    for name, values in columns.items():
        assert values == [row.get(name) for row in rows], name
    assert columns["score/mean"][0] is None


def test_step_holds_the_manifest_and_its_own_spans(library, recorded):
    step = get(library, "run/0/step/2/step.json")
    assert step["manifest"] == json.loads((recorded / "manifests/step-000002.json").read_text())
    assert step["faults"] == []
    events = [e for e in json.loads((recorded / "spans.json").read_text()) if e["ph"] == "X" and e["args"]["step"] == 2]
    assert [span["name"] for span in step["spans"]] == [event["name"] for event in events]
    assert step["spans"][0]["start"] == 0
    last, event = step["spans"][-1], events[-1]
    assert last["start"] == pytest.approx((event["ts"] - events[0]["ts"]) / 1e6)
    assert last["seconds"] == pytest.approx(event["dur"] / 1e6) and last["kind"] == event["args"]["kind"]


def test_the_table_of_samples(library, recorded):
    table = pq.read_table(recorded / "rollouts/step-000001.parquet")
    samples = get(library, "run/0/step/1/samples.json")
    assert samples["rows"] == table.num_rows == 40
    assert "input_ids" not in samples["columns"] and len(samples["columns"]) == 16
    for name, values in samples["columns"].items():
        expected = table[name].to_pylist()
        if name in ("prompt", "response"):
            expected = [text[: 100 if name == "prompt" else 200] for text in expected]
        if pa.types.is_floating(table.schema.field(name).type):
            assert [np.float32(value) for value in values] == [np.float32(value) for value in expected], name
        else:
            assert values == expected, name


def test_a_chunk_is_every_column_of_its_rows(library, recorded):
    rows = pq.read_table(recorded / "rollouts/step-000002.parquet").to_pylist()
    seen = 0
    for index in range(3):
        chunk = get(library, f"run/0/step/2/chunk/{index}.json")
        for sample in chunk["samples"]:
            row = rows[seen]
            lists = {name: values for name, values in row.items() if isinstance(values, list)}
            assert sample["row"] == row["row"] and sample["response"] == row["response"]
            assert sample["length_tokens"] == len(row["input_ids"])
            assert set(sample["arrays"]) == set(lists)
            assert set(sample) == set(row) - set(lists) | {"arrays", "length_tokens"}
            for name, values in lists.items():
                flat = [x for inner in values for x in inner] if name.startswith("top_") else values
                assert unpacked(sample["arrays"][name]) == flat, name
            assert sample["arrays"]["top_ids"]["k"] == 3 and "k" not in sample["arrays"]["kl"]
            seen += 1
    assert seen == 40
    with pytest.raises(NotThere, match="chunk 3 is not there; the chunks are 0 to 2"):
        library.json("run/0/step/2/chunk/3.json")


def test_chunks_of_a_file_with_other_row_groups(damaged):
    path = damaged / "rollouts/step-000001.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table] * 5), path, row_group_size=7)
    library = RunLibrary([damaged])
    rows = [s["row"] for i in range(3) for s in get(library, f"run/0/step/1/chunk/{i}.json")["samples"]]
    assert rows == table["row"].to_pylist() * 5


def test_pieces_are_those_of_the_chunk(library, recorded):
    chunk = get(library, "run/0/step/1/chunk/0.json")
    table = pq.read_table(recorded / "rollouts/step-000001.parquet").slice(0, 16).to_pylist()
    used = {i for row in table for i in row["input_ids"]} | {i for row in table for top in row["top_ids"] for i in top}
    vocabulary = {row["id"]: row for row in pq.read_table(recorded / "vocabulary.parquet").to_pylist()}
    assert set(chunk["pieces"]) == {str(i) for i in used}
    assert any("bytes" in piece for piece in chunk["pieces"].values())
    for i, piece in chunk["pieces"].items():
        whole = piece["text"].encode() if "text" in piece else bytes.fromhex(piece["bytes"])
        assert whole == vocabulary[int(i)]["bytes"] and piece.get("special", False) == vocabulary[int(i)]["special"]


def test_hostile_texts_survive_as_text(library):
    raw = library.json("run/0/step/1/chunk/0.json")
    assert "<" not in raw and raw.isascii()
    chunk = strict(raw)
    for i, text in enumerate(HOSTILE[:-1]):
        assert chunk["samples"][i]["prompt"].startswith(text) and chunk["pieces"][str(2 + i)]["text"] == text
    assert chunk["pieces"][str(2 + len(HOSTILE) - 1)] == {"bytes": "eda080"}


def test_the_check_works_the_whitening_out_again(library, recorded):
    table = pq.read_table(recorded / "rollouts/step-000001.parquet").to_pylist()
    raw = [
        r - v
        for row in table
        for r, v, a in zip(row["returns"], row["old_values"], row["action_mask"], strict=True)
        if a
    ]
    check = get(library, "run/0/step/1/check.json")["whitening"]
    mean = sum(raw) / len(raw)
    assert check["mean"] == pytest.approx(mean, abs=1e-12) and check["count"] == len(raw) and check["whole"]
    assert check["variance"] == pytest.approx(sum((x - mean) ** 2 for x in raw) / len(raw), rel=1e-12)
    stated = get(library, "run/0/step/1/step.json")["manifest"]["whitening"]
    assert check["mean"] == pytest.approx(stated["mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "recorded_rows"),
    [({"advantage": "reinforce_pp", "gamma": 0.9}, None), ({}, 5), ({"whiten_advantages": False}, None),
     ({"advantage": "rloo"}, None)],
)  # fmt: skip
def test_the_check_of_other_algorithms(tmp_path, algorithm, recorded_rows):
    library = RunLibrary([write_run(tmp_path / "run", 1, 8, 24, algorithm=algorithm, recorded=recorded_rows)])
    check = get(library, "run/0/step/1/check.json")["whitening"]
    manifest = get(library, "run/0/step/1/step.json")["manifest"]
    if manifest["whitening"] is None:
        assert check is None
    elif recorded_rows:
        assert check["whole"] is False and check["count"] < manifest["num_action_tokens"]
    else:
        assert check["whole"] and check["count"] == manifest["num_action_tokens"]
        assert check["mean"] == pytest.approx(manifest["whitening"]["mean"], abs=1e-6)
        assert check["variance"] == pytest.approx(manifest["whitening"]["variance"], rel=1e-5)


def test_discounted_skips_what_is_no_action():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 7, 30)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rewards, mask = rng.normal(size=bounds[-1]), rng.random(bounds[-1]) < 0.6
    sums = discounted(rewards, mask, bounds, 0.7)
    for low, high in pairwise(bounds):
        actions = [t for t in range(low, high) if mask[t]]
        for i, t in enumerate(actions):
            assert sums[t] == pytest.approx(sum(rewards[u] * 0.7**n for n, u in enumerate(actions[i:])))
        assert not sums[[t for t in range(low, high) if not mask[t]]].any()


def test_prompts_are_found_again_in_every_step(library, recorded):
    places = get(library, "run/0/prompts.json")["prompts"]
    found = {(step, row): int(prompt) for prompt, rows in places.items() for step, row in rows}
    for step in (1, 2):
        for row, prompt in enumerate(
            pq.read_table(recorded / f"rollouts/step-{step:06d}.parquet")["prompt_id"].to_pylist()
        ):
            assert found.pop((step, row)) == prompt
    assert not found


@pytest.mark.parametrize(
    "path",
    ["", "runs", "run/9/state.json", "run/0/step/3/step.json", "run/0/step/3/samples.json", "run/-1/state.json",
     "run/1/step/1/check.json", "run/0/step/1/chunk/99.json", "../config.toml", "run/0/step/1/../../state.json",
     "run/0/config.toml", "run/0/state.json\n"],
)  # fmt: skip
def test_what_is_not_there(library, path):
    with pytest.raises(NotThere, match=r"^[^\n]+$"):
        library.json(path)


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, pellucid.inspector.library, pellucid.inspector.view, pellucid.inspector.bundle; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "pellucid.inspector.library" in loaded and not loaded & {"torch", "transformers", "starlette", "uvicorn"}
