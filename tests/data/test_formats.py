"""Each format is told from its fields, and each row is held to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pellucid.data import describe, detect_format, read_rows
from pellucid.data.formats import preference_parts
from pellucid.errors import DataError

USER = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "Hello"}]
UNPAIRED = {"prompt": "a", "completion": "b"}
OTHER = [{"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    ("row", "name", "kind"),
    [
        ({"text": "a"}, "language_modeling", "plain"),
        ({"messages": USER + REPLY}, "language_modeling", "conversational"),
        ({"prompt": "a"}, "prompt_only", "plain"),
        ({"prompt": USER, "answer": "4"}, "prompt_only", "conversational"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "plain"),
        ({"prompt": USER, "completion": REPLY}, "prompt_completion", "conversational"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "plain"),
        ({"prompt": USER, "chosen": REPLY, "rejected": OTHER}, "preference", "conversational"),
        ({"chosen": "a b", "rejected": "a c"}, "preference", "plain"),
        ({"chosen": USER + REPLY, "rejected": USER + OTHER}, "preference", "conversational"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired", "plain"),
        ({"prompt": USER, "completion": REPLY, "label": False}, "unpaired", "conversational"),
    ],
)
def test_every_format_is_detected(row: dict[str, Any], name: str, kind: str) -> None:
    assert detect_format([row, row]) == name
    assert describe([row, row]).startswith(f"{name} ({kind}), 2 rows\n")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"text": "a"},
            {"txt": "a"},
            r"no field 'text'; the row has \{txt\}, language_modeling wants \{text\}",
        ),
        ({"text": "a"}, {"text": 3}, "field 'text' is of type int, wanted a string"),
        ({"text": "a"}, {"text": None}, "field 'text' is null, wanted a string"),
        ({"prompt": "a"}, {"prompt": USER}, "wanted a string; a data set is all plain or all conversational"),
        ({"prompt": USER}, {"prompt": "a"}, "wanted a list of messages; a data set is all plain"),
        ({"messages": USER}, {"messages": []}, "is an empty list of messages"),
        ({"messages": USER}, {"messages": ["a"]}, "message 1 is of type str, wanted an object"),
        (
            {"messages": USER},
            {"messages": [{"role": "user"}]},
            "message 1: content is missing, wanted a string",
        ),
        (UNPAIRED | {"label": True}, UNPAIRED | {"label": 1}, "'label' is of type int, wanted true or false"),
        ({"chosen": "a", "rejected": "b"}, {"chosen": "a"}, "no field 'rejected'"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{message}"):
        detect_format(read_rows(str(file)))


def test_wanted_formats_choose_and_refuse() -> None:
    row = {"prompt": "a", "completion": "b", "label": 1}
    assert detect_format([row], wanted=("prompt_only",)) == "prompt_only"
    assert detect_format([row], wanted=("prompt_completion",)) == "prompt_completion"
    with pytest.raises(DataError, match=r"row 1: .*has \{completion, label, prompt\}, wanted \{prompt, chosen, rej"):
        detect_format([row], wanted=("preference",))
    with pytest.raises(DataError, match="empty"):
        detect_format([])


def test_other_fields_do_not_make_a_plain_prompt_conversational() -> None:
    row = {"prompt": "a", "chosen": USER + REPLY, "rejected": USER + OTHER}
    assert "(plain)" in describe([row], wanted=("prompt_only",))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Sky is blue.", "Sky is black.", "Sky is"),  # not "Sky is bl": words stay whole, with their space
        ("Yes", "No", ""),
        ("a b", "a b", "a b"),
        ("ab", "ab cd", ""),
        (USER + REPLY, USER + OTHER, USER),
        (USER + REPLY, USER + REPLY, USER),  # the same twice: the last message is still the completion
    ],
)
def test_an_implicit_prompt_is_the_common_beginning(chosen: Any, rejected: Any, prompt: Any) -> None:
    found, *sides = preference_parts({"chosen": chosen, "rejected": rejected})
    assert found == prompt
    assert [found + side for side in sides] == [chosen, rejected]


def test_describe_shows_the_text_that_the_model_reads(chatml: Any) -> None:
    row = {"prompt": USER, "chosen": REPLY, "rejected": OTHER}
    text = describe([row], chatml)
    assert "<|im_start|>user\n    Hi<|im_end|>\n    <|im_start|>assistant" in text
    assert "[assistant] No" in text
    assert "... (100 more characters)" in describe([{"text": "a" * 900}])
