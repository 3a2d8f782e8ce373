"""One step's Parquet file as payloads: the table of samples, sixteen samples in full, and the whitening worked out again.

Axes: N recorded samples, T tokens of one of them. Nothing here loops over tokens, but for one loop over T in `discounted`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pellucid.inspector import encode

ROWS_PER_CHUNK = 16
TABLE_COLUMNS = (
    "row", "prompt_id", "group_ids", "sample_index", "policy_version", "stop_reason", "scores", "length", "kl_sequence",
    "reward_sum", "advantage_mean", "entropy_mean", "clipped_share", "minibatch", "prompt", "response",
)  # fmt: skip
EXCERPTS = {"prompt": 100, "response": 200}
"""Characters of a text that the table of samples carries."""


def sample_table(file: pq.ParquetFile) -> dict[str, Any]:
    """The samples.json payload: the scalar columns that a table sorts and filters by."""
    names = [name for name in TABLE_COLUMNS if name in file.schema_arrow.names]
    table = file.read(columns=names)
    columns = {name: _column(table[name], EXCERPTS.get(name)) for name in names}
    return {"rows": table.num_rows, "columns": columns}


def num_chunks(file: pq.ParquetFile) -> int:
    return -(-file.metadata.num_rows // ROWS_PER_CHUNK)


def chunk(file: pq.ParquetFile, index: int, vocabulary: pa.Table | None) -> dict[str, Any]:
    """The chunk payload: rows 16 * index and the fifteen after it, every column. Reads no row group but theirs."""
    start = index * ROWS_PER_CHUNK
    stop = min(start + ROWS_PER_CHUNK, file.metadata.num_rows)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    groups = [i for i, size in enumerate(sizes) if starts[i] < stop and starts[i] + size > start]
    table = file.read_row_groups(groups).slice(start - starts[groups[0]], stop - start)
    names = table.column_names
    lists = [name for name in names if pa.types.is_list(table.schema.field(name).type)]
    scalars = {name: _column(table[name]) for name in names if name not in lists}
    samples = [{name: values[i] for name, values in scalars.items()} for i in range(table.num_rows)]
    for sample in samples:
        sample["arrays"] = {}
    ids = [np.empty(0, np.int64)]
    for name in lists:
        bounds, values = _flat(table[name])
        per_token = {"k": values.shape[1]} if values.ndim == 2 else {}
        for sample, low, high in zip(samples, bounds[:-1], bounds[1:], strict=True):
            sample["arrays"][name] = encode.array(values[low:high]) | per_token
            sample["length_tokens"] = int(high - low)
        if name in ("input_ids", "top_ids"):
            ids.append(np.unique(values))
    return {"samples": samples, "pieces": _pieces(np.unique(np.concatenate(ids)), vocabulary)}


def whitening(file: pq.ParquetFile, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """{"mean", "variance", "count", "whole"} of what was whitened, from all rows, in float64; the variance is biased.

    gae: returns - old_values over the actions. reinforce_pp: the discounted sum of the rewards to come. whole: whether the
    file holds every sample of the batch. None where nothing was whitened over tokens.
    """
    algorithm = manifest["algorithm"]
    if algorithm["advantage"] == "gae" and algorithm["whiten_advantages"]:
        table = file.read(columns=["returns", "old_values", "action_mask"])
        returns, old_values, mask = (_flat(table[name])[1] for name in ("returns", "old_values", "action_mask"))
        raw = returns[mask].astype(np.float64) - old_values[mask]
    elif algorithm["advantage"] == "reinforce_pp":
        table = file.read(columns=["rewards", "action_mask"])
        bounds, rewards = _flat(table["rewards"])
        mask = _flat(table["action_mask"])[1]
        raw = discounted(rewards, mask, bounds, algorithm["gamma"])[mask]
    else:
        return None
    if not raw.size:
        return None
    whole = file.metadata.num_rows == manifest["samples"]
    return encode.clean(
        {"mean": float(raw.mean()), "variance": float(raw.var()), "count": int(raw.size), "whole": whole}
    )


def discounted(rewards: np.ndarray, mask: np.ndarray, bounds: np.ndarray, gamma: float) -> np.ndarray:
    """sum[t] = rewards[t] + gamma * sum[next action], per sample, in float64; what is no action neither adds nor discounts.

    rewards, mask: samples end to end, sample i at bounds[i]:bounds[i+1]. Returns the same, 0 where masked out.
    """
    lengths = np.diff(bounds)
    sums, following = np.zeros(len(rewards)), np.zeros(len(lengths))
    for back in range(1, int(lengths.max(initial=0)) + 1):
        rows = np.flatnonzero(lengths >= back)
        at = bounds[rows + 1] - back
        rows, at = rows[mask[at]], at[mask[at]]
        following[rows] = sums[at] = rewards[at] + gamma * following[rows]
    return sums


def prompt_ids(file: pq.ParquetFile) -> np.ndarray:
    """(N,): the prompt of each row, by its position in the data set."""
    return file.read(columns=["prompt_id"])["prompt_id"].to_numpy()


def _column(column: pa.ChunkedArray, limit: int | None = None) -> list[Any]:
    """A scalar column as a list; a text is cut to `limit` characters."""
    if not pa.types.is_string(column.type):
        return encode.numbers(column.to_numpy())
    try:
        return (column if limit is None else pc.utf8_slice_codeunits(column, 0, limit)).to_pylist()
    except (UnicodeDecodeError, pa.ArrowInvalid):  # a file of someone else's: the type says UTF-8, the bytes do not
        return [(text or b"").decode("utf-8", "replace")[:limit] for text in column.cast(pa.binary()).to_pylist()]


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(bounds (N+1,), values) of a column of lists: row i is values[bounds[i]:bounds[i+1]].

    values: (tokens,), or (tokens,K) for a list of lists, a shorter inner list being filled up with 0.
    """
    lists = column.combine_chunks()
    bounds = lists.offsets.to_numpy().astype(np.int64)
    inner = lists.values.slice(bounds[0], bounds[-1] - bounds[0])
    if not pa.types.is_list(inner.type):
        return bounds - bounds[0], inner.to_numpy(zero_copy_only=False)
    ends = inner.offsets.to_numpy().astype(np.int64)
    sizes = np.diff(ends)
    values = inner.values.slice(ends[0], ends[-1] - ends[0]).to_numpy(zero_copy_only=False)
    filled = np.zeros((len(sizes), int(sizes.max(initial=0))), values.dtype)
    filled[np.arange(filled.shape[1]) < sizes[:, None]] = values
    return bounds - bounds[0], filled


def _pieces(ids: np.ndarray, vocabulary: pa.Table | None) -> dict[str, dict[str, Any]]:
    """What the ids stand for: text, or the bytes in hexadecimal where they are no UTF-8 by themselves."""
    if vocabulary is None:
        return {}
    found = vocabulary.filter(pc.is_in(vocabulary["id"], pa.array(ids, vocabulary["id"].type)))
    pieces = {}
    for row in found.to_pylist():
        try:
            piece: dict[str, Any] = {"text": row["bytes"].decode("utf-8")}
        except UnicodeDecodeError:
            piece = {"bytes": row["bytes"].hex()}
        pieces[str(row["id"])] = piece | ({"special": True} if row["special"] else {})
    return pieces
