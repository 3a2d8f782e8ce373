"""A run is a closed record: its directory and its checkpoints.

A checkpoint carries a manifest with the SHA-256 of each of its files; one that does not match is passed over for the one
before, and that is said.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pellucid.config import Section, differences, dump_toml, read_toml, to_tree
from pellucid.errors import CheckpointError, PellucidError
from pellucid.files import WRITE_FAULTS, atomic_directory, atomic_write, unwritable, writing

MANIFEST = "manifest.json"
FREE_KEYS = ("run.dir", "run.loggers", "run.keep_checkpoints", "trace.")
"""What may differ between a run and its resumption: nothing here changes a number of the run."""


class RunDirectory:
    """One run's folder: config.toml, metrics.jsonl, checkpoints/step-000001/, the models, summary.json."""

    def __init__(self, path: Path, keep: int, notify: Callable[[str], None]) -> None:
        self.path, self.keep, self.notify = path, keep, notify
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(f"{path}: another process is running in this directory") from None

    @classmethod
    def open(cls, config: Section, resume: bool, notify: Callable[[str], None] = print) -> RunDirectory:
        """Make or re-enter the run directory of a config that has a [run] section, and record the config in it.

        A directory whose run left neither a checkpoint nor a summary holds nothing to lose, and is started over.
        Raises CheckpointError when it holds a run and resume is False, when it holds a run of another config, or when
        it cannot be written.
        """
        run = config.run
        path = Path(run.dir)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path, run.keep_checkpoints, notify)
        try:
            directory._enter(config, resume)
        except BaseException:
            directory.close()
            raise
        return directory

    def close(self) -> None:
        """Let the next process in."""
        self._lock.close()

    def _enter(self, config: Section, resume: bool) -> None:
        holds_run = bool(self._checkpoints()) or (self.path / "summary.json").exists()
        if holds_run and not resume:
            raise CheckpointError(
                f"{self.path}: already holds a run; add --resume to continue it, or choose another run.dir"
            )
        if holds_run:
            self._require_same(config)
        elif resume:
            self.notify(f"{self.path} holds no checkpoint yet: starting from the beginning")
        atomic_write(self.path / "config.toml", dump_toml(config))

    def _require_same(self, config: Section) -> None:
        recorded = read_toml(self.path / "config.toml")
        changed = differences(recorded, to_tree(config))
        changed = [line for line in changed if not line.startswith(FREE_KEYS)]
        if changed:
            raise CheckpointError(f"{self.path}: holds a run of another config ({'; '.join(changed[:4])}); not resumed")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the work of a run: a failure leaves with the place of the last checkpoint and how to go on."""
        try:
            yield
        except PellucidError as error:
            raise self._with_hint(error) from error
        except OSError as error:
            if error.errno not in WRITE_FAULTS:
                raise
            path = Path(str(error.filename or self.path))
            raise self._with_hint(unwritable(path, error.errno, error.strerror)) from error
        finally:
            self.close()

    def _with_hint(self, error: PellucidError) -> PellucidError:
        newest = next(iter(reversed(self._checkpoints())), None)
        if newest:
            return type(error)(f"{error}\nlast checkpoint: {newest}; continue with --resume")
        began = (self.path / "metrics.jsonl").exists()
        return type(error)(f"{error}\nno checkpoint was written yet") if began else error

    # -- checkpoints

    def save_checkpoint(self, step: int, states: dict[str, Any]) -> Path:
        """states: name -> anything torch.load(weights_only=True) reads. Old checkpoints beyond keep are removed."""
        path = self.path / "checkpoints" / f"step-{step:06d}"
        with atomic_directory(path) as folder:
            for name, state in states.items():
                _save(state, folder / f"{name}.pt")
            digests = {file.name: _digest(file) for file in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(
                json.dumps({"step": step, "threads": torch.get_num_threads(), "sha256": digests}, indent=1)
            )
        for old in self._checkpoints()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """(step, states) of the newest whole checkpoint; each damaged one on the way is reported. None if there is none.

        Raises CheckpointError when there are some and all are damaged: to start over silently would lose the run.
        """
        path = newest_whole(self.path, self.notify)
        if path is not None:
            self._compare_threads(json.loads((path / MANIFEST).read_text()).get("threads"))
            return read_checkpoint(path)
        if checkpoints := self._checkpoints():
            raise CheckpointError(
                f"{checkpoints[0].parent}: no checkpoint is whole; restore one, or remove this folder to start over"
            )
        return None

    def _compare_threads(self, recorded: int | None) -> None:
        if recorded not in (None, torch.get_num_threads()):
            self.notify(
                f"the run used {recorded} threads until here, now it uses {torch.get_num_threads()}: what follows agrees "
                f"to rounding, not bitwise; for that, set run.threads or OMP_NUM_THREADS to {recorded}"
            )

    def _checkpoints(self) -> list[Path]:
        return _checkpoints(self.path)

    # -- summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        atomic_write(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None


def newest_whole(run_dir: Path, notify: Callable[[str], None], before: int | None = None) -> Path | None:
    """The newest whole checkpoint (of a step before `before`), or None; each damaged one on the way is reported."""
    for path in reversed(_checkpoints(run_dir)):
        if before is None or _step_of(path) < before:
            fault = _fault(path)
            if fault is None:
                return path
            notify(f"checkpoint {path} is damaged ({fault}): trying the one before")
    return None


def read_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, states) of a whole checkpoint, as `RunDirectory.save_checkpoint` was given them."""
    states = {file.stem: torch.load(file, weights_only=True, map_location="cpu") for file in path.glob("*.pt")}
    return _step_of(path), states


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _save(state: Any, path: Path) -> None:
    """torch.save, with the operating system's error when the disk is full (its zip writer reports its own)."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            file.write(bytes(1 << 20))  # on a full disk this fails too, and says why
            file.flush()
            raise OSError(errno.EIO, str(error).splitlines()[0]) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        digests = dict(json.loads((path / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in digests.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if _digest(file) != digest:
            return f"{name} does not match its checksum"
    return None
