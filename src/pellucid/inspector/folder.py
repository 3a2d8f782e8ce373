"""One run directory: its known files, read when asked for and remembered until they change. Nothing else is ever opened.

A file that is missing, cut short, foreign or of another schema version raises RecordError with one sentence, which is a
fault of the run; everything else of the run can still be read.
"""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pellucid.errors import RecordError
from pellucid.inspector import rollout_payloads
from pellucid.trace import (
    manifest_path,
    open_rollout,
    read_manifest,
    read_spans,
    read_vocabulary,
    recorded_steps,
    rollout_path,
)

T = TypeVar("T")
Stamp = tuple[int, int, int] | None
"""(mtime in ns, bytes, inode) of a file, None where there is none: it is read again when this changes."""

FILES = ("config.toml", "metrics.jsonl", "summary.json", "spans.json", "vocabulary.parquet")
FOLDERS = {"rollouts": "step-*.parquet", "manifests": "step-*.json"}
FOREIGN = (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, pa.ArrowException)
"""What reading a file of someone else's can raise."""


class Fault(NamedTuple):
    """A file that cannot be shown. file: relative to the run directory."""

    file: str
    problem: str


class Metrics(NamedTuple):
    """rows: one dict a step, as far as the lines are whole. problem: what is wrong with the others, or empty."""

    rows: list[dict[str, Any]]
    problem: str


@dataclass(frozen=True)
class _Held:
    stamp: Stamp
    result: Any = None
    problem: str = ""


class RunFolder:
    """path: as the user gave it. keeps: which recorded steps are shown."""

    def __init__(self, path: Path, keeps: Callable[[int], bool] = lambda step: True) -> None:
        self.path, self.keeps = path, keeps
        self._root = path.resolve()
        self._held: dict[tuple[str, str], _Held] = {}
        self._state: tuple[Any, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    # -- files

    def file(self, relative: str) -> Path:
        """Where a known file lies. Raises RecordError when a link leads out of the run directory, or it is no plain file."""
        path = self.path / relative
        real = path.resolve()
        if not real.is_relative_to(self._root):
            raise RecordError(f"{path}: is a link that leads out of the run directory; put the file itself there")
        if real.exists() and not real.is_file():
            raise RecordError(f"{path}: is not a plain file; remove it, or restore the file")
        return path

    def stamp(self, relative: str) -> Stamp:
        try:
            found = (self.path / relative).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self, relative: str, reader: Callable[[Path], T]) -> T:
        """reader(path); a foreign error becomes a RecordError."""
        try:
            return reader(self.file(relative))
        except FOREIGN as error:
            raise unreadable(self.path / relative, error) from error

    def remembered(self, relative: str, reader: Callable[[Path], T]) -> T:
        """What `read` gives, kept until the file changes, its error too."""
        key, stamp = (relative, reader.__name__), self.stamp(relative)
        held = self._held.get(key)
        if held is None or held.stamp != stamp:
            try:
                held = _Held(stamp, self.read(relative, reader))
            except RecordError as error:
                held = _Held(stamp, problem=str(error))
            with self._lock:
                self._held[key] = held
        if held.problem:
            raise RecordError(held.problem)
        return held.result

    # -- what the files hold

    def config(self) -> tuple[str, dict[str, Any]]:
        """(the text, the same as nested dicts)."""
        return self.remembered("config.toml", _read_config)

    def summary(self) -> dict[str, Any] | None:
        return self.remembered("summary.json", _read_summary)

    def metrics(self) -> Metrics:
        return self.remembered("metrics.jsonl", _read_metrics)

    def spans(self, step: int) -> list[dict[str, Any]]:
        return self.remembered("spans.json", _spans_by_step).get(step, [])

    def vocabulary(self) -> pa.Table | None:
        return self.remembered("vocabulary.parquet", _read_vocabulary)

    def manifest(self, step: int) -> dict[str, Any]:
        return self.read(relative(manifest_path, step), read_manifest)

    def prompt_ids(self, step: int) -> list[int]:
        return self.remembered(relative(rollout_path, step), _prompt_ids).tolist()

    def num_chunks(self, step: int) -> int:
        """Chunks of the step's samples. Raises RecordError unless the step's file can be opened."""
        return self.remembered(relative(rollout_path, step), _num_chunks)

    def steps(self) -> list[int]:
        return [step for step in recorded_steps(self.path) if self.keeps(step)]

    def has(self, step: int) -> bool:
        return self.keeps(step) and self.stamp(relative(rollout_path, step)) is not None

    # -- the state of the run

    def state(self) -> dict[str, Any]:
        """The state.json payload. While nothing changes, this takes no more than a stat call a file."""
        stamps = {name: self.stamp(name) for name in FILES}
        for folder, pattern in FOLDERS.items():
            for path in sorted((self.path / folder).glob(pattern)):
                stamps[f"{folder}/{path.name}"] = self.stamp(f"{folder}/{path.name}")
        known = self._state
        if known is None or known[0] != stamps:
            known = self._state = (stamps, self._make_state(stamps))
        return known[1]

    def _make_state(self, stamps: dict[str, Stamp]) -> dict[str, Any]:
        steps = self.steps()
        return {
            "revision": blake2b(repr(sorted(stamps.items())).encode("utf-8", "replace"), digest_size=8).hexdigest(),
            "finished": stamps["summary.json"] is not None,
            "rows": self._count_rows(),
            "steps": steps,
            "last_change": max((stamp[0] for stamp in stamps.values() if stamp), default=0) / 1e9,
            "faults": [fault._asdict() for fault in self.faults(steps)],
        }

    def _count_rows(self) -> int:
        try:
            return len(self.metrics().rows)
        except RecordError:
            return 0

    def faults(self, steps: list[int]) -> Iterator[Fault]:
        """Every file that cannot be shown, the steps' own included."""
        checks = {"config.toml": self.config, "summary.json": self.summary, "vocabulary.parquet": self.vocabulary}
        checks["spans.json"] = lambda: self.spans(0)
        for name, check in checks.items():
            yield from self._fault(name, check)
        yield from self._fault("metrics.jsonl", lambda: _require_whole(self.path / "metrics.jsonl", self.metrics()))
        for step in steps:
            yield from self.step_faults(step)

    def step_faults(self, step: int) -> Iterator[Fault]:
        yield from self._fault(relative(rollout_path, step), lambda: self.num_chunks(step))
        name = relative(manifest_path, step)
        yield from self._fault(name, lambda: self.remembered(name, _check_manifest))

    def _fault(self, name: str, check: Callable[[], Any]) -> Iterator[Fault]:
        try:
            check()
        except RecordError as error:
            yield Fault(name, str(error).removeprefix(f"{self.path / name}: "))


def relative(path_of: Callable[[Path, int], Path], step: int) -> str:
    """A step's file, relative to the run directory."""
    return path_of(Path(), step).as_posix()


def unreadable(path: Path, error: BaseException) -> RecordError:
    """What a user reads of a file that broke its reader."""
    reason = str(error).partition("\n")[0][:120]
    return RecordError(
        f"{path}: cannot be shown ({type(error).__name__}: {reason}); restore it, or record the run again"
    )


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        raise RecordError(f"{path}: is missing; the run's other files are shown without it")
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecordError(f"{path}: is not TOML ({error}); restore it") from error


def _read_summary(path: Path) -> dict[str, Any] | None:
    """None while the run goes on."""
    if not path.exists():
        return None
    summary = json.loads(path.read_bytes())
    if not isinstance(summary, dict):
        raise RecordError(f"{path}: is not a summary of Pellucid's; restore it")
    return summary


def _read_metrics(path: Path) -> Metrics:
    """A last line without its end is one that is being written, or that a crash cut: it is left out without a word."""
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    if not path.exists():
        return Metrics(rows, "")
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, tail], 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None and number <= len(lines):
            broken.append(number)
    which = f"line {broken[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "") if broken else ""
    return Metrics(rows, which and f"{which}: no JSON object; the other lines are shown")


def _require_whole(path: Path, metrics: Metrics) -> None:
    if metrics.problem:
        raise RecordError(f"{path}: {metrics.problem}")


def _spans_by_step(path: Path) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for event in read_spans(path):
        steps.setdefault(event["args"]["step"], []).append(event)
    return steps


def _read_vocabulary(path: Path) -> pa.Table | None:
    return read_vocabulary(path.parent)


def _check_manifest(path: Path) -> None:
    """Reads it and lets it go: the manifests of a long run would fill the memory."""
    read_manifest(path)


def _prompt_ids(path: Path) -> np.ndarray:
    with open_rollout(path) as file:
        return rollout_payloads.prompt_ids(file)


def _num_chunks(path: Path) -> int:
    with open_rollout(path) as file:
        return rollout_payloads.num_chunks(file)
