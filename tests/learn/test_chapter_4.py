"""Chapter 4: what it computes against brute force and closed forms, its claims, and its exercises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid.learn import CHAPTERS
from pellucid.learn import chapter_4_ppo as chapter
from pellucid.learn.cart import Cart
from pellucid.learn.exercises.chapter_4 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_4 as measures
from pellucid.learn.measures import importance
from pellucid.metrics import Reporter


def lesson_in(folder: Path) -> Lesson:
    return Lesson(CHAPTERS[3], folder, 0, Reporter(quiet=True))


@pytest.mark.slow
def test_its_claims_hold(tmp_path: Path) -> None:
    lesson = lesson_in(tmp_path)
    chapter.run(lesson)
    assert len(lesson.claims) == 11
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
    for name in ("4-importance", "4-clip", "4-passes", "4-training", "4-race"):
        assert (tmp_path / f"{name}.png").stat().st_size < 120_000


def test_claims_that_need_no_training_hold(tmp_path: Path) -> None:
    lesson = lesson_in(tmp_path)
    importance.show_importance(lesson)
    importance.show_surrogate(lesson)
    importance.show_clip(lesson)
    assert [claim.holds for claim in lesson.claims] == [True] * 6


@pytest.mark.parametrize("loss", chapter.LOSSES.values(), ids=chapter.LOSSES)
def test_where_the_policy_is_still_the_old_one_the_three_losses_have_one_gradient(loss: chapter.Loss) -> None:
    """That of -A · log π."""
    chance = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 5, 1, dtype=torch.float64, generator=chance)
    logprobs.requires_grad_()
    (slope,) = torch.autograd.grad(loss(logprobs, logprobs.detach(), advantages).sum(), logprobs)
    torch.testing.assert_close(slope, -advantages)


def test_without_the_ratio_the_slope_does_not_change_with_the_policy() -> None:
    old, advantages = torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 2.0]])
    for moved in (-2.0, 0.5):
        logprobs = torch.full((1, 3), moved, requires_grad=True)
        (plain,) = torch.autograd.grad(chapter.LOSSES["no ratio"](logprobs, old, advantages).sum(), logprobs)
        (weighted,) = torch.autograd.grad(chapter.LOSSES["no clip"](logprobs, old, advantages).sum(), logprobs)
        torch.testing.assert_close(plain, -advantages)
        torch.testing.assert_close(weighted, -math.exp(moved) * advantages)


def test_an_iteration_goes_over_every_step_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "EPOCHS", 3)
    monkeypatch.setattr(chapter, "NUM_STEPS", 20)
    cart, seen = Cart(0, lr=1e-3, num_envs=4), []

    def spy(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        seen.append((len(logprobs), (logprobs - old_logprobs).abs().max().item(), advantages.detach()))
        return chapter.LOSSES["PPO"](logprobs, old_logprobs, advantages)

    monkeypatch.setattr(chapter, "ROWS", 32)
    chapter.ppo(cart, spy)
    assert sum(rows for rows, _, _ in seen) == 3 * cart.steps
    assert len(seen) == 3 * math.ceil(cart.steps / 32) == cart.learners[0].updates
    assert seen[0][1] < 1e-6 < seen[-1][1], "the first minibatch has the ratio 1, the last has not"
    first_epoch = torch.cat([advantages for _, _, advantages in seen[: len(seen) // 3]])
    assert first_epoch.mean().abs() < 1e-5 and first_epoch.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_kl_is_that_of_torch_and_starts_at_0() -> None:
    cart = Cart(0, lr=1e-2, num_envs=4)
    steps = chapter.with_advantages(cart.sample(20))
    old = cart.actor.logits(steps.get("observations")).log_softmax(-1).detach()
    assert measures.kl_from_old(cart, steps, old) == 0
    chapter.one_pass(cart, steps, chapter.LOSSES["PPO"], seed=0)
    now = torch.distributions.Categorical(logits=cart.actor.logits(steps.get("observations")))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=old), now).mean().item()
    assert measures.kl_from_old(cart, steps, old) == pytest.approx(expected, abs=1e-6)
    assert expected > 0


def test_a_run_stops_at_475_or_at_its_budget() -> None:
    class Fake:
        steps, recent_return = 0, 0.0

    def better(fake: Any) -> None:
        fake.steps, fake.recent_return = fake.steps + 1000, fake.recent_return + 100

    def same(fake: Any) -> None:
        fake.steps += 1000

    assert measures.run_up(Fake(), better, 100_000)[-1] == (5000, 500.0)
    assert measures.run_up(Fake(), same, 3000) == [(0, 0.0), (1000, 0.0), (2000, 0.0), (3000, 0.0)]


def test_the_race_counts_a_run_that_never_arrives_as_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget that only the first can keep; the factor then is a lower bound."""

    def fake_run(cart: Cart, iterate: Any, budget: int) -> list[tuple[int, float]]:
        return [(0, 0.0), (2000, 480.0) if iterate is chapter.ppo else (budget, 30.0)]

    monkeypatch.setattr(measures, "run_up", fake_run)
    monkeypatch.setattr(chapter, "RATES", (1e-3,))
    lesson = lesson_in(tmp_path)
    chapter.show_race(lesson, repeats=3, budget=8000)
    assert "2,000 against > 8,000 steps: 4.0 times" in lesson.claims[0].measured


# ---------------------------------------------------------------- exercises


def clipped_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, eps: float) -> Tensor:
    ratio = (logprobs - old).exp()
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - eps, 1 + eps) * advantages)


def smaller(logprobs: Tensor, old: Tensor, advantages: Tensor, eps: float) -> Tensor:
    ratio = (logprobs - old).exp()
    return torch.minimum(-ratio * advantages, -ratio.clamp(1 - eps, 1 + eps) * advantages)


def mean_kl(old: Tensor, new: Tensor) -> Tensor:
    old, new = old.log_softmax(1), new.log_softmax(1)
    return (old.exp() * (old - new)).sum(1).mean()


RIGHT = (lambda new, old, x: ((new - old).exp() * x).mean(), clipped_loss, mean_kl)
WRONG = [
    (0, lambda new, old, x: ((old - new).exp() * x).mean(), "upside down"),
    (0, lambda new, old, x: ((new - old).exp() * x).sum() / (new - old).exp().sum(), "but a bias"),
    (0, lambda new, old, x: x.mean(), "expected the mean"),
    (1, smaller, "pessimistic"),
    (1, lambda new, old, a, eps: -(new - old).exp() * a, "stays at"),
    (1, lambda new, old, a, eps: clipped_loss(new, old, a, eps).mean(), "not their mean"),
    (1, lambda new, old, a, eps: clipped_loss(new, old, a, eps).detach(), "its slope"),
    (2, lambda old, new: mean_kl(new, old), "new ‖ old"),
    (2, lambda old, new: mean_kl(old, new) * len(old), "take their mean"),
    (2, lambda old, new: mean_kl(old, new) / 2, "expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("exercise", "answer"), list(zip(EXERCISES, RIGHT, strict=True)), ids=lambda x: getattr(x, "name", "")
)
def test_right_answers_pass(exercise: Any, answer: Any) -> None:
    exercise.check(answer)


@pytest.mark.parametrize(("number", "answer", "hint"), WRONG)
def test_wrong_answers_are_told_why(number: int, answer: Any, hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        EXERCISES[number].check(answer)
