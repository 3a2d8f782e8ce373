"""Where numbers go: the console, metrics.jsonl always, TensorBoard, W&B and trackio when asked. Nothing reads them back."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pellucid.errors import CheckpointError, ConfigError


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl: one object per step. A resumed run first cuts it back to what its checkpoint had seen.

    Raises CheckpointError when there is less than that: whoever wants to go on without its beginning removes the file.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        there = path.stat().st_size if path.exists() else None
        if there is not None and there < keep_bytes:
            raise CheckpointError(
                f"{path}: holds {there} bytes, the checkpoint had written {keep_bytes}; restore it, or remove it to go on "
                "without the steps before"
            )
        self._file = path.open("ab")
        self._file.truncate(0 if there is None else keep_bytes)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN; null says that the metric was not defined at this step.
        row = {"step": step} | {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, 2)

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    def __init__(self, path: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackerSink:
    """W&B or trackio, which share one interface."""

    def __init__(self, module: str, path: Path) -> None:
        self._tracker = importlib.import_module(module)
        self._tracker.init(project="pellucid", name=path.name, dir=str(path) if module == "wandb" else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        self._tracker.finish()


class Metrics:
    """All sinks of one run."""

    def __init__(self, path: Path, loggers: tuple[str, ...], first_step: int = 0, keep_bytes: int = 0) -> None:
        self._jsonl = JsonlSink(path / "metrics.jsonl", keep_bytes)
        self._sinks: list[Sink] = [self._jsonl]
        for name in loggers:
            self._sinks.append(TensorBoardSink(path, first_step) if name == "tensorboard" else TrackerSink(name, path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def size(self) -> int:
        """Bytes of metrics.jsonl; a checkpoint keeps it."""
        return self._jsonl.size()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def require_loggers(loggers: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the extra to install, before a run that would need it loads anything."""
    for name in loggers:
        try:
            importlib.metadata.version(name)  # find_spec would take a folder wandb/ of earlier runs for the package
        except importlib.metadata.PackageNotFoundError:
            message = f"run.loggers has {name!r}, which is not installed: pip install 'pellucid[{name}]'"
            raise ConfigError(message) from None


class Reporter:
    """The console of a run: titles, a progress bar, one line of figures per step.

    On a terminal the bar redraws itself; elsewhere (a file, CI) only the lines are printed.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._columns: tuple[str, ...] = ()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def title(self, text: str) -> None:
        self._columns = ()
        self.console.print(f"\n[bold]{text}[/bold]")

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[None]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            self._progress, self._task = bar, bar.add_task(label, total=total, completed=done)
            try:
                yield
            finally:
                self._progress = self._task = None

    def advance(self, description: str | None = None, done: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            changes: dict[str, Any] = {"description": description} if description else {}
            self._progress.update(self._task, advance=done, **changes)

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """One line of a table; the header is printed when the columns change."""
        widths = [max(len(name), 8) for name in figures]
        if tuple(figures) != self._columns:
            self._columns = tuple(figures)
            self.say("  ".join(["step".rjust(6), *(n.rjust(w) for n, w in zip(figures, widths, strict=True))]))
        cells = [_format(v).rjust(w) for v, w in zip(figures.values(), widths, strict=True)]
        self.say("  ".join([str(step).rjust(6), *cells]))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(*columns, title=title, title_justify="left", show_lines=True)
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        self.console.print(table)


def _format(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
