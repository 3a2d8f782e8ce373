"""Runs whose files are missing, cut, foreign, hostile or of another version: one sentence each, and the rest is shown."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inspector_payloads import get, unpacked
from records import write_run

from pellucid.errors import RecordError
from pellucid.inspector.library import RunLibrary


def faults(library: RunLibrary) -> dict[str, str]:
    return {fault["file"]: fault["problem"] for fault in get(library, "run/0/state.json")["faults"]}


def rewrite(run: Path, step: int, **columns: pa.Array) -> None:
    """The step's file again, with some columns replaced."""
    path = run / f"rollouts/step-{step:06d}.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path, row_group_size=64)


def test_a_running_run_has_no_faults(damaged):
    assert faults(RunLibrary([damaged])) == {}
    assert get(RunLibrary([damaged]), "run/0/step/2/step.json")["spans"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_version(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 7'))
        return
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"pellucid.schema_version": "7", "pellucid.version": "9.1"}), path)


def foreign(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_text("[1, 2]")


def out_of_the_run(path: Path) -> None:
    """The very file, whole, but behind a link."""
    outside = next(folder for folder in path.parents if folder.name == "run").with_name("outside")
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    path.symlink_to(outside)


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(cut, "rollouts/step-000001.parquet"), (cut, "manifests/step-000001.json"), (cut, "vocabulary.parquet"),
     (Path.unlink, "manifests/step-000001.json"), (Path.unlink, "config.toml"),
     (other_version, "rollouts/step-000001.parquet"), (other_version, "manifests/step-000001.json"),
     (foreign, "rollouts/step-000001.parquet"), (foreign, "manifests/step-000001.json"), (foreign, "vocabulary.parquet"),
     (foreign, "summary.json"), (foreign, "config.toml"),
     *((damage, name) for damage in (out_of_the_run, a_pipe) for name in
       ("rollouts/step-000001.parquet", "manifests/step-000001.json", "vocabulary.parquet", "config.toml", "metrics.jsonl",
        "spans.json", "summary.json"))],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_damaged_file_is_one_fault_and_the_rest_still_works(damaged, damage, name):
    damage(damaged / name)
    library = RunLibrary([damaged])
    found = faults(library)
    assert list(found) == [name]
    assert "\n" not in found[name] and not found[name].startswith(str(damaged))
    if name != "metrics.jsonl":
        assert get(library, "run/0/metrics.json")["columns"]["step"] == [0, 1, 2]
    for payload in ("samples", "check", "step"):
        assert get(library, f"run/0/step/2/{payload}.json")
    assert len(get(library, "run/0/step/2/chunk/0.json")["samples"]) == 8
    if name.startswith("rollouts"):
        for payload in ("samples", "check", "chunk/0"):
            with pytest.raises(RecordError, match=r"^[^\n]+$"):
                library.json(f"run/0/step/1/{payload}.json")
    if name == "vocabulary.parquet":
        assert get(library, "run/0/step/2/chunk/0.json")["pieces"] == {}
    if name.startswith("manifests"):
        step = get(library, "run/0/step/1/step.json")
        assert step["manifest"] is None and [fault["file"] for fault in step["faults"]] == [name]


def test_a_repaired_file_is_read_again(damaged):
    library, path = RunLibrary([damaged]), damaged / "rollouts/step-000001.parquet"
    whole = path.read_bytes()
    before = get(library, "run/0/step/1/samples.json")
    cut(path)
    assert list(faults(library)) == ["rollouts/step-000001.parquet"]
    with pytest.raises(RecordError):
        library.json("run/0/step/1/samples.json")
    path.write_bytes(whole)
    assert faults(library) == {} and get(library, "run/0/step/1/samples.json") == before
    rewrite(damaged, 1, scores=pa.array(np.arange(8), pa.float32()))
    assert get(library, "run/0/step/1/samples.json")["columns"]["scores"] == list(range(8))


def test_pages_of_a_file_that_are_garbage(damaged):
    path = damaged / "rollouts/step-000001.parquet"
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    with pytest.raises(RecordError, match="cannot be shown"):
        RunLibrary([damaged]).json("run/0/step/1/samples.json")


def spoil(path: Path, row_group: int, column: str) -> None:
    """Garbage over the pages of one column in one row group; the footer stays whole."""
    group = pq.ParquetFile(path).metadata.row_group(row_group)
    found = [group.column(i) for i in range(group.num_columns)]
    where = next(c for c in found if c.path_in_schema.split(".")[0] == column)
    data = bytearray(path.read_bytes())
    data[where.data_page_offset : where.data_page_offset + where.total_compressed_size] = (
        b"\xff" * where.total_compressed_size
    )
    path.write_bytes(data)


def test_no_more_is_read_than_is_shown(tmp_path):
    run = write_run(tmp_path / "run", 1, 80, 24)
    spoil(run / "rollouts/step-000001.parquet", 0, "kl")
    library = RunLibrary([run])
    assert get(library, "run/0/step/1/samples.json")["rows"] == 80  # no list of tokens
    assert len(get(library, "run/0/step/1/chunk/4.json")["samples"]) == 16  # no other row group
    with pytest.raises(RecordError):
        library.json("run/0/step/1/chunk/0.json")


def test_a_folder_that_is_a_link_out_of_the_run(damaged, tmp_path):
    (damaged / "rollouts").rename(tmp_path / "elsewhere")
    (damaged / "rollouts").symlink_to(tmp_path / "elsewhere")
    library = RunLibrary([damaged])
    assert sorted(faults(library)) == ["rollouts/step-000001.parquet", "rollouts/step-000002.parquet"]
    with pytest.raises(RecordError, match="leads out of the run directory"):
        library.json("run/0/step/1/chunk/0.json")


def test_a_stage_that_is_a_link_out_of_the_run_is_not_shown(damaged, recorded):
    (damaged / "sft").symlink_to(recorded / "sft")
    assert RunLibrary([damaged]).names == ["run"]


def test_a_link_inside_the_run_is_followed(damaged):
    path = damaged / "rollouts/step-000001.parquet"
    path.rename(damaged / "rollouts/kept.parquet")
    path.symlink_to("kept.parquet")
    assert faults(RunLibrary([damaged])) == {}


def test_metrics_that_are_cut_or_broken(damaged):
    path = damaged / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "a": NaN, "b": Infinity}\n{"step": 1, "a": 2\n[3]\n{"step": 2, "a": 4}\n{"step": 3, "a"'
    )
    library = RunLibrary([damaged])
    assert get(library, "run/0/metrics.json")["columns"] == {"step": [0, 2], "a": [None, 4], "b": [None, None]}
    assert "line 2 and 1 more" in faults(library)["metrics.jsonl"]


def test_nan_is_null_in_tables_and_itself_in_arrays(damaged):
    table = pq.read_table(damaged / "rollouts/step-000001.parquet")
    kl = table["kl"].to_pylist()
    kl[2][1] = float("nan")
    kl[3][0] = float("-inf")
    scores = pa.array([float("nan"), float("inf"), *range(6)], pa.float32())
    rewrite(damaged, 1, kl=pa.array(kl, pa.list_(pa.float32())), scores=scores)
    library = RunLibrary([damaged])
    assert get(library, "run/0/step/1/samples.json")["columns"]["scores"] == [None, None, 0, 1, 2, 3, 4, 5]
    samples = get(library, "run/0/step/1/chunk/0.json")["samples"]
    assert samples[0]["scores"] is None
    assert np.isnan(unpacked(samples[2]["arrays"]["kl"])[1]) and unpacked(samples[3]["arrays"]["kl"])[0] == -np.inf


def test_manifest_and_summary_with_what_json_has_not(damaged):
    manifest = damaged / "manifests/step-000001.json"
    manifest.write_text(manifest.read_text().replace('"width"', '"odd": [NaN, -Infinity], "width"'))
    (damaged / "summary.json").write_text('{"note": "\\ud800<", "best": NaN}')
    library = RunLibrary([damaged])
    assert get(library, "run/0/step/1/step.json")["manifest"]["odd"] == [None, None]
    assert get(library, "run/0/config.json")["summary"] == {"note": "\ud800<", "best": None}


def test_a_manifest_nested_beyond_reason(damaged):
    depth = 100_000
    (damaged / "manifests/step-000001.json").write_text(
        '{"schema_version": 1, "tensors": ' + "[" * depth + "]" * depth + "}"
    )
    assert list(faults(RunLibrary([damaged]))) == ["manifests/step-000001.json"]


def test_text_that_is_not_utf8_is_shown_with_marks(damaged):
    bad = pa.array([b"ok\xff<" * 60] * 8, pa.binary())
    rewrite(damaged, 1, prompt=pa.Array.from_buffers(pa.string(), 8, bad.buffers()))
    library = RunLibrary([damaged])
    assert get(library, "run/0/step/1/samples.json")["columns"]["prompt"][0] == ("ok\ufffd<" * 60)[:100]
    assert get(library, "run/0/step/1/chunk/0.json")["samples"][0]["prompt"] == "ok\ufffd<" * 60


def test_spans_cut_in_the_middle_of_an_event(damaged):
    path = damaged / "spans.json"
    path.write_bytes(path.read_bytes()[:-40])
    spans = get(RunLibrary([damaged]), "run/0/step/2/step.json")["spans"]
    assert spans and spans[0]["name"] == "generate" and faults(RunLibrary([damaged])) == {}
