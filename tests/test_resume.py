"""`kill -9` at any moment, then `--resume`: metrics and weights are bitwise those of the uninterrupted run.

Moments: any file operation (drawn, but seeded), any time, the middle of a checkpoint's writing, and a second kill
during the resumption.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_commands import (
    RUN,
    Process,
    make_data,
    make_models,
    ppo_config,
    rm_config,
    sft_config,
    shrink_quickstart,
    write_toml,
)


def quickstart_config(home: Path, run_dir: Path) -> dict[str, Any]:
    return {"run": RUN | {"dir": str(run_dir)}, "sft_steps": 2, "rm_steps": 2, "ppo_steps": 2}


def low_ppo_config(home: Path, run_dir: Path) -> dict[str, Any]:
    config = ppo_config(home, run_dir)
    return config | {"run": config["run"] | {"precision": "bfloat16"}}


CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft_config, "rm": rm_config, "ppo": ppo_config, "ppo in bfloat16": low_ppo_config,
    "quickstart": quickstart_config,
}  # fmt: skip
"""Their first word is the command."""
CLOCKS = ("time/", "seconds", "ppo_seconds")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_models(folder)
    assert Process(["--version"], folder).wait() == 0  # starts the server, so that later times are the runs' own
    return make_data(folder)


class Whole:
    """The uninterrupted run of a stage: what is left of it, how long it took, how often it touched a file."""

    def __init__(self, stage: str, home: Path, folder: Path) -> None:
        self.stage, self.run_dir, self.path = stage, folder / "run", folder / "run.toml"
        write_toml(self.path, CONFIGS[stage](home, self.run_dir))
        began = time.perf_counter()
        process = self.start(die_at=0)
        assert process.wait() == 0, process.log.read_text()
        self.seconds = time.perf_counter() - began
        self.events = len(re.findall(r"^file event", process.log.read_text(), re.MULTILINE))
        self.record = record(self.run_dir)

    def start(self, resume: bool = False, die_at: int | None = None) -> Process:
        arguments = [self.stage.split()[0], str(self.path), *(["--resume"] if resume else [])]
        return Process(arguments, self.run_dir, die_at, shrink_quickstart)

    def finish(self) -> None:
        """Resume to the end; the record must be the whole run's. The same run directory, so that no path differs."""
        process = self.start(resume=True)
        assert process.wait() == 0, process.log.read_text()
        found = record(self.run_dir)
        assert found.keys() == self.record.keys()
        assert [name for name in found if found[name] != self.record[name]] == []

    def clear(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)


@pytest.fixture(scope="module", params=list(CONFIGS))
def whole(request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(request.param, home, tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def _clear(request: pytest.FixtureRequest) -> None:
    if "whole" in request.fixturenames:
        request.getfixturevalue("whole").clear()


def record(run_dir: Path) -> dict[str, Any]:
    """Every file of a run directory, by name: bytes, less whatever a clock wrote."""
    # The quickstart's report is drawn from these files, the seconds included.
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.name != "report.html"]
    return {str(path.relative_to(run_dir)): _content(path) for path in files if "checkpoints" not in path.parts}


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "summary.json":
        return _timeless(json.loads(path.read_text()))
    if path.parent.name == "manifests":
        manifest = json.loads(path.read_text())
        return manifest | {"metrics": _timeless(manifest["metrics"])}
    if path.name == "spans.json":
        # The time that a checkpoint took is written after it: a kill in between loses that one span.
        return [span["args"] for span in json.loads(path.read_text()) if span["name"] != "checkpoint"]
    return path.read_bytes()


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


def metric_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_record_of_a_run_covers_what_it_leaves(whole: Whole) -> None:
    models = {"sft": {"actor"}, "rm": {"reward_model"}, "ppo": {"actor", "critic", "best"}}
    models["quickstart"] = {"sft/actor", "rm/reward_model", *models["ppo"]}
    assert {f"{model}/model.safetensors" for model in models[whole.stage.split()[0]]} <= whole.record.keys()
    assert {"metrics.jsonl", "summary.json", "config.toml"} <= whole.record.keys()


def test_the_same_seed_gives_the_same_run_bitwise(whole: Whole) -> None:
    whole.finish()  # there is nothing to resume: it starts from the beginning


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_a_file_operation_it_resumes_to_the_same_bits(whole: Whole, draw: int) -> None:
    moment = random.Random(f"{whole.stage} {draw}").randint(1, whole.events)
    assert whole.start(die_at=moment).wait() == -9
    whole.finish()


def test_killed_at_a_random_time_and_again_on_resuming(whole: Whole) -> None:
    moments = random.Random(f"{whole.stage} times")
    for resume in (False, True):
        process = whole.start(resume)
        time.sleep(moments.uniform(0, 0.9) * whole.seconds)
        process.kill()
        process.wait()
    whole.finish()


def test_killed_while_a_checkpoint_is_written(whole: Whole) -> None:
    process = whole.start()
    folder = whole.run_dir / "checkpoints"
    code = process.kill_when(lambda: any(folder.glob(".step-00000[24].partial/*.pt")))
    assert code == -9, "the checkpoint was never seen half written"
    whole.finish()


def test_killed_again_and_again_it_still_ends_the_same(whole: Whole) -> None:
    draws, resume = random.Random(f"{whole.stage} again"), False
    for _ in range(3):
        if whole.start(resume, die_at=draws.randint(10, whole.events // 2)).wait() != -9:
            break
        resume = True
    whole.finish()


def test_a_quickstart_killed_in_its_last_stage_does_not_repeat_the_earlier_ones(home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = write_toml(tmp_path / "run.toml", quickstart_config(home, run_dir))
    process = Process(["quickstart", str(path)], run_dir, setup=shrink_quickstart)
    assert process.kill_when(lambda: any(run_dir.glob("checkpoints/step-*"))) == -9
    models = [run_dir / "sft/actor/model.safetensors", run_dir / "rm/reward_model/model.safetensors"]
    written = [model.stat().st_mtime_ns for model in models]
    for _ in range(2):  # the second time, everything is finished
        process = Process(["quickstart", str(path), "--resume"], run_dir, setup=shrink_quickstart)
        assert process.wait() == 0, process.log.read_text()
    assert [model.stat().st_mtime_ns for model in models] == written
    said = process.log.read_text()
    assert said.count("sft: already finished") == said.count("rm: already finished") == 2
    summary = json.loads((run_dir / "summary.json").read_text())
    stages = [json.loads((run_dir / stage / "summary.json").read_text()) for stage in ("sft", "rm")]
    assert summary["seconds"] == pytest.approx(summary["ppo_seconds"] + sum(s["seconds"] for s in stages), abs=0.2)
