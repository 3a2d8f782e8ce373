"""Rows that are almost what a stage wants: plain text as chat, a system message, the prompts of pairs."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.data import Rows, as_chat, with_prompts, with_system
from pellucid.errors import DataError

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
BYE = {"role": "assistant", "content": "bye"}
SYSTEM = {"role": "system", "content": "Be kind."}


def rows(*given: dict[str, Any]) -> Rows:
    return Rows(list(given), "file.jsonl", list(range(10, 10 + len(given))))


def test_plain_text_becomes_messages_of_the_right_speaker() -> None:
    made = as_chat(rows({"prompt": "hi", "chosen": "hello", "rejected": "bye", "n": "1"}, {"prompt": "hi"}))
    assert made == [{"prompt": [HI], "chosen": [HELLO], "rejected": [BYE], "n": "1"}, {"prompt": [HI]}]
    assert as_chat(rows({"prompt": "hi", "completion": "hello"})) == [{"prompt": [HI], "completion": [HELLO]}]


def test_the_given_rows_stay_and_keep_their_places() -> None:
    given = rows({"prompt": "hi"})
    made = with_system(as_chat(given), "Be kind.")
    assert given == [{"prompt": "hi"}]
    assert (made.source, made.lines) == ("file.jsonl", [10])
    assert made == [{"prompt": [SYSTEM, HI]}]


def test_as_chat_refuses_what_it_cannot_wrap() -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:11: field 'prompt' is a list of messages already"):
        as_chat(rows({"prompt": "hi"}, {"prompt": [HI]}))
    with pytest.raises(DataError, match=r"file\.jsonl:10: no field 'prompt'"):
        as_chat(rows({"text": "hi"}))


def test_a_field_that_is_no_text_is_left_to_the_check_of_formats() -> None:
    assert as_chat(rows({"prompt": None})) == [{"prompt": None}]


def test_system_goes_in_front_of_every_shape_of_conversation() -> None:
    assert with_system(rows({"messages": [HI, HELLO]}), "Be kind.") == [{"messages": [SYSTEM, HI, HELLO]}]
    made = with_system(rows({"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]}), "Be kind.")
    assert made == [{"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]}]
    made = with_system(rows({"chosen": [HI, HELLO], "rejected": [HI, BYE]}), "Be kind.")
    assert made == [{"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, BYE]}]


def test_a_conversation_keeps_its_own_system_message() -> None:
    own = {"role": "system", "content": "Be brief."}
    assert with_system(rows({"prompt": [own, HI]}), "Be kind.") == [{"prompt": [own, HI]}]


@pytest.mark.parametrize("row", [{"prompt": "hi"}, {"text": "hi"}, {"chosen": "hi a", "rejected": "hi b"}])
def test_system_needs_a_conversation(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:10: a system message needs conversational rows; add as_chat"):
        with_system(rows(row), "Be kind.")


def test_pairs_without_a_prompt_give_what_both_sides_begin_with() -> None:
    made = with_prompts(rows({"chosen": [HI, HELLO], "rejected": [HI, BYE], "score": 1}))
    assert made == [{"prompt": [HI], "chosen": [HELLO], "rejected": [BYE], "score": 1}]
    made = with_prompts(rows({"chosen": "The tea was good", "rejected": "The tea was bad"}))
    assert made == [{"prompt": "The tea was", "chosen": " good", "rejected": " bad"}]


def test_other_rows_keep_their_prompts() -> None:
    for row in ({"prompt": "hi", "chosen": "a", "rejected": "b"}, {"prompt": "hi"}, {"text": "hi"}):
        assert with_prompts(rows(row)) == [row]


def test_a_pair_of_a_wrong_shape_is_named() -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:11: no field 'rejected'"):
        with_prompts(rows({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b"}))
