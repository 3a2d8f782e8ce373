"""Reading a record: what is missing, damaged, foreign or of another version is one sentence; old records stay readable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pellucid.trace import (
    RecordError,
    manifest_path,
    open_rollout,
    read_manifest,
    read_spans,
    read_vocabulary,
    recorded_steps,
    rollout_path,
)

SCHEMA_1 = Path(__file__).parent / "schema-1"
"""A run that was recorded in schema version 1, kept as it was written; see make_schema_1.py."""


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


# ---------------------------------------------------------------- the record of schema version 1


def test_schema_1_opens():
    assert recorded_steps(SCHEMA_1) == [1, 2]
    assert rollout_path(SCHEMA_1, 2) == SCHEMA_1 / "rollouts" / "step-000002.parquet"
    assert manifest_path(SCHEMA_1, 2) == SCHEMA_1 / "manifests" / "step-000002.json"
    with open_rollout(rollout_path(SCHEMA_1, 2)) as file:
        assert file.schema_arrow.metadata[b"pellucid.schema_version"] == b"1"
        assert file.schema_arrow.metadata[b"pellucid.version"] == b"0.1.0"
        table = file.read()
    assert table.num_rows == 4
    names = (
        "schema_version step row prompt_id group_ids sample_index policy_version stop_reason scores prompt response "
        "num_action_tokens length kl_sequence reward_sum advantage_mean entropy_mean clipped_share minibatch "
        "actor_denominator critic_denominator input_ids attention_mask position_ids response_mask action_mask ended "
        "bootstrap_values rollout_logprobs old_logprobs entropy top_ids top_logprobs ref_logprobs old_values kl rewards "
        "advantages returns values value_clipped value_grads logprobs log_ratio ratio clipped logprob_grads"
    )
    assert table.column_names == names.split()
    sample = table.slice(1, 1).to_pylist()[0]
    assert (sample["step"], sample["prompt_id"], sample["stop_reason"], sample["length"]) == (2, 3, "stop", 5)
    assert (sample["prompt"], sample["response"]) == ("the hill is ", "\ufffd\ufffd\ufffdep9")
    assert sample["input_ids"] == [259, 276, 274, 222, 185, 255, 143, 280, 26]
    assert sample["top_ids"][3:6] == [[0, 0], [117, 223], [165, 147]]
    assert np.float32(sample["logprobs"]).tolist() == np.float32(
        [0, 0, 0, 0, -7.382626, -4.5417376, -5.81535, -3.347475, -5.354618]
    ).tolist()  # fmt: skip
    assert sample["ended"] == [False] * 8 + [True]
    assert sample["logprob_grads"][4] == -0.06223594397306442


def test_the_manifest_of_schema_1_opens():
    manifest = read_manifest(manifest_path(SCHEMA_1, 2))
    assert (manifest["schema_version"], manifest["pellucid"], manifest["step"]) == (1, "0.1.0", 2)
    assert (manifest["samples"], manifest["recorded"], manifest["num_action_tokens"]) == (4, 4, 18)
    assert manifest["algorithm"]["dual_clip"] == 1.5 and manifest["algorithm"]["kl_coef"] == 0.05
    assert manifest["whitening"] == {"mean": -0.47112874190012616, "variance": 0.34285156919709947}
    tensors = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    assert len(tensors) == 32 and tensors["input_ids"]["hash"] == "d92a91da93fe13c48861df3f214306e6"
    assert (tensors["logprobs"]["epoch"], tensors["logprobs"]["mean"]) == (2, -4.174295319451226)
    assert [entry["role"] for entry in manifest["weights"]] == ["actor", "critic", "reference", "reward"]
    assert manifest["metrics"]["kl/coef"] == 0.05


def test_spans_and_vocabulary_of_schema_1_open():
    spans = read_spans(SCHEMA_1 / "spans.json")
    assert len(spans) == 21 and spans[0]["name"] == "generate" and spans[0]["args"]["tokens"] == 12
    vocabulary = read_vocabulary(SCHEMA_1)
    assert vocabulary is not None and vocabulary.column_names == ["id", "bytes", "special"]
    rows = vocabulary.to_pylist()
    assert len(rows) == 290 and [row["id"] for row in rows] == list(range(290))
    assert rows[0] == {"id": 0, "bytes": b"<|end|>", "special": True}
    assert rows[254] == {"id": 254, "bytes": b"\x9e", "special": False}
    assert rows[289] == {"id": 289, "bytes": b"ver", "special": False}


def test_a_version_is_known_as_text_or_number(tmp_path):
    manifest = json.loads((SCHEMA_1 / "manifests" / "step-000001.json").read_text())
    path = tmp_path / "step-000001.json"
    path.write_text(json.dumps(manifest | {"schema_version": "1", "a_later_key": 3}))
    assert read_manifest(path)["a_later_key"] == 3


# ---------------------------------------------------------------- what is not there


def test_recorded_steps_are_in_order_and_ignore_foreign_names(tmp_path):
    assert recorded_steps(tmp_path) == []
    folder = tmp_path / "rollouts"
    folder.mkdir()
    ours = ["step-000010.parquet", "step-000002.parquet", "step-1234567.parquet"]
    others = ["step-3.parquet", "step-00000x.parquet", "xstep-000007.parquet", "step-000006.json", "notes.txt"]
    for name in [*ours, *others, "step-000004.parquet.bak", ".step-000005.parquet.partial"]:
        (folder / name).touch()
    assert recorded_steps(tmp_path) == [2, 10, 1234567]


def test_missing_files_are_said(tmp_path):
    assert "is missing; the step's tensors are in rollouts/" in refusal(read_manifest, tmp_path / "step-000001.json")
    assert "is missing; the step was not recorded" in refusal(open_rollout, tmp_path / "step-000001.parquet")
    assert read_vocabulary(tmp_path) is None and read_spans(tmp_path / "spans.json") == []


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize("left", [0, 1, 4, 500, -9, -5, -1])
def test_a_truncated_rollout_is_refused(tmp_path, left):
    whole = rollout_path(SCHEMA_1, 1).read_bytes()
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(whole[:left])
    assert "is not a whole Parquet file (" in refusal(open_rollout, path)


@pytest.mark.parametrize("end", [b"", b"PAR1", b"\0\0\0\0PAR1", b"\xff\xff\xff\x7fPAR1", b"\x40\0\0\0PAR1"])
def test_a_rollout_with_a_spoilt_footer_is_refused(tmp_path, end):
    whole = rollout_path(SCHEMA_1, 1).read_bytes()
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(whole[:900] + end)
    assert "is not a whole Parquet file (" in refusal(open_rollout, path)


def test_a_rollout_with_a_spoilt_name_is_refused(tmp_path):
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(rollout_path(SCHEMA_1, 1).read_bytes().replace(b"position_ids", b"\xff" * 12))
    refusal(open_rollout, path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_manifest_is_refused(tmp_path, share):
    text = manifest_path(SCHEMA_1, 1).read_text().rstrip()
    path = tmp_path / "step-000001.json"
    path.write_text(text[: int(len(text) * share)])
    assert "cannot be read (" in refusal(read_manifest, path)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b"\x00" * 40, b'{"schema_version": 1, "tensors": [}'])
def test_what_is_not_json_is_no_manifest(tmp_path, content):
    path = tmp_path / "step-000001.json"
    path.write_bytes(content)
    assert "cannot be read (" in refusal(read_manifest, path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    refusal(read_manifest, tmp_path)
    refusal(open_rollout, tmp_path)
    refusal(read_spans, tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text", None])
def test_a_damaged_vocabulary_is_refused(tmp_path, content):
    path = tmp_path / "vocabulary.parquet"
    if content is None:
        pq.write_table(pa.table({"word": ["a"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=r"vocabulary\.parquet: cannot be read \(.*\); tokens are shown by their ids"):
        read_vocabulary(tmp_path)


# ---------------------------------------------------------------- foreign


@pytest.mark.parametrize("content", ["null", "[]", '"text"', "3", "{}", '{"schema_version": 1}', '{"tensors": []}'])
def test_foreign_json_is_no_manifest(tmp_path, content):
    path = tmp_path / "step-000001.json"
    path.write_text(content)
    assert refusal(read_manifest, path) == "is not a manifest of Pellucid's"


def test_foreign_parquet_is_no_record(tmp_path):
    path = tmp_path / "step-000001.parquet"
    for table in (pa.table({"step": [1]}), pa.table({"step": [1]}).replace_schema_metadata({"pandas": "{}"})):
        pq.write_table(table, path)
        assert refusal(open_rollout, path) == "is a Parquet file, but not a record of Pellucid's"
    pd.DataFrame({"step": [1]}).to_parquet(path)
    assert refusal(open_rollout, path) == "is a Parquet file, but not a record of Pellucid's"


@pytest.mark.parametrize("version", ["2", "0", "1.0", "one", ""])
def test_an_unknown_schema_version_is_refused_with_its_writer(tmp_path, version):
    manifest = json.loads(manifest_path(SCHEMA_1, 1).read_text())
    path = tmp_path / "step-000001.json"
    path.write_text(json.dumps(manifest | {"schema_version": version, "pellucid": "7.3.1"}))
    said = refusal(read_manifest, path)
    assert f"written by Pellucid 7.3.1 in schema version {version};" in said and "reads version 1" in said
    assert "open it with Pellucid 7.3.1 or newer" in said

    path = tmp_path / "step-000001.parquet"
    table = pq.read_table(rollout_path(SCHEMA_1, 1))
    metadata = {"pellucid.schema_version": version, "pellucid.version": "7.3.1"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert refusal(open_rollout, path) == said
    pq.write_table(table.replace_schema_metadata({"pellucid.schema_version": version}), path)
    assert refusal(open_rollout, path).startswith(f"written in schema version {version};"), "no writer, no claim of one"


# ---------------------------------------------------------------- light


def test_reading_imports_neither_torch_nor_transformers(tmp_path):
    run_dir = shutil.copytree(SCHEMA_1, tmp_path / "run")
    program = """
import sys
from pathlib import Path
from pellucid.trace import *
run = Path(sys.argv[1])
for step in recorded_steps(run):
    open_rollout(rollout_path(run, step)).read()
    read_manifest(manifest_path(run, step))
print(len(read_spans(run / "spans.json")), read_vocabulary(run).num_rows)
print(sorted({"torch", "transformers", "tokenizers", "pydantic", "pyarrow.dataset"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program, run_dir], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["21 290", "[]"], done.stderr
