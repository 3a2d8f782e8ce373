"""Reading what was recorded. Light: neither torch nor transformers is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.errors import RecordError
from pellucid.trace.schema import READABLE_VERSIONS

STEP_FILE = re.compile(r"step-(\d{6,})\.parquet")


def rollout_path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}.parquet"


def manifest_path(run_dir: Path, step: int) -> Path:
    return run_dir / "manifests" / f"step-{step:06d}.json"


def recorded_steps(run_dir: Path) -> list[int]:
    """Steps that have a file in rollouts/, ascending."""
    found = (STEP_FILE.fullmatch(path.name) for path in (run_dir / "rollouts").glob("step-*.parquet"))
    return sorted(int(match[1]) for match in found if match)


def read_manifest(path: Path) -> dict[str, Any]:
    """A step's manifest. Raises RecordError when it is missing, damaged, foreign, or of an unknown schema version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: is missing; the step's tensors are in rollouts/, their origins are not") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read ({_short(error)}); restore it, or record the step again") from error
    if not isinstance(manifest, dict) or "schema_version" not in manifest or "tensors" not in manifest:
        raise RecordError(f"{path}: is not a manifest of Pellucid's")
    _require_readable(path, manifest["schema_version"], manifest.get("pellucid"))
    return manifest


def open_rollout(path: Path) -> pq.ParquetFile:
    """A step's Parquet file. Raises RecordError as `read_manifest` does."""
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise RecordError(f"{path}: is missing; the step was not recorded, or its record was not kept") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RecordError(
            f"{path}: is not a whole Parquet file ({_short(error)}); restore it, or record the step again"
        ) from error
    metadata = file.schema_arrow.metadata or {}
    if b"pellucid.schema_version" not in metadata:
        file.close()
        raise RecordError(f"{path}: is a Parquet file, but not a record of Pellucid's")
    version = metadata[b"pellucid.schema_version"].decode(errors="replace")
    _require_readable(path, version, metadata.get(b"pellucid.version", b"").decode(errors="replace"))
    return file


def read_rollout(path: Path) -> pa.Table:
    """All of a step's Parquet file. Raises RecordError as `open_rollout` does, also for damage within."""
    with open_rollout(path) as file:
        try:
            return file.read()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RecordError(f"{path}: is damaged ({_short(error)}); restore it, or record the step again") from error


def read_spans(path: Path) -> list[dict[str, Any]]:
    """The complete events ("ph": "X") of spans.json, in file order; a file that a crash cut short is read up to the cut.

    Raises RecordError when it cannot be read at all; a missing file has no spans.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({_short(error)})") from error
    events = []
    for line in text.splitlines():  # one event a line
        line = line.strip().strip("[],")
        if line:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                break
            if _is_span(event):
                events.append(event)
    return events


def _is_span(event: Any) -> bool:
    """Whether it is one of ours; others may have been written into the file by other tools."""
    ours = isinstance(event, dict) and event.get("ph") == "X" and isinstance(event.get("args"), dict)
    return ours and isinstance(event["args"].get("step"), int)


def read_vocabulary(run_dir: Path) -> pa.Table | None:
    """(id, bytes, special) of every token, or None where none was recorded. Raises RecordError for a damaged file."""
    path = run_dir / "vocabulary.parquet"
    if not path.exists():
        return None
    try:
        with pq.ParquetFile(
            path
        ) as file:  # pq.read_table would import pyarrow.dataset, which takes longer than the reading
            return file.read().select(["id", "bytes", "special"])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RecordError(f"{path}: cannot be read ({_short(error)}); tokens are shown by their ids") from error


def _require_readable(path: Path, version: Any, writer: str | None) -> None:
    if str(version) not in map(str, READABLE_VERSIONS):
        by = f" by Pellucid {writer}" if writer else ""
        raise RecordError(
            f"{path}: written{by} in schema version {version}; this Pellucid reads version "
            f"{', '.join(map(str, READABLE_VERSIONS))}: open it with Pellucid {writer or 'of that version'} or newer"
        )


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120]
