"""Payloads as text that any reader takes: JSON without NaN, safe inside a script; arrays as base64, which keeps NaN."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np


def to_json(payload: Any) -> str:
    """Pure ASCII, so that unpaired surrogates and line separators survive as escapes; `<` is escaped too, so that no string
    of a payload can end the script that holds it. Raises ValueError for a number that JSON cannot hold."""
    return json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def clean(value: Any) -> Any:
    """What was read from JSON or TOML, as strict JSON can hold it: NaN and infinities become None, dates become text."""
    if isinstance(value, dict):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def numbers(values: np.ndarray) -> list[float | int | bool | None]:
    """A column of numbers as a list. Float32 keeps the few digits that tell it apart (0.1, not 0.10000000149011612)."""
    if values.dtype.kind != "f":
        return values.tolist()
    shown: list[Any] = (values.astype("U32").astype(np.float64) if values.dtype == np.float32 else values).tolist()
    for row in np.flatnonzero(~np.isfinite(values)):
        shown[row] = None
    return shown


def array(values: np.ndarray) -> dict[str, str]:
    """{"dtype", "data"}: little-endian float32 (f4), int32 (i4) or one byte a boolean (u1), in base64.

    Raises OverflowError for an integer beyond int32, ValueError for what is not a number.
    """
    kind = {"f": "f4", "i": "i4", "u": "i4", "b": "u1"}.get(values.dtype.kind)
    if kind is None:
        raise ValueError(f"a list of {values.dtype} is not an array of numbers")
    if kind == "i4" and values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
        raise OverflowError("an integer does not fit into 32 bits")
    return {"dtype": kind, "data": base64.b64encode(values.astype(f"<{kind}").tobytes()).decode("ascii")}
