"""Chapter 7: the exercises' checks, the estimators against closed forms, the claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid.core import AdaptiveKL
from pellucid.learn import CHAPTERS
from pellucid.learn.chapter_7_kl import HORIZON, PAIRS, TARGET, adaptive, estimators, penalty
from pellucid.learn.exercises.chapter_7 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_7 import draws, expected_gradient, first_of_two_tokens, weak_ppo
from pellucid.metrics import Reporter

CHECKS = {exercise.name: exercise.check for exercise in EXERCISES}


def lesson_of(folder: Path, seed: int = 0) -> Lesson:
    return Lesson(CHAPTERS[6], folder, seed, Reporter(quiet=True))


# ---------------------------------------------------------------- exercises


def shaped_rewards(score: float, logprobs: list[float], ref_logprobs: list[float], kl_coef: float) -> list[float]:
    rewards = [-kl_coef * (new - old) for new, old in zip(logprobs, ref_logprobs, strict=True)]
    return [*rewards[:-1], rewards[-1] + score]


def kl_loss_per_token(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    log_ratio = logprobs - ref_logprobs
    return ((-log_ratio).exp() - 1 + log_ratio) * (logprobs - logprobs.detach()).exp()


def next_coef(coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


RIGHT = {"shaped_rewards": shaped_rewards, "kl_loss_per_token": kl_loss_per_token, "next_coef": next_coef}
WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("shaped_rewards", lambda s, new, old, c: [-c * (a - b) for a, b in zip(new, old, strict=True)], "earns the score"),
    ("shaped_rewards", lambda s, new, old, c: [*[0.0] * (len(new) - 1), s], "it is taken off"),
    ("shaped_rewards", lambda s, new, old, c: [s], "a response of 2 tokens has 2 rewards"),
    ("kl_loss_per_token", lambda new, ref: (ref - new).exp() - 1 + new - ref, "live ratio"),
    ("kl_loss_per_token", lambda new, ref: (new - ref).square() / 2, "its value is k3"),
    ("kl_loss_per_token", lambda new, ref: kl_loss_per_token(new, ref).sum(), "one loss a token"),
    ("next_coef", lambda c, kl, target, n, h: c * (1 + (kl / target - 1) * n / h), "clip"),
    ("next_coef", lambda c, kl, target, n, h: c * (1 - max(-0.2, min(0.2, kl / target - 1)) * n / h), "must rise"),
]


def test_every_exercise_has_an_answer() -> None:
    assert len(EXERCISES) == 3 and set(RIGHT) == set(CHECKS)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answer_passes(name: str) -> None:
    CHECKS[name](RIGHT[name])


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_wrong_answer_is_told_why(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        CHECKS[name](answer)


# ---------------------------------------------------------------- the estimators


@pytest.mark.parametrize("seed", range(5))
def test_claims_about_the_estimators_hold(tmp_path: Path, seed: int) -> None:
    lesson = lesson_of(tmp_path, seed)
    estimators(lesson)
    assert len(lesson.claims) == 6
    assert [claim.text for claim in lesson.claims if not claim.holds] == []


def test_expected_gradient_is_that_of_the_closed_form() -> None:
    """d KL(π‖ref) / d logit_i = π_i (l_i − KL), worked out by hand; for k3 it is π_i − ref_i, that of KL(ref‖π)."""
    logits, ref = draws(0, 2, 6)
    pi, ref = logits.softmax(0), ref.log_softmax(0)
    log_ratio = logits.log_softmax(0) - ref
    kl = (pi * log_ratio).sum()
    k2 = expected_gradient(lambda lp: (lp - ref).square() / 2, logits)
    k3 = expected_gradient(lambda lp: (ref - lp).exp() - 1 + lp - ref, logits)
    torch.testing.assert_close(k2, pi * (log_ratio - kl))
    torch.testing.assert_close(k3, pi - ref.exp())


def test_two_tokens_against_all_sixteen_sequences() -> None:
    """The gradient of the whole KL at the first token, by central differences over the sum over all sequences."""
    first, first_ref = draws(0, 2, 4).tolist()
    second, second_ref = (logits.log_softmax(-1).tolist() for logits in draws(0, 3, 4, 4)[1:])

    def softmax(logits: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    def whole_kl(logits: list[float]) -> float:
        pi, ref = softmax(logits), softmax(first_ref)
        pairs = itertools.product(range(4), range(4))
        return sum(
            pi[a] * math.exp(second[a][b]) * (math.log(pi[a] / ref[a]) + second[a][b] - second_ref[a][b])
            for a, b in pairs
        )

    step, slopes = 1e-5, []
    for i in range(4):
        up, down = ([x + sign * step * (i == j) for j, x in enumerate(first)] for sign in (1, -1))
        slopes.append((whole_kl(up) - whole_kl(down)) / (2 * step))
    pi, ref = softmax(first), softmax(first_ref)
    alone = [math.log(p / r) for p, r in zip(pi, ref, strict=True)]
    mean = sum(p * x for p, x in zip(pi, alone, strict=True))
    k2 = [p * (x - mean) for p, x in zip(pi, alone, strict=True)]
    off = math.dist(k2, slopes) / math.hypot(*slopes)
    assert first_of_two_tokens(0) == pytest.approx((0, off), abs=1e-8)


# ---------------------------------------------------------------- the runs


def test_price_adds_up_on_a_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations over hardly trained models: the shaped reward by hand is the one that was trained on."""
    monkeypatch.setattr("pellucid.learn.measures.chapter_7.SFT_STEPS", 4)
    monkeypatch.setattr("pellucid.learn.measures.chapter_7.RM_STEPS", 2)
    lesson = lesson_of(tmp_path)
    with weak_ppo(lesson, pairs=64, steps=2, held_out=16, runs=1) as ppo:
        run = ppo(kl_coef=0.3, far=True)
    assert [point.step for point in run.points] == [0, 2]
    assert run.points[0].kl == pytest.approx(0, abs=1e-4) and run.kl[0] == pytest.approx(0, abs=1e-4)
    assert run.coefs == [0.3, 0.3]
    penalty(lesson, run)
    assert lesson.claims[0].holds
    spoiled = run._replace(coef=0.31)
    penalty(lesson, spoiled)
    assert not lesson.claims[1].holds


def test_adaptive_coefficient_is_that_of_the_controller() -> None:
    kls = [0.0, 4.9, 5.5, 6.1, 50.0, 5.0]
    controller = AdaptiveKL(0.3, TARGET, HORIZON)
    assert adaptive(0.3, kls, 64) == pytest.approx([0.3, *(controller.update(kl, 64) for kl in kls[:-1])])


@pytest.mark.slow
def test_claims_hold(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path)
    CHAPTERS[6].load().run(lesson)
    assert PAIRS < 500 and len(lesson.claims) == 12
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
