"""Payloads of the inspector, read as a browser reads them."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

FORMATS = {"f4": "f", "i4": "i", "u1": "B"}


def strict(text: str) -> Any:
    """JSON as browsers take it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def get(library: Any, path: str) -> Any:
    return strict(library.json(path))


def unpacked(array: dict) -> list:
    data = base64.b64decode(array["data"])
    return list(
        struct.unpack(f"<{len(data) // struct.calcsize(FORMATS[array['dtype']])}{FORMATS[array['dtype']]}", data)
    )
