"""Chapter 2: its exact expectations against closed forms and autograd, its claims, and its exercises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid.learn import CHAPTERS
from pellucid.learn import chapter_2_policy_gradient as chapter
from pellucid.learn.exercises.chapter_2 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_2 import Listing, asymmetry, exact_gradient, rewards_to_go
from pellucid.learn.tiny_mdp import TinyMDP, machine
from pellucid.metrics import Reporter

LOGITS = torch.tensor([[0.4, -0.1], [0.2, 0.7]], dtype=torch.float64)


def lesson_of(folder: Path, seed: int) -> Lesson:
    return Lesson(CHAPTERS[1], folder, seed, Reporter(quiet=True))


@pytest.mark.parametrize("seed", range(5))
def test_claims_about_the_small_problem_hold(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("BATCHES", 400), ("ITERATIONS", 1), ("RUNS", 1)):
        monkeypatch.setattr(chapter, name, few)
    monkeypatch.setattr(chapter.measures, "noise_on_cartpole", lambda seed: ("not measured", False))
    lesson = lesson_of(tmp_path, seed)
    chapter.run(lesson)
    assert "not measured" in lesson.claims[6].measured
    assert [claim.text for claim in lesson.claims[:6] if not claim.holds] == []


@pytest.mark.slow
def test_all_claims_hold(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, 0)
    chapter.run(lesson)
    assert len(lesson.claims) == 9
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
    assert all(picture.stat().st_size < 120_000 for picture in tmp_path.glob("*.png"))


def test_reinforce_learns_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "ITERATIONS", 12)
    ticks: list[int] = []
    curve = chapter.reinforce(0, whole=False, advance=lambda: ticks.append(1))
    assert len(curve) == len(ticks) == 12
    assert sum(curve[-3:]) > 1.3 * sum(curve[:3])
    assert curve == chapter.reinforce(0, whole=False, advance=lambda: None)


def test_exact_gradient_is_that_of_autograd() -> None:
    """Through the recursion for the expected return, in place of finite differences."""
    logits, world = LOGITS.clone().requires_grad_(), machine(horizon=4)
    world.expected_return(logits.softmax(-1), 0.9).backward()
    assert logits.grad is not None
    torch.testing.assert_close(exact_gradient(world, LOGITS, 0.9), logits.grad, rtol=1e-7, atol=1e-9)


def test_a_bandit_in_closed_form() -> None:
    """One step, two actions with rewards 1 and 3, π = (1-p, p): the slope is ± 2 p (1-p), the variance a sum of two terms."""
    rewards, p = torch.tensor([[1.0, 3.0]], dtype=torch.float64), 0.3
    world = TinyMDP(torch.ones(1).double(), torch.ones(1, 2, 1).double(), rewards, horizon=1)
    logits = torch.tensor([[1 - p, p]], dtype=torch.float64).log()
    every, slope = Listing(world, logits, gamma=0.5), 2 * p * (1 - p)
    mean, variance, error = every.moments(chapter.estimates(logits, *every.paths, every.to_go))
    torch.testing.assert_close(mean, torch.tensor([[-slope, slope]], dtype=torch.float64))
    torch.testing.assert_close(every.slope, mean, rtol=1e-7, atol=0)
    assert error < 1e-7
    # Each of the two numbers is ± reward * (probability of the other action).
    second = (1 - p) * (1 * p) ** 2 + p * (3 * (1 - p)) ** 2
    assert variance == pytest.approx(2 * (second - slope**2))


def test_estimates_are_the_gradients_of_a_loss_over_samples() -> None:
    world, logits = machine(horizon=3), LOGITS.clone().requires_grad_()
    states, actions = world.sample(LOGITS.softmax(-1), 5, torch.Generator().manual_seed(0))
    weights = rewards_to_go(world.rewards[states, actions], 0.9)
    each = chapter.estimates(LOGITS, states, actions, weights)
    for i in range(5):
        logits.grad = None
        sum(weights[i, t] * logits[states[i, t]].log_softmax(-1)[actions[i, t]] for t in range(3)).backward()
        assert logits.grad is not None
        torch.testing.assert_close(each[i], logits.grad)


def test_values_are_those_of_the_bellman_equation() -> None:
    """Backwards from the last step, in place of the mean over trajectories."""
    world, policy = machine(horizon=4), LOGITS.softmax(-1)
    every = Listing(world, LOGITS, gamma=0.9)
    following = torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(4)):
        following = (policy * (world.rewards + 0.9 * world.dynamics @ following)).sum(1)
        torch.testing.assert_close(every.values[:, t], following[every.paths[0][:, t]])


def test_a_hessian_is_symmetric_and_a_rotation_is_not() -> None:
    every = Listing(machine(horizon=3), LOGITS, gamma=1.0)  # γ = 1: nothing to leave out
    assert asymmetry(chapter.estimates, every, every.to_go) < 1e-12
    later = every.to_go * torch.tensor([0.0, 1.0, 0.0])  # one step's share of the gradient is not a gradient
    assert asymmetry(chapter.estimates, every, later) > 1e-3


def test_weightings_are_what_their_names_say() -> None:
    to_go, values = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.5]])
    weights = chapter.weightings(to_go, values)
    assert weights["whole return"].tolist() == [[3.0, 3.0, 3.0]]
    assert weights["reward-to-go without γ^t"].tolist() == [[3.0, 2.0, 1.0]]
    for name, expected in (
        ("reward-to-go", [3.0, 0.9 * 2, 0.81 * 1]),
        ("reward-to-go less the value", [2.0, 0.9 * 1, 0.81 * 0.5]),
        ("reward-to-go less 10", [-7.0, -0.9 * 8, -0.81 * 9]),
    ):
        torch.testing.assert_close(weights[name], torch.tensor([expected]))


# ---------------------------------------------------------------- exercises


def score(logits: Tensor, action: int) -> Tensor:
    return torch.eye(len(logits), dtype=logits.dtype)[action] - logits.softmax(-1)


def loss(logprobs: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return -(logprobs * returns)[mask].sum() / mask.sum()


RIGHT = (score, loss, lambda returns: (returns.sum() - returns) / (len(returns) - 1))
WRONG = [
    (0, lambda logits, action: torch.eye(len(logits), dtype=logits.dtype)[action], "must be 0"),
    (0, lambda logits, action: 2 * score(logits, action), "autograd disagrees"),
    (0, lambda logits, action: score(logits, action)[action], "has an entry for each"),
    (1, lambda logprobs, returns, mask: -loss(logprobs, returns, mask), "sign is the other one"),
    (1, lambda logprobs, returns, mask: -(logprobs * returns).mean(), "outside the mask"),
    (
        1,
        lambda logprobs, returns, mask: loss(logprobs, returns, mask) * mask.sum() / len(mask),
        "steps of the whole batch",
    ),
    (2, lambda returns: returns.mean().expand(len(returns)), "depends on the action"),
    (2, lambda returns: returns.mean(), "6 episodes"),
    (2, lambda returns: (returns.sum() - returns) / len(returns), "B - 1"),
]


@pytest.mark.parametrize(
    ("exercise", "answer"), list(zip(EXERCISES, RIGHT, strict=True)), ids=lambda x: getattr(x, "name", "")
)
def test_right_answers_pass(exercise: Any, answer: Any) -> None:
    exercise.check(answer)


@pytest.mark.parametrize(("number", "answer", "hint"), WRONG)
def test_wrong_answers_are_told_why(number: int, answer: Any, hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        EXERCISES[number].check(answer)
