"""Chapter 3: the solved corridor against brute force and samples, its claims, and its exercises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid.core import discounted_returns
from pellucid.learn import CHAPTERS
from pellucid.learn import chapter_3_actor_critic as chapter
from pellucid.learn.cart import Cart, whole_episodes
from pellucid.learn.corridor import SLIP, START, STATES, corridor, walk
from pellucid.learn.exercises.chapter_3 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_3 import fit, gradient_noise, learned_values
from pellucid.metrics import Reporter

LOGITS = torch.randn(STATES, 2, generator=torch.Generator().manual_seed(7)) / 2
WRONG_CRITIC = torch.linspace(4, 0, STATES, dtype=torch.float64)


@pytest.mark.slow
def test_its_claims_hold(tmp_path: Path) -> None:
    lesson = Lesson(CHAPTERS[2], tmp_path, 0, Reporter(quiet=True))
    chapter.run(lesson)
    assert len(lesson.claims) == 7
    assert [claim.text for claim in lesson.claims if not claim.holds] == []
    for name in ("3-lambda", "3-noise", "3-learning"):
        assert (tmp_path / f"{name}.png").stat().st_size < 120_000


# ---------------------------------------------------------------- the corridor


def test_a_corridor_without_choices_is_the_gamblers_ruin() -> None:
    """Left and right equally likely: the chance to leave on the right is (s + 1) / 8, the walk takes (s + 1)(7 - s) steps."""
    values = corridor(torch.zeros(STATES, 2)).values()
    s = torch.arange(STATES, dtype=torch.float64)
    right, length = (s + 1) / 8, (s + 1) * (7 - s)
    torch.testing.assert_close(values, 6 * right + 2 * (1 - right) - 0.1 * length)


def test_transitions_and_rewards_are_those_of_a_slip() -> None:
    where = corridor(LOGITS)
    assert where.transition[3, 1, 4].item() == pytest.approx(1 - SLIP)
    assert where.transition[3, 1, 2].item() == pytest.approx(SLIP)
    assert where.reward[3].tolist() == pytest.approx([-0.1, -0.1])
    assert where.reward[6, 1].item() == pytest.approx(-0.1 + 6 * (1 - SLIP))
    assert where.reward[0].tolist() == pytest.approx([-0.1 + 2 * (1 - SLIP), -0.1 + 2 * SLIP])
    assert where.transition.sum(2)[0].tolist() == pytest.approx([SLIP, 1 - SLIP])


def test_the_gradient_is_the_slope_of_the_value_of_the_start() -> None:
    """By finite differences of the solved V, in place of the policy gradient theorem."""
    where, h = corridor(LOGITS.double()), 1e-5
    gradient = where.gradient(where.advantages(where.values(), 1.0))
    for i in range(LOGITS.numel()):
        nudge = torch.zeros(LOGITS.numel(), dtype=torch.float64)
        nudge[i] = h
        up, down = (corridor(LOGITS.double() + sign * nudge.view_as(LOGITS)).values()[START] for sign in (1, -1))
        assert gradient.view(-1)[i].item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-8)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_expected_advantages_are_the_means_of_sampled_ones(lam: float) -> None:
    """The closed form against `core.gae` on walks: each state and action, and the gradient of an episode."""
    where = corridor(LOGITS)
    walks = walk(where, 20_000, seed=1)
    sampled, _ = walks.gae(WRONG_CRITIC, lam)
    exact = where.advantages(WRONG_CRITIC, lam)
    for state in range(STATES):
        for action in range(2):
            found = sampled[walks.mask & (walks.states == state) & (walks.actions == action)]
            # Visits of one episode are not independent; 8 standard errors leave room for that.
            assert (found.mean() - exact[state, action]).abs() < 8 * found.std() / len(found) ** 0.5 + 1e-9
    gradients = walks.gradients(where.probs, sampled)
    error = gradients.std(0) / len(gradients) ** 0.5
    assert ((gradients.mean(0) - where.gradient(exact)).abs() < 5 * error).all()


def test_visits_are_counted() -> None:
    where = corridor(LOGITS)
    walks = walk(where, 20_000, seed=2)
    visits = torch.stack([(walks.mask & (walks.states == s)).sum(1).double().mean() for s in range(STATES)])
    torch.testing.assert_close(visits, where.occupancy(), rtol=0.05, atol=0.02)


def test_walks_end_once_and_pay_on_leaving() -> None:
    walks = walk(corridor(LOGITS), 50, seed=3)
    assert walks.ended.sum(1).tolist() == [1] * 50
    assert (walks.ended.int().argmax(1) == walks.mask.sum(1) - 1).all()
    assert (walks.rewards[~walks.mask] == 0).all()
    last = walks.rewards[walks.ended]
    assert (((last - 1.9).abs() < 1e-9) | ((last - 5.9).abs() < 1e-9)).all()


def test_an_episodes_gradient_is_that_of_its_loss() -> None:
    where, logits = corridor(LOGITS), LOGITS.double().requires_grad_()
    walks = walk(where, 3, seed=4)
    advantages, _ = walks.gae(WRONG_CRITIC, 0.5)
    each = walks.gradients(where.probs, advantages)
    for i in range(3):
        logprobs = logits.log_softmax(1)[walks.states[i], walks.actions[i]]
        (gradient,) = torch.autograd.grad((advantages[i] * logprobs)[walks.mask[i]].sum(), logits)
        torch.testing.assert_close(each[i], gradient)


def test_learned_values_are_means_of_returns() -> None:
    walks = walk(corridor(LOGITS), 5, seed=5)
    seen: dict[int, list[float]] = {}
    for i in range(5):
        length = int(walks.mask[i].sum())
        rewards = walks.rewards[i, :length].tolist()
        for t in range(length):
            seen.setdefault(int(walks.states[i, t]), []).append(sum(rewards[t:]))
    learned = learned_values(walks)
    for state in range(STATES):
        mean = sum(seen[state]) / len(seen[state]) if state in seen else 0.0
        assert learned[state].item() == pytest.approx(mean)


# ---------------------------------------------------------------- CartPole


def test_noise_is_the_variance_of_the_gradients() -> None:
    """Of two episodes: half the squared distance of their gradients."""
    cart = Cart(0, lr=1e-2)
    batch = whole_episodes(cart.actor, 2, seed=0)
    ones = batch.action_mask.float()
    noise = gradient_noise(cart, batch, {"ones": ones, "twos": 2 * ones})
    found = []
    for i in range(2):
        cart.actor.module.zero_grad()
        seen, taken = batch.get("observations")[i], batch.action_mask[i]
        logprobs = torch.log_softmax(cart.actor.module(seen[taken]), -1)
        logprobs.gather(1, batch.input_ids[i, taken][:, None]).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in cart.actor.module.parameters()]))
    assert noise["ones"] == pytest.approx(((found[0] - found[1]).square().sum() / 2).item(), rel=1e-3)
    assert noise["twos"] == pytest.approx(4 * noise["ones"], rel=1e-4)


def test_a_sample_bootstraps_where_the_episode_goes_on() -> None:
    """A pole that fell is worth 0; in the last column of the others stands V of the observation that came next."""
    cart = Cart(1, lr=1e-2, num_envs=4)
    batch = cart.sample(60)
    fell = batch.ended[:, :-1]
    assert fell.any() and (batch.bootstrap_values[:, :-1][fell] == 0).all()
    running = ~batch.ended[:, -1] & batch.action_mask[:, -1]
    seen = torch.from_numpy(cart.environments.observations)[running]
    torch.testing.assert_close(batch.bootstrap_values[running, -1], cart.critic.values(seen).detach())
    assert cart.steps == int(batch.action_mask.sum())


def test_fitting_explains_more() -> None:
    cart = Cart(2, lr=1e-2)
    batch = whole_episodes(cart.actor, 30, seed=0)
    mask = batch.action_mask
    returns = discounted_returns(batch.get("rewards"), mask, batch.ended, torch.zeros(mask.shape), chapter.GAMMA)
    before = (cart.critic.values_of(batch) - returns)[mask].square().mean().item()
    fit(cart, batch, chapter.GAMMA, seed=0)
    assert (cart.critic.values_of(batch) - returns)[mask].square().mean().item() < before / 2


def test_actor_critic_moves_both_networks_once() -> None:
    cart = Cart(3, lr=1e-2, num_envs=4)
    before = [learner.fingerprint() for learner in cart.learners]
    chapter.actor_critic(cart, num_steps=16)
    assert all(learner.updates == 1 for learner in cart.learners)
    assert all(learner.fingerprint() != old for learner, old in zip(cart.learners, before, strict=True))


# ---------------------------------------------------------------- exercises


def td_errors(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    return rewards + gamma * next_values * ~terminated - values


def gae_loop(rewards: list[float], values: list[float], last_value: float, gamma: float, lam: float) -> list[float]:
    found, advantage, following = [], 0.0, last_value
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        found.append(advantage)
    return found[::-1]


RIGHT = (td_errors, gae_loop, lambda p, r, gamma: torch.linalg.solve(torch.eye(len(r)).double() - gamma * p, r))
WRONG = [
    (0, lambda r, v, n, end, gamma: r + gamma * n - v, "counts as 0"),
    (0, lambda r, v, n, end, gamma: -td_errors(r, v, n, end, gamma), "sign"),
    (0, lambda r, v, n, end, gamma: r + n * ~end - v, "discounted"),
    (1, lambda r, v, last, gamma, lam: gae_loop(r, v, 0.0, gamma, lam), "still to come"),
    (1, lambda r, v, last, gamma, lam: gae_loop(r, v, last, gamma, lam / gamma), "the others are not"),
    (1, lambda r, v, last, gamma, lam: gae_loop(r, v, last, gamma, lam)[:3], "5 of them"),
    (2, lambda p, r, gamma: r, "solves"),
    (2, lambda p, r, gamma: torch.linalg.solve(torch.eye(len(r)).double() - p, r), "solves"),
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
