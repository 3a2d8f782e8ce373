"""A bundle holds the pages and the same payloads as the server, and takes nothing away that is not a bundle."""

from __future__ import annotations

import json
import shutil

import pytest
from inspector_payloads import strict
from records import write_run

from pellucid.errors import CheckpointError, ConfigError
from pellucid.inspector import bundle as bundle_module
from pellucid.inspector.bundle import parse_steps, write_bundle
from pellucid.inspector.library import RunLibrary
from pellucid.inspector.road import road_files
from pellucid.inspector.static_files import ROOT, static_files


def payloads(folder) -> dict:
    found = {}
    for file in sorted((folder / "data").rglob("*.js")):
        path = file.relative_to(folder / "data").as_posix().removesuffix(".js")
        text = file.read_bytes().decode("ascii")
        start = f'PellucidData("{path}", '
        assert text.startswith(start) and text.endswith(");\n") and "<" not in text
        found[path] = strict(text[len(start) : -len(");\n")])
    return found


@pytest.fixture(scope="module")
def bundle(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "out"
    assert write_bundle([recorded], folder) == len(list((folder / "data").rglob("*.js")))
    return folder


def test_it_holds_the_pages(bundle):
    for name in static_files():
        copied = (bundle / name).read_bytes()
        if name == "index.html":
            assert copied.count(b"<html data-bundle ") == 1
            copied = copied.replace(b" data-bundle", b"")
        assert copied == (ROOT / name).read_bytes()
    assert (bundle / "index.html").is_file()
    assert all((bundle / name).read_bytes() == content for name, content in road_files().items())


def test_it_holds_every_payload_as_the_server_gives_it(bundle, library):
    found = payloads(bundle)
    runs = found.pop("runs.json")
    assert runs["live"] is False and [run["name"] for run in runs["runs"]] == ["demo", "demo/sft", "demo/rm"]
    expected = {path: strict(library.json(path)) for path in library.paths() if path != "runs.json"}
    assert found == expected
    assert {"run/0/step/2/chunk/2.json", "run/0/step/1/check.json", "run/2/metrics.json"} < set(found)


def test_it_does_not_tell_where_the_run_lay(bundle, recorded):
    assert all(str(recorded) not in file.read_text() for file in (bundle / "data").rglob("*.js"))


def test_chosen_steps_only(tmp_path):
    run = write_run(tmp_path / "run", 4, 8, 24)
    write_bundle([run], tmp_path / "out", "1,3-9")
    found = payloads(tmp_path / "out")
    assert found["run/0/state.json"]["steps"] == [1, 3, 4]
    assert {int(path.split("/")[3]) for path in found if "/step/" in path} == {1, 3, 4}
    assert {step for rows in found["run/0/prompts.json"]["prompts"].values() for step, _ in rows} == {1, 3, 4}
    assert found["run/0/metrics.json"]["columns"]["step"] == [0, 1, 2, 3, 4]


def test_the_choice_of_steps():
    keeps = parse_steps(" 2, 5-7 ,9-8")
    assert [step for step in range(12) if keeps(step)] == [2, 5, 6, 7]
    assert parse_steps(None)(123)
    for text in ("", "a", "1,,2", "-3", "1-", "1;2", "1" * 5000):
        with pytest.raises(ConfigError, match="--steps"):
            parse_steps(text)


def test_steps_that_were_not_recorded(recorded, tmp_path):
    with pytest.raises(ConfigError, match="none of these steps is recorded"):
        write_bundle([recorded], tmp_path / "out", "7-9")
    assert not (tmp_path / "out").exists()


def test_what_is_damaged_is_left_out_and_named(damaged, tmp_path):
    (damaged / "rollouts/step-000001.parquet").write_bytes(b"PAR1")
    (damaged / "manifests/step-000002.json").unlink()
    assert write_bundle([damaged], tmp_path / "out") == 9
    found = payloads(tmp_path / "out")
    assert {path for path in found if "/step/" in path} == {
        f"run/0/step/{name}.json" for name in ("1/step", "2/step", "2/samples", "2/chunk/0")
    }
    faults = [fault["file"] for fault in found["run/0/state.json"]["faults"]]
    assert faults == ["rollouts/step-000001.parquet", "manifests/step-000002.json"]


def test_it_replaces_a_bundle_whole(damaged, tmp_path):
    out = tmp_path / "out"
    write_bundle([damaged], out)
    assert (out / "data/run/0/step/2").exists()
    write_bundle([damaged], out, "1")
    assert not (out / "data/run/0/step/2").exists() and (out / "data/run/0/step/1").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_it_does_not_replace_anything_else(damaged, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for target in (tmp_path / "thesis", tmp_path / "file", damaged, tmp_path):
        with pytest.raises(CheckpointError, match=r"is not a bundle; choose another folder"):
            write_bundle([damaged], target)
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work" and (damaged / "config.toml").exists()
    (tmp_path / "empty").mkdir()
    write_bundle([damaged], tmp_path / "empty")


def test_a_run_that_was_put_into_a_bundle_is_not_lost(damaged, tmp_path):
    write_bundle([damaged], tmp_path / "out")
    shutil.copytree(damaged, tmp_path / "out/run")
    with pytest.raises(CheckpointError, match="holds the run"):
        write_bundle([tmp_path / "out/run"], tmp_path / "out")


def test_a_failure_leaves_the_bundle_before(damaged, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_bundle([damaged], out)
    before = payloads(out)

    def fail(library, path, file):
        if "step/2" in path:
            raise OSError(28, "No space left on device")
        return original(library, path, file)

    original = bundle_module._write_payload
    monkeypatch.setattr(bundle_module, "_write_payload", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write_bundle([damaged], out)
    assert payloads(out) == before and {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_several_runs(damaged, recorded, tmp_path):
    write_bundle([damaged, recorded], tmp_path / "out")
    found = payloads(tmp_path / "out")
    assert [run["name"] for run in found["runs.json"]["runs"]] == ["run", "demo", "demo/sft", "demo/rm"]
    assert found["run/1/state.json"] == strict(RunLibrary([recorded]).json("run/0/state.json"))
    assert json.loads((tmp_path / "out/bundle.json").read_text())["steps"] == "all"
