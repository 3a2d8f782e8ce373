"""Run directories and checkpoints: files are whole or absent, a damaged one is passed over and named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid.checkpoint import RunDirectory
from pellucid.config import QuickstartConfig, RunConfig, dump_toml
from pellucid.errors import CheckpointError, ConfigError, RewardError
from pellucid.files import atomic_directory, atomic_write, writing
from pellucid.metrics import JsonlSink, Metrics, require_loggers


def opened(path: Path, resume: bool = False, said: list[str] | None = None, **config: Any) -> RunDirectory:
    run = config.pop("run", {})
    settings = QuickstartConfig(run=RunConfig(dir=path, **run), **config)
    return RunDirectory.open(settings, resume, (said if said is not None else []).append)


@pytest.fixture
def said() -> list[str]:
    """What the directory notified of."""
    return []


@pytest.fixture
def directory(tmp_path: Path, said: list[str]) -> Iterator[RunDirectory]:
    made = opened(tmp_path / "run", said=said)
    yield made
    made.close()


def states(step: int) -> dict[str, Any]:
    return {"actor": {"weights": torch.full((4,), float(step))}, "trainer": {"step": step}}


def resumed_step(directory: RunDirectory) -> int:
    """The step that a resumption would start from, by name and by content."""
    found = directory.newest_checkpoint()
    assert found is not None and found[1]["trainer"] == {"step": found[0]}
    return found[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- files that are whole or absent


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "actor") as folder:
        (folder / "weights").write_text("new")
        assert not (tmp_path / "actor").exists()
    assert names(tmp_path) == ["actor"] and names(tmp_path / "actor") == ["weights"]


def test_a_folder_replaces_the_one_before_only_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "actor") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "actor") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["actor"] and (tmp_path / "actor/weights").read_text() == "old"


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for name in (".actor.partial", ".actor.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish").write_text("x")
    with atomic_directory(tmp_path / "actor") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["actor"]


def test_a_file_keeps_its_old_text_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"summary.json: cannot be written: No space left on device; free some space"
    ):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_other_errors_pass_through_writing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back(directory: RunDirectory) -> None:
    assert directory.newest_checkpoint() is None
    directory.save_checkpoint(3, states(3))
    step, found = directory.newest_checkpoint() or (0, {})
    assert step == 3 and found["trainer"] == {"step": 3}
    assert torch.equal(found["actor"]["weights"], torch.full((4,), 3.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    directory = opened(tmp_path / "run", run={"keep_checkpoints": 2})
    for step in (1, 2, 3, 10):
        directory.save_checkpoint(step, states(step))
    directory.close()
    assert names(tmp_path / "run/checkpoints") == ["step-000003", "step-000010"]


def test_the_manifest_has_a_digest_of_each_file(directory: RunDirectory) -> None:
    path = directory.save_checkpoint(1, states(1))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 1 and set(manifest["sha256"]) == {"actor.pt", "trainer.pt"}


def _flip(path: Path) -> None:
    content = bytearray((path / "actor.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "actor.pt").write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (_flip, "actor.pt does not match its checksum"),
    "truncated": (lambda path: os.truncate(path / "actor.pt", 100), "actor.pt does not match its checksum"),
    "emptied": (lambda path: os.truncate(path / "trainer.pt", 0), "trainer.pt does not match its checksum"),
    "missing file": (lambda path: (path / "trainer.pt").unlink(), "trainer.pt is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
    "half manifest": (lambda path: os.truncate(path / "manifest.json", 20), "manifest.json is missing or unreadable"),
    "other manifest": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest.json is missing or unreadable",
    ),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json is missing or unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    directory: RunDirectory, said: list[str], damage: str
) -> None:
    directory.save_checkpoint(1, states(1))
    newest = directory.save_checkpoint(2, states(2))
    harm, reason = DAMAGE[damage]
    harm(newest)
    assert resumed_step(directory) == 1
    assert said == [f"checkpoint {newest} is damaged ({reason}): trying the one before"]
    directory.save_checkpoint(2, states(2))  # the run comes by again, and replaces it
    assert resumed_step(directory) == 2


def test_when_all_are_damaged_the_run_does_not_start_over_by_itself(directory: RunDirectory) -> None:
    for step in (1, 2):
        os.truncate(directory.save_checkpoint(step, states(step)) / "actor.pt", 10)
    with pytest.raises(
        CheckpointError, match="no checkpoint is whole; restore one, or remove this folder to start over"
    ):
        directory.newest_checkpoint()


def test_a_half_written_checkpoint_is_no_checkpoint(directory: RunDirectory) -> None:
    directory.save_checkpoint(1, states(1))
    half = directory.path / "checkpoints/.step-000002.partial"
    half.mkdir()
    (half / "actor.pt").write_bytes(b"half")
    assert resumed_step(directory) == 1
    directory.save_checkpoint(2, states(2))
    assert names(directory.path / "checkpoints") == ["step-000001", "step-000002"]


# ---------------------------------------------------------------- the run directory


def test_two_processes_cannot_share_a_run_directory(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process is running in this directory"):
        opened(tmp_path / "run")
    first.close()
    opened(tmp_path / "run").close()


def test_a_refused_run_lets_go_of_the_directory(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    first.save_checkpoint(1, states(1))
    first.close()
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match="already holds a run; add --resume to continue it, or choose another"
        ):
            opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True).close()


def test_a_run_of_another_config_is_not_resumed_and_the_keys_are_named(tmp_path: Path) -> None:
    first = opened(tmp_path / "run", ppo_steps=3)
    first.save_checkpoint(1, states(1))
    first.close()
    with pytest.raises(CheckpointError, match=r"another config \(ppo_steps: 3 -> 4; run.seed: 0 -> 1\); not resumed"):
        opened(tmp_path / "run", resume=True, ppo_steps=4, run={"seed": 1})
    free = {"loggers": ("tensorboard",), "keep_checkpoints": 5}
    opened(tmp_path / "run", resume=True, ppo_steps=3, run=free).close()


def test_a_directory_that_holds_nothing_to_lose_is_started_over(tmp_path: Path) -> None:
    opened(tmp_path / "run", ppo_steps=3).close()
    said: list[str] = []
    opened(tmp_path / "run", resume=True, said=said, ppo_steps=4).close()
    assert said == [f"{tmp_path / 'run'} holds no checkpoint yet: starting from the beginning"]
    assert "ppo_steps = 4" in (tmp_path / "run/config.toml").read_text()


def test_the_config_is_recorded(directory: RunDirectory) -> None:
    config = QuickstartConfig(run=RunConfig(dir=directory.path))
    assert (directory.path / "config.toml").read_text() == dump_toml(config)


def test_a_directory_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run: cannot be written: Not a directory"):
        opened(tmp_path / "file/run")


def test_a_failure_says_where_the_last_checkpoint_is(directory: RunDirectory) -> None:
    path = directory.save_checkpoint(4, states(4))
    with pytest.raises(RewardError) as caught, directory.running():
        raise RewardError("the reward broke")
    assert str(caught.value) == f"the reward broke\nlast checkpoint: {path}; continue with --resume"


def test_a_failure_before_the_first_step_speaks_of_no_checkpoint(directory: RunDirectory) -> None:
    with pytest.raises(RewardError) as caught, directory.running():
        raise RewardError("the reward broke")
    assert str(caught.value) == "the reward broke"


def test_a_failure_after_the_first_step_says_that_there_is_none(directory: RunDirectory) -> None:
    with pytest.raises(RewardError, match="no checkpoint was written yet"), directory.running():
        (directory.path / "metrics.jsonl").write_text("{}")
        raise RewardError("the reward broke")


def test_a_full_disk_anywhere_in_a_run_is_a_line(directory: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"), directory.running():
        Path("/dev/full").write_text("x")


def test_an_error_of_the_code_is_not_taken_for_one_of_the_disk(directory: RunDirectory) -> None:
    with pytest.raises(FileNotFoundError), directory.running():
        (directory.path / "nothing").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_whole(small_disk: Path) -> None:
    directory = opened(small_disk / "run")
    directory.save_checkpoint(1, states(1))
    large = {"actor": {"weights": torch.zeros(100_000)}}
    with pytest.raises(
        CheckpointError, match="step-000002: cannot be written: No space left on device; free some space"
    ):
        directory.save_checkpoint(2, large)
    assert resumed_step(directory) == 1
    assert names(small_disk / "run/checkpoints") == ["step-000001"]
    directory.close()


def test_a_model_that_does_not_fit_is_a_line_too(small_disk: Path) -> None:
    from safetensors.torch import save_file

    full = pytest.raises(CheckpointError, match="actor: cannot be written: No space left on device")
    with full, atomic_directory(small_disk / "actor") as folder:
        save_file({"a": torch.zeros(100_000)}, folder / "model.safetensors")
    assert names(small_disk) == []


def test_a_torch_that_cannot_write_for_another_reason_is_a_line(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672]\nmore")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"step-000001: cannot be written: \[enforce fail"):
        directory.save_checkpoint(1, states(1))


# ---------------------------------------------------------------- metrics


def test_metrics_are_cut_back_to_what_the_checkpoint_had_seen(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, ())
    metrics.log(1, {"a": 1.0})
    seen = metrics.size()
    metrics.log(2, {"a": 2.0})
    metrics.close()
    resumed = Metrics(tmp_path, (), 2, seen)
    resumed.log(2, {"a": 3.0, "b": float("nan")})
    resumed.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": None}]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an earlier run\n")
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    assert sink.size() == 0
    sink.close()


def test_a_metrics_file_that_lost_its_beginning_is_not_padded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("short")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: holds 5 bytes, the checkpoint had written 99"):
        JsonlSink(path, 99)
    path.unlink()  # as the message says
    sink = JsonlSink(path, 99)
    assert sink.size() == 0
    sink.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's protobuf classes
def test_tensorboard_gets_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, ("tensorboard",))
    for step in range(4):
        metrics.log(step, {"kl/sequence": float(step)})
    metrics.close()
    resumed = Metrics(tmp_path, ("tensorboard",), first_step=3, keep_bytes=10)  # the checkpoint was after step 2
    resumed.log(3, {"kl/sequence": 30.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl/sequence")] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_logger_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=rf"run.loggers has '{name}', .* pip install 'pellucid\[{name}\]'"):
        require_loggers((name,))


def test_a_tracker_is_spoken_to_as_wandb_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    heard: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **settings: heard.append(settings),
        log=lambda metrics, step: heard.append((step, metrics)),
        finish=lambda: heard.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics = Metrics(tmp_path, ("wandb",))
    metrics.log(1, {"a": 1.0})
    metrics.close()
    assert heard == [{"project": "pellucid", "name": tmp_path.name, "dir": str(tmp_path)}, (1, {"a": 1.0}), "finish"]


def test_another_number_of_threads_is_said(directory: RunDirectory, said: list[str], monkeypatch) -> None:
    directory.save_checkpoint(1, states(1))
    resumed_step(directory)
    assert said == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    resumed_step(directory)
    assert len(said) == 1 and "now it uses 77" in said[0] and "not bitwise" in said[0]
