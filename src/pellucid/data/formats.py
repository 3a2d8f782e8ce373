"""The shapes that a row can have (TRL's data set types), and the check of every row against one of them.

language_modeling   {"text"}, or {"messages"}
prompt_only         {"prompt"}
prompt_completion   {"prompt", "completion"}
preference          {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"}, the prompt in common
unpaired            {"prompt", "completion", "label"}, label being true or false

A data set is plain (the fields are strings) or conversational (they are lists of {"role", "content"}).
Further fields are allowed everywhere and reach reward functions through Prompt.columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pellucid.data.sources import Row, Rows, where
from pellucid.errors import DataError

Format = Literal["language_modeling", "prompt_only", "prompt_completion", "preference", "unpaired"]
SHOWN = 800
"""Characters of a field that describe() shows."""

# The richest shape first: a row with a completion and a label also has everything that a prompt-only row has.
FIELDS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"),),
    "prompt_completion": (("prompt", "completion"),),
    "prompt_only": (("prompt",),),
    "language_modeling": (("messages",), ("text",)),
}


def detect_format(rows: Sequence[Row], wanted: Sequence[Format] = ()) -> Format:
    """The format of a data set, told by the fields of its first row; every row is then checked against it.

    wanted: the formats that the caller can use, in order of preference; () means any. Raises DataError,
    naming the place of the row, when a field is missing or of a wrong type, or when plain and conversational
    rows are mixed.
    """
    if not rows:
        raise DataError(f"{rows.source if isinstance(rows, Rows) else 'data'}: the data set is empty")
    candidates: Sequence[Format] = wanted or tuple(FIELDS)
    for name in candidates:
        if fields := fields_of(rows[0], name):
            _check_rows(rows, name, fields)
            return name
    shapes = " or ".join(_shape(fields) for name in candidates for fields in FIELDS[name])
    raise DataError(f"{where(rows, 0)}: the row has {_shape(sorted(rows[0]))}, wanted {shapes}{_rename_hint(rows)}")


def is_conversational(row: Row, name: Format) -> bool:
    """Whether a row of that format holds chat messages rather than text. Its further fields do not count."""
    return any(isinstance(row[field], list) for field in fields_of(row, name))


def fields_of(row: Row, name: Format) -> tuple[str, ...]:
    """The fields that make the row one of that format; () if it is not one."""
    return next((fields for fields in FIELDS[name] if all(field in row for field in fields)), ())


def preference_parts(row: Row) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a preference row; without a prompt it is the longest common beginning."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    shorter, same = min(len(chosen), len(rejected)), 0
    while same < shorter - isinstance(chosen, list) and chosen[same] == rejected[same]:
        same += 1  # of messages, at least one stays outside of the prompt
    if isinstance(chosen, str) and chosen != rejected:
        while same and not chosen[same - 1].isspace():
            same -= 1  # never cut a word in two ...
        same -= same > 0 and chosen[same - 1] == " "  # ... and leave its space to it, as byte-level tokens have it
    return chosen[:same], chosen[same:], rejected[same:]


def describe(rows: Sequence[Row], tokenizer: Any = None, wanted: Sequence[Format] = ()) -> str:
    """For people: the detected format, the number of rows, and the first row as the model will read it.

    tokenizer: renders conversational rows through its chat template; without one they are listed turn by
    turn.
    """
    name = detect_format(rows, wanted)
    row = rows[0]
    kind = "conversational" if is_conversational(row, name) else "plain"
    source = f"{rows.source}: " if isinstance(rows, Rows) else ""
    lines = [f"{source}{name} ({kind}), {len(rows):,} row{'s' if len(rows) != 1 else ''}"]
    if name == "preference":
        shown = dict(zip(("prompt", "chosen", "rejected"), preference_parts(row), strict=True))
    else:
        shown = {field: row[field] for field in fields_of(row, name)}
    for field, value in shown.items():
        text = _rendered(field, value, tokenizer)
        if len(text) > SHOWN:
            text = f"{text[:SHOWN]}... ({len(text) - SHOWN:,} more characters)"
        lines += [f"  {field}:", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines)


def _rendered(field: str, value: Any, tokenizer: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if tokenizer is not None and tokenizer.chat_template and field in ("prompt", "messages") and value:
        from pellucid.data.chat import render

        return render(tokenizer, value, reply_follows=field == "prompt")
    return "\n".join(f"[{message['role']}] {message['content']}" for message in value)


# --- checks -------------------------------------------------------------------------------------------------


def _check_rows(rows: Sequence[Row], name: Format, fields: tuple[str, ...]) -> None:
    conversational = is_conversational(rows[0], name)
    for index, row in enumerate(rows):
        missing = [field for field in fields if field not in row]
        if missing:
            raise DataError(
                f"{where(rows, index)}: no field {missing[0]!r}; the row has {_shape(sorted(row))}, "
                f"{name} wants {_shape(fields)}"
            )
        for field in fields:
            wrong = _wrong_type(field, row[field], conversational)
            if wrong:
                raise DataError(f"{where(rows, index)}: field {field!r} {wrong}")


def _wrong_type(field: str, value: Any, conversational: bool) -> str:
    """What is wrong with a field's value, or nothing."""
    if field == "label":
        return "" if isinstance(value, bool) else f"is {_type(value)}, wanted true or false"
    if field == "text" or not (conversational or field == "messages"):
        if isinstance(value, str):
            return ""
        mixed = "; a data set is all plain or all conversational" if isinstance(value, list) else ""
        return f"is {_type(value)}, wanted a string{mixed}"
    if not isinstance(value, list):
        mixed = "; a data set is all plain or all conversational" if isinstance(value, str) else ""
        return f"is {_type(value)}, wanted a list of messages{mixed}"
    if not value:
        return "is an empty list of messages"
    for turn, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"message {turn} is {_type(message)}, wanted an object with role and content"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = _type(message[key]) if key in message else "missing"
                return f"message {turn}: {key} is {got}, wanted a string"
    return ""


def _type(value: Any) -> str:
    if value is None:
        return "null"
    return f"of type {type(value).__name__}"


def _shape(fields: Sequence[str]) -> str:
    return "{" + ", ".join(fields) + "}"


def _rename_hint(rows: Sequence[Row]) -> str:
    return ". Rename fields with `columns`, ours <- theirs" if rows[0] else ""
