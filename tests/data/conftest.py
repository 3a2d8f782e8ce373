"""Tokenizers for the data tests: a small byte-level one, and the same with a ChatML template."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pellucid.data import train_bpe

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["The soup was cold.", "We are sorry, and we will heat it.", "user assistant system hello there"] * 5


@pytest.fixture(scope="session")
def _trained() -> Any:
    return train_bpe(TEXTS, 300)


@pytest.fixture
def plain(_trained: Any) -> Any:
    return copy.deepcopy(_trained)


@pytest.fixture
def chatml(plain: Any) -> Any:
    """As Qwen's: EOS is <|end|>, but a turn is closed by <|im_end|> and a newline."""
    plain.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    plain.chat_template = CHATML
    return plain
