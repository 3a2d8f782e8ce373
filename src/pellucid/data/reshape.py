"""Rows -> rows of another shape, for data sets that are almost what a stage wants."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.data.chat import Message
from pellucid.data.formats import detect_format, preference_parts
from pellucid.data.sources import Row, Rows, where
from pellucid.errors import DataError

SPEAKERS = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


def as_chat(rows: Rows) -> Rows:
    """Plain text -> a conversation: the prompt is the user's message, what answers it is the assistant's.

    Raises DataError for a row without a prompt, or of messages already.
    """
    for index, row in enumerate(rows):
        if "prompt" not in row:
            raise DataError(f"{where(rows, index)}: no field 'prompt' to make the user's message from (as_chat)")
        for field in SPEAKERS:
            if isinstance(row.get(field), list):
                raise DataError(
                    f"{where(rows, index)}: field {field!r} is a list of messages already; leave out as_chat"
                )
    return _like(rows, [row | {f: _said(f, row[f]) for f in SPEAKERS if isinstance(row.get(f), str)} for row in rows])


def with_system(rows: Rows, system: str) -> Rows:
    """The system message in front of every conversation that does not begin with one.

    Raises DataError for a row that is no conversation.
    """
    return _like(rows, [_with_system(rows, index, system) for index in range(len(rows))])


def with_prompts(rows: Rows) -> Rows:
    """Preference pairs without a prompt -> the same with one, what both sides begin with; other rows as they are.

    Raises DataError for a pair of a wrong shape.
    """
    if "prompt" in rows[0] or not {"chosen", "rejected"} <= rows[0].keys():
        return rows
    detect_format(rows, wanted=("preference",))
    parts = [dict(zip(("prompt", "chosen", "rejected"), preference_parts(row), strict=True)) for row in rows]
    return _like(rows, [row | part for row, part in zip(rows, parts, strict=True)])


def _said(field: str, text: str) -> list[Message]:
    return [{"role": SPEAKERS[field], "content": text}]


def _with_system(rows: Rows, index: int, system: str) -> Row:
    row = rows[index]
    beginnings = next((f for f in (("messages",), ("prompt",), ("chosen", "rejected")) if f[0] in row), ())
    if not beginnings or not all(isinstance(row.get(field), list) for field in beginnings):
        raise DataError(
            f"{where(rows, index)}: a system message needs conversational rows; add as_chat = true for a plain prompt"
        )
    return row | {field: _led(row[field], system) for field in beginnings}


def _led(messages: Sequence[Message], system: str) -> list[Message]:
    led = messages and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return [*messages] if led else [{"role": "system", "content": system}, *messages]


def _like(rows: Rows, made: list[Row]) -> Rows:
    return Rows(made, rows.source, rows.lines)
