"""`pellucid learn`: lists the chapters, runs them, hands out their exercises and checks the answers."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import ConfigError
from pellucid.files import atomic_write
from pellucid.learn import CHAPTERS, Chapter
from pellucid.learn.exercises import Exercise
from pellucid.learn.lesson import Lesson
from pellucid.metrics import Reporter


def learn(chapter: str | None, seed: int, out: Path, exercises: bool, check: Path | None) -> int:
    """chapter: a number, "all", or None for the list. Returns the exit code: 1 when a claim or an answer does not hold."""
    if chapter is None:
        _list()
        return 0
    chosen = CHAPTERS if chapter == "all" else (_chapter(chapter),)
    if exercises or check:
        return max(_check(one, check) if check else _hand_out(one, out) for one in chosen)
    lessons = [_run(one, out / one.slug, seed) for one in chosen]
    return int(not all(claim.holds for lesson in lessons for claim in lesson.claims))


def _list() -> None:
    reporter = Reporter()
    rows = [[str(c.number), f"{c.title} · {c.title_zh}", f"{c.seconds} s"] for c in CHAPTERS]
    reporter.table("The road", ["", "chapter", "on two cores"], rows)
    reporter.say(
        "pellucid learn 1 runs a chapter, pellucid learn all runs them in turn, pellucid learn 1 --exercises asks"
    )
    reporter.say("the texts: docs/learn/en and docs/learn/zh, or the help of pellucid view")


def _chapter(text: str) -> Chapter:
    found = [chapter for chapter in CHAPTERS if str(chapter.number) == text]
    if not found:
        raise ConfigError(f"learn: there is no chapter {text!r}; the chapters are 1 to {len(CHAPTERS)}, and all")
    return found[0]


def _run(chapter: Chapter, folder: Path, seed: int) -> Lesson:
    lesson = Lesson(chapter, folder, seed)
    lesson.reporter.title(f"{chapter.number} · {chapter.title}")
    threads = torch.get_num_threads()
    torch.set_num_threads(chapter.threads or threads)
    try:
        chapter.load().run(lesson)
    finally:
        torch.set_num_threads(threads)
    lesson.finish()
    return lesson


def exercises_of(chapter: Chapter) -> tuple[Exercise, ...]:
    return importlib.import_module(f"pellucid.learn.exercises.chapter_{chapter.number}").EXERCISES


def _hand_out(chapter: Chapter, out: Path) -> int:
    """Print the questions, and write a file to fill in, unless it is there."""
    path, questions = out / f"exercises_{chapter.number}.py", exercises_of(chapter)
    for i, exercise in enumerate(questions, 1):
        print(f"{chapter.number}.{i}  {exercise.question}\n     {exercise.question_zh}\n")
    if path.exists():
        print(f"{path} is there already and is left as it is")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_check = f"pellucid learn {chapter.number} --check {path}"
        head = f'"""Exercises of chapter {chapter.number}. Check: {to_check}"""\n\nimport torch\n'
        bodies = (f"# {chapter.number}.{i}: {e.question}\n{e.starter.strip()}\n" for i, e in enumerate(questions, 1))
        atomic_write(path, "\n\n".join([head, *bodies]))
        print(f"written: {path}; fill it in, then: {to_check}")
    return 0


def _check(chapter: Chapter, path: Path) -> int:
    answers = _answers(path)
    wrong = 0
    for i, exercise in enumerate(exercises_of(chapter), 1):
        verdict = _verdict(exercise, answers)
        wrong += verdict is not None
        print(
            f"{'✓' if verdict is None else '✗'} {chapter.number}.{i} {exercise.name}"
            + (f": {verdict}" if verdict else "")
        )
    return int(wrong > 0)


def _answers(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--check {path}: there is no such file; pellucid learn N --exercises writes one to fill in")
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # somebody's own code: whatever it raises is the answer to why it cannot be checked
        raise ConfigError(f"--check {path}: does not run: {type(error).__name__}: {error}") from error


def _verdict(exercise: Exercise, answers: dict[str, Any]) -> str | None:
    """What is wrong with an answer, or None."""
    if not callable(answers.get(exercise.name)):
        return "is not written yet"
    try:
        exercise.check(answers[exercise.name])
    except AssertionError as error:
        return str(error) or "the result is not the expected one"
    except Exception as error:  # the answer's own error
        return f"raises {type(error).__name__}: {error}"
    return None
