"""The inspector as a folder of files that any browser opens without a server, to send or to keep beside the results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pellucid.errors import CheckpointError, ConfigError, RecordError
from pellucid.files import atomic_directory
from pellucid.inspector.library import NotThere, RunLibrary
from pellucid.inspector.road import road_files
from pellucid.inspector.static_files import static_files

MARKER = "bundle.json"
"""Says that a folder is a bundle, and may be replaced by another."""


def write_bundle(run_dirs: Sequence[Path], folder: Path, steps: str | None = None) -> int:
    """Write the pages and the payloads of the runs into folder; returns the number of payloads.

    steps: such as "1,5-9"; None takes all that are recorded. A damaged file is left out, and named among the bundle's faults.
    Raises CheckpointError when folder holds something else than a bundle, ConfigError when no recorded step is chosen.
    """
    _require_replaceable(folder, run_dirs)
    library = RunLibrary(run_dirs, live=False, keeps=parse_steps(steps))
    if steps is not None and not any(run.steps() for run in library.folders):
        raise ConfigError(f"--steps {steps}: none of these steps is recorded in {', '.join(map(str, run_dirs))}")
    count = 0
    with atomic_directory(folder.resolve()) as scratch:
        pages = {name: file.read_bytes() for name, file in static_files().items()} | road_files()
        for name, content in pages.items():
            target = scratch / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        page = (scratch / "index.html").read_text(encoding="utf-8")
        (scratch / "index.html").write_text(page.replace("<html ", "<html data-bundle ", 1), encoding="utf-8")
        for path in library.paths():
            count += _write_payload(library, path, scratch / "data" / f"{path}.js")
        (scratch / MARKER).write_text(json.dumps({"runs": library.names, "steps": steps or "all"}) + "\n")
    return count


def parse_steps(text: str | None) -> Callable[[int], bool]:
    """Whether a step is among those that a text such as "1,5-9" lists; None lists all. Raises ConfigError for other texts."""
    if text is None:
        return lambda step: True
    parts = [re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part.strip()) for part in text.split(",")]
    ranges = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if len(ranges) < len(parts):
        raise ConfigError(f"--steps {text}: is not a list of steps; write it like 1,5-9")
    return lambda step: any(low <= step <= high for low, high in ranges)


def _require_replaceable(folder: Path, run_dirs: Sequence[Path]) -> None:
    """Writing takes whatever folder holds away: that must be a bundle, or nothing."""
    if folder.exists() and not (folder / MARKER).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already and is not a bundle; choose another folder, or remove it")
    inside = [run_dir for run_dir in run_dirs if run_dir.resolve().is_relative_to(folder.resolve())]
    if inside:
        raise CheckpointError(
            f"{folder}: holds the run {inside[0]}, which a bundle would replace; choose another folder"
        )


def _write_payload(library: RunLibrary, path: str, file: Path) -> int:
    """1, or 0 where the payload cannot be made: the file is damaged, or the run, still going, has just removed it."""
    try:
        payload = library.json(path)
    except (RecordError, NotThere):
        return 0
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'PellucidData("{path}", {payload});\n', encoding="ascii")
    return 1
