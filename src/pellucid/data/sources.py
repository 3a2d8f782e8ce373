"""Where rows come from: JSONL and Parquet files, the built-in corpus, the Hugging Face Hub."""

from __future__ import annotations

import gzip
import json
import os
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from pellucid.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class Rows(list[Row]):
    """Rows that remember where each of them stands, so that a message about one can point at it.

    source: what the user wrote. lines: the line of each row in a text file; None where rows are only counted.
    """

    def __init__(self, rows: Sequence[Row], source: str, lines: list[int] | None = None) -> None:
        super().__init__(rows)
        self.source = source
        self.lines = lines


def where(rows: Sequence[Row], index: int) -> str:
    """The place of a row as a user looks for it: "pairs.jsonl:12", or "row 12 of pairs.parquet" (from 1)."""
    if not isinstance(rows, Rows):
        return f"row {index + 1}"
    if rows.lines is None:
        return f"row {index + 1} of {rows.source}"
    return f"{rows.source}:{rows.lines[index]}"


def read_rows(
    source: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int = 0,
    seed: int = 0,
) -> Rows:
    """All rows of a source, or its first `limit` (0 means all).

    source: a path that ends in .jsonl, .jsonl.gz or .parquet; "corpus:NAME", which is drawn from `seed`;
    "hub:org/name" or "hub:org/name/config". split: of a Hub data set only. columns: renames fields, ours <-
    theirs, as in {"prompt": "question"}.

    Raises DataError: missing or unreadable source, no rows at all, a row without a field that `columns`
    names.
    """
    if source.startswith("corpus:"):
        from pellucid.data.corpus import corpus_rows

        rows = Rows(corpus_rows(source.removeprefix("corpus:"), seed=seed, count=limit), source)
    elif source.startswith("hub:"):
        rows = Rows(_from_hub(source.removeprefix("hub:"), split, limit), source)
    else:
        rows = _from_file(source, limit)
    if not rows:
        raise DataError(f"{source}: the data set is empty")
    return _renamed(rows, columns) if columns else rows


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    theirs = set(columns.values())
    for index, row in enumerate(rows):
        missing = [name for name in columns.values() if name not in row]
        if missing:
            raise DataError(
                f"{where(rows, index)}: no field {missing[0]!r}, which `columns` asks for; "
                f"the row has {', '.join(sorted(row)) or 'no fields'}"
            )
    renamed = [
        {k: v for k, v in row.items() if k not in theirs} | {ours: row[name] for ours, name in columns.items()}
        for row in rows
    ]
    return Rows(renamed, rows.source, rows.lines)


# --- files --------------------------------------------------------------------------------------------------


def check_file(path: str | Path) -> Path:
    """The path, if a file is there. Raises DataError with the nearest name that does exist."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{path} is a folder, a file is needed ({', '.join(SUFFIXES)})")
    if file.is_file():
        return file
    if not file.parent.is_dir():
        raise DataError(f"{path}: no such file, nor the folder {file.parent}")
    raise DataError(f"{path}: no such file{nearest(file)}")


def nearest(path: Path) -> str:
    """'; did you mean X?' for the closest name beside a path that does not exist, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _from_file(source: str, limit: int) -> Rows:
    if not source.endswith(SUFFIXES):
        check_file(source)
        raise DataError(f"{source}: unknown kind of file; pellucid reads {', '.join(SUFFIXES)}")
    file = check_file(source)
    try:
        if source.endswith(".parquet"):
            return Rows(_parquet_rows(file, limit), source)
        numbered = list(islice(_jsonl_rows(file, source), limit or None))
    except PermissionError as error:
        raise DataError(f"{source}: not readable ({error.strerror})") from error
    return Rows([row for _, row in numbered], source, [line for line, _ in numbered])


def _jsonl_rows(file: Path, source: str) -> Iterator[tuple[int, Row]]:
    """(line number, row); blank lines are passed over but counted."""
    line = 0
    with gzip.open(file, "rb") if source.endswith(".gz") else file.open("rb") as stream:
        while True:
            line += 1
            try:
                text = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{source}:{line}: not a whole gzip file ({error})") from error
            if not text:
                return
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
                raise DataError(f"{source}:{line}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}:{line}: a {type(row).__name__}, each line must be a JSON object")
            yield line, row


def _parquet_rows(file: Path, limit: int) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                rows += batch.to_pylist()
                if limit and len(rows) >= limit:
                    return rows[:limit]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    return rows


# --- the Hub ------------------------------------------------------------------------------------------------


def _from_hub(name: str, split: str, limit: int) -> list[Row]:
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"hub:{name}: write hub:org/name, or hub:org/name/config")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hub:{name} needs the `datasets` package: pip install 'pellucid[hub]'") from error
    if not hub_offline() and not hub_reachable():
        raise DataError(
            f"hub:{name}: the Hub cannot be reached. Set HF_HUB_OFFLINE=1 if the data set is in the cache, "
            "or give a .jsonl or .parquet path."
        )
    try:
        found = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except Exception as error:  # the Hub's client raises a dozen kinds, from its own packages and from its HTTP ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"hub:{name} (split {split!r}) could not be loaded: {reason}") from error
    return [dict(row) for row in (found.select(range(min(limit, len(found)))) if limit else found)]


def hub_offline() -> bool:
    """Whether the user told the Hub's client to use its cache only (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether anything answers at the Hub's address within `timeout` seconds, through a proxy if one is set.

    The Hub's own client retries a dead network for about 45 seconds before it says so.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only with a refusal
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # someone is there; the Hub's client may know the certificate
    except (OSError, ValueError):
        return False
    return True
