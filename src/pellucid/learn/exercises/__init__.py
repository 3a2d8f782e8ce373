"""Three short exercises a chapter: write a function, and have it checked against the library or a closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Exercise(NamedTuple):
    """name: of the function to write. starter: its `def` line, docstring and an empty body. check: takes the function, and
    raises AssertionError with a sentence that helps when an answer is wrong."""

    name: str
    question: str
    question_zh: str
    starter: str
    check: Callable[[Callable[..., Any]], None]
