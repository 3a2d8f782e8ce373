"""Chapter 6: the exercises' checks, the pair loss on tiny models, the scale in closed form, the measures, the claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from pellucid.data import PreferenceExample
from pellucid.learn import CHAPTERS
from pellucid.learn import chapter_6_reward_model as chapter
from pellucid.learn.exercises.chapter_6 import EXERCISES
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures.chapter_6 import Prefixes, fit, show_continuations, show_deltas, show_values
from pellucid.metrics import Reporter
from pellucid.models import ScalarModel
from pellucid.types import Batch, Prompt, Sample, collate

CHECKS = {exercise.name: exercise.check for exercise in EXERCISES}


def lesson_of(folder: Path, seed: int = 0) -> Lesson:
    return Lesson(CHAPTERS[5], folder, seed, Reporter(quiet=True))


# ---------------------------------------------------------------- exercises


def pair_loss(chosen: float, rejected: float) -> float:
    gap = chosen - rejected
    return max(-gap, 0.0) + math.log1p(math.exp(-abs(gap)))


def terminal_rewards(scores: Tensor, action_mask: Tensor) -> Tensor:
    last = (torch.arange(action_mask.shape[1]) * action_mask).argmax(1)
    return torch.zeros(action_mask.shape).scatter(1, last[:, None], scores[:, None])


def td_errors(values: list[float], score: float) -> list[float]:
    beyond = [*values[1:], 0.0]
    rewards = [*[0.0] * (len(values) - 1), score]
    return [r + after - before for r, before, after in zip(rewards, values, beyond, strict=True)]


def last_column(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.pad(scores[:, None], (mask.shape[1] - 1, 0))


def by_count(scores: Tensor, mask: Tensor) -> Tensor:
    """Takes the number of actions for their extent: wrong where the mask has a hole."""
    last = mask.int().argmax(1) + mask.sum(1) - 1
    return torch.zeros(mask.shape).scatter(1, last[:, None], scores[:, None])


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("pair_loss", lambda c, r: -math.log(1 / (1 + math.exp(-(c - r)))), "no exponential overflows"),
    ("pair_loss", lambda c, r: min(pair_loss(c, r), 50.0), "log\\(0\\) was cut off"),
    ("pair_loss", lambda c, r: pair_loss(r, c), "chosen - rejected"),
    ("pair_loss", lambda c, r: max(0.0, 1 - (c - r)), "log 2"),
    ("terminal_rewards", last_column, "only actions are rewarded"),
    ("terminal_rewards", by_count, "only actions are rewarded"),
    ("terminal_rewards", lambda s, m: s[:, None] * m, "put it there once"),
    ("terminal_rewards", lambda s, m: s[:, None] * m / m.sum(1, keepdim=True), "add up|all before it"),
    ("terminal_rewards", lambda s, m: terminal_rewards(s, m)[:, :-1], "one reward a column"),
    ("td_errors", lambda v, s: [-d for d in td_errors(v, s)], "beyond the last token"),
    ("td_errors", lambda v, s: [*td_errors(v, s)[:-1], s], "beyond the last token"),
    ("td_errors", lambda v, s: [*[a - b for a, b in pairwise(v)], s - v[-1]], "not the reverse"),
    ("td_errors", lambda v, s: [s - v[0]], "has 4 TD errors"),
]


@pytest.mark.parametrize("answer", [pair_loss, terminal_rewards, td_errors])
def test_right_answers_pass(answer: Callable[..., Any]) -> None:
    CHECKS[answer.__name__](answer)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_wrong_answers_fail_with_a_hint(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        CHECKS[name](answer)


# ---------------------------------------------------------------- pairs


def scalar_model(seed: int = 0) -> ScalarModel:
    config = tiny_models.tiny_llama(pad_token_id=0, num_labels=1).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScalarModel(LlamaForSequenceClassification(config).eval())


WRITER: Any = SimpleNamespace(scalar_model=lambda seed: scalar_model(seed % 1000))


def test_pair_scores_are_those_of_each_reply_alone() -> None:
    model = scalar_model()
    pairs = [PreferenceExample([5, 6, 7], [5, 8]), PreferenceExample([9], [9, 10, 11, 12])]
    with torch.no_grad():
        got = chapter.pair_scores(model, pairs)
        for k, side in enumerate(("chosen_ids", "rejected_ids")):
            for pair, score in zip(pairs, got[k], strict=True):
                ids = torch.tensor([getattr(pair, side)])
                alone = model.hf(input_ids=ids).logits.item()
                assert abs(alone - score.item()) < 1e-5


def test_a_reward_model_learns_what_the_pairs_say() -> None:
    """Token 20 is liked and 30 is not; nothing else differs."""
    words = torch.randint(40, 90, (32, 3), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [PreferenceExample([*w, 20, 2], [*w, 30, 2]) for w in words]
    model = chapter.train_reward_model(WRITER, pairs[:16], seed=3)
    with torch.no_grad():
        chosen, rejected = chapter.pair_scores(model, pairs[16:])
    assert (chosen > rejected).all()


@pytest.mark.parametrize("swapped", [0.2, 0.4])
def test_fit_goes_to_the_log_odds(swapped: float) -> None:
    assert abs(fit(swapped, 500)[-1] - math.log((1 - swapped) / swapped)) < 1e-3


def test_fit_without_noise_grows_like_the_log_of_the_updates() -> None:
    path = fit(0.0, 2000)
    assert abs(path[-1] - path[999] - math.log(2)) < 0.01


# ---------------------------------------------------------------- credit

LENGTHS = (7, 10, 8, 5)


def replies() -> Batch:
    """A prompt of one token, replies of LENGTHS, scores 1, -1, 2, 0 as terminal rewards and as returns."""
    prompt = Prompt(0, [5], "")
    samples = [
        Sample(prompt, i, 0, [5, *[6] * n], [False, *[True] * n], [0.0] * (n + 1), "stop", 0)
        for i, n in enumerate(LENGTHS)
    ]
    batch, scores = collate(samples, pad_id=0), torch.tensor([1.0, -1.0, 2.0, 0.0])
    rewards = terminal_rewards(scores, batch.action_mask)
    return batch.having(scores=scores, rewards=rewards, returns=scores[:, None] * batch.action_mask)


def knowing_from(batch: Batch, column: int) -> Tensor:
    """Values that are 0 before the column, and the score from it on."""
    return (torch.arange(batch.input_ids.shape[1]) >= column) * batch.get("returns")


def test_deltas_lie_where_the_values_change(tmp_path: Path) -> None:
    batch, lesson = replies(), lesson_of(tmp_path)
    noise = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) * batch.action_mask
    decided = torch.zeros(batch.input_ids.shape)
    decided[:, 3] = 2.0  # the token in column 3 is followed by the first value that knows the score
    values = (noise, knowing_from(batch, 4))
    deltas = [chapter.td_errors(batch, v) for v in values]
    show_deltas(lesson, batch, values, deltas, decided)
    assert [claim.holds for claim in lesson.claims] == [True, True]
    assert "100% lie on the quarter of tokens with the highest entropy, 0%" in lesson.claims[1].measured
    show_deltas(lesson, batch, values, deltas, -decided)
    assert not lesson.claims[-1].holds


def test_explained_variance_by_part(tmp_path: Path) -> None:
    batch, lesson = replies(), lesson_of(tmp_path)
    returns = batch.get("returns")
    progress = (batch.action_mask.cumsum(1) / batch.action_mask.sum(1, keepdim=True)).clamp(0.05, 1)
    show_values(lesson, batch, -3 * returns, progress * returns)
    assert [claim.holds for claim in lesson.claims] == [True, True]
    # Values that are the returns times a number a leave 1 - (1 - a)² explained: -15 at a = -3.
    assert "-15.00 before" in lesson.claims[0].measured
    show_values(lesson, batch, -3 * returns, (1 - progress) * returns)
    assert not lesson.claims[-1].holds


def test_td_errors_of_a_batch_are_those_of_each_reply() -> None:
    batch = replies()
    values = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) * batch.action_mask
    deltas = chapter.td_errors(batch, values)
    for row, mask in enumerate(batch.action_mask):
        expected = td_errors(values[row][mask].tolist(), batch.get("scores")[row].item())
        assert deltas[row][mask].tolist() == pytest.approx(expected, abs=1e-6)


def test_continuations_against_critics(tmp_path: Path) -> None:
    """Four prefixes of replies 0 and 1, two continuations of each, whose mean scores are 0, 1, 3 and 2."""
    lesson, truth = lesson_of(tmp_path), torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    scores = torch.tensor([-1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 0.0, 4.0])
    prefixes, other = Prefixes([0, 0, 1, 1], [0, 1, 0, 1], ["a", "b", "c", "d"]), torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    for critic in (truth * 2 + 1, -truth):
        show_continuations(lesson, prefixes, scores, other, critic)
    assert [claim.holds for claim in lesson.claims] == [True, False]
    assert "4 prefixes: 1.00" in lesson.claims[0].measured


def test_critic_learns_the_mean_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """All replies look alike, so the best value of each prefix is the mean of the scores of the replies that long."""
    monkeypatch.setattr(chapter, "EPOCHS", 60)
    batch, critic = replies(), scalar_model()
    batch = batch.select(torch.tensor([0, 2] * 32))
    chapter.train_critic(critic, batch, seed=0)
    with torch.no_grad():
        values = critic.values_of(batch)
    assert torch.allclose(values[:, 1:8], torch.full((64, 7), 1.5), atol=0.1)


def test_a_copy_of_a_reward_model_is_one() -> None:
    """As the critic begins: weights and shift are the same, and training it leaves the reward model as it is."""
    model, ids = scalar_model(5), torch.tensor([[5, 6, 7]])
    model.set_shift(0.7)
    critic, mask = deepcopy(model), torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(critic.scores(ids, mask), model.scores(ids, mask))
        critic.hf.score.weight.mul_(2)
        assert not torch.equal(critic.scores(ids, mask), model.scores(ids, mask))


@pytest.mark.slow
def test_claims_hold(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path)
    chapter.run(lesson)
    assert len(lesson.claims) == 11
    assert all(claim.holds for claim in lesson.claims)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"6-pairs", "6-scale", "6-credit", "6-values"}
