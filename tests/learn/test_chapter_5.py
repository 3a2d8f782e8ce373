"""Chapter 5: the exercises' checks, `improve` on rows that are neither carts nor sentences, the measures, the claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from pellucid.learn import CHAPTERS
from pellucid.learn.agents import make_agent
from pellucid.learn.chapter_5_language_model import batch_of, by_hand, improve, run, score
from pellucid.learn.exercises.chapter_5 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_5 import show_discount, show_passes, show_states
from pellucid.metrics import Reporter
from pellucid.models import CausalLM, MLPPolicy, MLPValue
from pellucid.rollout import EmbeddedEngine
from pellucid.types import Batch, Prompt, Sample, SamplingParams

CHECKS = {exercise.name: exercise.check for exercise in EXERCISES}
PARAMS = SamplingParams(max_new_tokens=9, stop_token_ids=(3,), seed=7)
PROMPTS = [Prompt(0, [5, 6, 7], ""), Prompt(1, [8], ""), Prompt(2, [9, 10], "")]


def lesson_of(folder: Path, seed: int = 0) -> Lesson:
    return Lesson(CHAPTERS[4], folder, seed, Reporter(quiet=True))


# ---------------------------------------------------------------- exercises


def transition(state: Any, token: Any, prompt_length: Any, stop_id: Any, max_new_tokens: Any) -> tuple[list[int], bool]:
    after = [*state, token]
    return after, token == stop_id or len(after) - prompt_length >= max_new_tokens


def token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    taken = logits[:-1].log_softmax(-1).gather(-1, input_ids[1:, None])[:, 0]
    return torch.cat([taken.new_zeros(1), taken])


def loss_slope(logprob: float, old_logprob: float, advantage: float, eps: float, n: int) -> float:
    ratio = math.exp(logprob - old_logprob)
    clipped = ratio > 1 + eps if advantage > 0 else ratio < 1 - eps
    return 0.0 if clipped else -ratio * advantage / n


def in_place(state: Any, token: Any, prompt_length: Any, stop_id: Any, limit: Any) -> tuple[list[int], bool]:
    state.append(token)
    return state, token == stop_id or len(state) - prompt_length >= limit


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("transition", lambda s, a, n, stop, most: (s if a == stop else [*s, a], a == stop), "joins the state"),
    ("transition", lambda s, a, n, stop, most: ([*s, a], a == stop), "reach a limit of 3"),
    ("transition", lambda s, a, n, stop, most: ([*s, a], a == stop or len(s) + 1 >= most), "not the prompt's"),
    ("transition", lambda s, a, n, stop, most: ([*s, a], stop in [*s, a] or len(s) + 1 - n >= most), "within the prompt"),
    ("transition", in_place, "make a new list"),
    ("token_logprobs", lambda x, ids: x.log_softmax(-1).gather(-1, ids[:, None])[:, 0], "at row t - 1"),
    ("token_logprobs", lambda x, ids: token_logprobs(x, ids) + 1.0 * (ids == ids[0]), "put 0 there"),
    ("token_logprobs", lambda x, ids: token_logprobs(x, ids)[1:], "shape"),
    ("token_logprobs", lambda x, ids: torch.cat([x.new_zeros(1), x[:-1].gather(-1, ids[1:, None])[:, 0]]), "log_softmax"),
    ("loss_slope", lambda new, old, a, eps, n: -loss_slope(new, old, a, eps, n), "a loss falls"),
    ("loss_slope", lambda new, old, a, eps, n: -a * math.exp(new - old) / n, "the slope is 0"),
    ("loss_slope", lambda new, old, a, eps, n: loss_slope(new, old, a, eps, n) * (abs(math.exp(new - old) - 1) <= eps),
     "does not hold it"),
    ("loss_slope", lambda new, old, a, eps, n: n * loss_slope(new, old, a, eps, n), "/ N"),
]  # fmt: skip


@pytest.mark.parametrize("answer", [transition, token_logprobs, loss_slope])
def test_right_answers_pass(answer: Callable[..., Any]) -> None:
    CHECKS[answer.__name__](answer)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_wrong_answers_fail_with_a_hint(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        CHECKS[name](answer)


# ---------------------------------------------------------------- improve


def choices(rewarded: int, num_rows: int = 8, num_steps: int = 6) -> Batch:
    """Rows that saw one observation and chose 0 or 1 at random. A choice of `rewarded` earns 1; the last step is padding."""
    shape = (num_rows, num_steps)
    actions = torch.randint(2, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, -1] = False
    ended = torch.zeros(shape, dtype=torch.bool)
    ended[:, -2] = True
    return Batch(
        input_ids=actions, attention_mask=torch.ones(shape, dtype=torch.bool), position_ids=actions, response_mask=mask,
        action_mask=mask, rollout_logprobs=torch.zeros(shape), ended=ended, bootstrap_values=torch.zeros(shape),
        group_ids=torch.arange(num_rows), policy_version=torch.zeros(num_rows, dtype=torch.int64), stop_reason=(),
        rewards=(actions == rewarded) * mask * 1.0, observations=torch.ones(*shape, 3),
    )  # fmt: skip


@pytest.mark.parametrize("rewarded", [0, 1])
def test_improve_makes_the_rewarded_action_likelier(rewarded: int) -> None:
    policy, critic = MLPPolicy(3, (8,), 2, 0, "cpu"), MLPValue(3, (8,), 0, "cpu")
    agent, batch = make_agent(policy, critic, 3e-3, gamma=0.0, epochs=4, rows=4), choices(rewarded)
    before = policy.logits(torch.ones(3)).softmax(-1)[rewarded].item()
    done = improve(agent, batch, seed=0)
    assert policy.logits(torch.ones(3)).softmax(-1)[rewarded].item() > before + 0.01
    assert batch.old_logprobs is None, "the batch that was given stays as it was"
    # With γ = 0 a step's advantage is its reward minus the value there, and the value is the same everywhere.
    right, mask = done.get("advantages")[batch.get("rewards") == 1], batch.action_mask
    assert right.min() > 0 and done.get("advantages")[(batch.get("rewards") == 0) & mask].max() < 0
    assert torch.allclose(done.get("returns")[mask], batch.get("rewards")[mask])


def test_improve_gives_gae_over_whole_rows() -> None:
    """Against the sum of discounted TD errors, written out."""
    policy, critic = MLPPolicy(3, (8,), 2, 0, "cpu"), MLPValue(3, (8,), 0, "cpu")
    batch = choices(1)
    done = improve(make_agent(policy, critic, 1e-3, gamma=0.9, epochs=1, rows=8), batch, seed=0)
    values, rewards, last = done.get("old_values"), batch.get("rewards"), 4
    raw = torch.zeros_like(values)
    for row in range(len(batch)):
        for t in range(last + 1):
            for k in range(t, last + 1):
                beyond = values[row, k + 1] if k < last else 0.0
                raw[row, t] += (0.9 * 0.95) ** (k - t) * (rewards[row, k] + 0.9 * beyond - values[row, k])
    flat = raw[batch.action_mask]
    expected = (flat - flat.mean()) / flat.std(correction=0)
    assert torch.allclose(done.get("advantages")[batch.action_mask], expected, atol=1e-4)
    assert torch.allclose(done.get("returns")[batch.action_mask], flat + values[batch.action_mask], atol=1e-5)


# ---------------------------------------------------------------- measures


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    return CausalLM(tiny_models.tiny_llama())


def test_by_hand_samples_what_the_engine_samples(policy: CausalLM, tmp_path: Path) -> None:
    samples = EmbeddedEngine(policy.hf, num_slots=2).generate(PROMPTS, PARAMS)
    episodes = [by_hand(policy, prompt, PARAMS) for prompt in PROMPTS]
    assert [ids for ids, _ in episodes] == [sample.input_ids for sample in samples]
    lesson = lesson_of(tmp_path)
    show_passes(lesson, policy, samples, episodes)
    off = [(ids, [value + 0.01 for value in logprobs]) for ids, logprobs in episodes]
    show_passes(lesson, policy, samples, off)
    show_passes(lesson, policy, samples, [*episodes[1:], episodes[0]])
    assert [claim.holds for claim in lesson.claims] == [True, False, False]


def test_greedy_replies_go_on_from_their_prefixes(
    policy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = lesson_of(tmp_path)
    show_states(lesson, policy, PROMPTS, PARAMS)
    generate = EmbeddedEngine.generate
    hotter = lambda self, prompts, params: generate(self, prompts, replace(params, temperature=2.0))  # noqa: E731
    monkeypatch.setattr(EmbeddedEngine, "generate", hotter)  # chance that is not in the state
    show_states(lesson, policy, PROMPTS, PARAMS)
    assert [claim.holds for claim in lesson.claims] == [True, False]


def test_score_counts_words() -> None:
    assert score("You and your dog: yours. Youth, thou, YOU") == 4
    assert score("") == 0


def test_the_score_is_the_last_tokens_reward(tmp_path: Path) -> None:
    samples = [
        Sample(PROMPTS[1], 0, 0, [8, 1, 2, 3], [False, True, True, True], [0.0] * 4, "stop", 0),
        Sample(PROMPTS[0], 1, 0, [5, 6, 7, 1], [False, False, False, True], [0.0] * 4, "length", 0),
    ]
    texts = {8: "you, you", 5: "yours"}
    writer: Any = SimpleNamespace(text=lambda sample: texts[sample.input_ids[0]])
    batch = batch_of(writer, samples)
    assert batch.get("rewards").tolist() == [[0, 0, 0, 2], [0, 0, 0, 1]]
    lesson = lesson_of(tmp_path)
    show_discount(lesson, batch)
    assert all(claim.holds for claim in lesson.claims)
    assert "1.00 of it for 1 tokens, 0.90 for 3" in lesson.claims[1].measured  # 0.95² = 0.9025


@pytest.mark.slow
def test_claims_hold(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path)
    run(lesson)
    assert len(lesson.claims) == 8
    assert all(claim.holds for claim in lesson.claims)
    assert {path.name for path in tmp_path.glob("*.png")} == {"5-tokens.png", "5-one-ppo.png"}
