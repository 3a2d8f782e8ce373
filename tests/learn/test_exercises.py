"""What all chapters' exercises share: three each, in both languages, with a starter that is the function to fill in."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pellucid.learn import CHAPTERS, Chapter
from pellucid.learn.command import exercises_of


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.slug)
def test_each_chapter_asks_for_three_functions(chapter: Chapter) -> None:
    exercises = exercises_of(chapter)
    assert len({exercise.name for exercise in exercises}) == len(exercises) == 3
    for exercise in exercises:
        names: dict[str, Any] = {}
        exec(exercise.starter, names)
        assert callable(names[exercise.name])
        assert exercise.question and re.search(r"[\u4e00-\u9fff]", exercise.question_zh)
