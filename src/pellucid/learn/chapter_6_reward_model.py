"""Chapter 6: the reward model. From pairs of replies, of which one is preferred, to one number for a reply; and from this
number, which comes with the last token, to a value for every token.

Three things are measured: how the agreement with the hidden preference grows with the number of pairs; what the loss leaves
open (the zero of the scores) and what it settles (their scale, as odds); and where a trained critic puts the credit.
"""

from __future__ import annotations

from itertools import chain, count, islice

import torch
from torch import Tensor

from pellucid.config import OptimizerConfig
from pellucid.core import (
    aggregate,
    bradley_terry,
    discounted_returns,
    kl_shaped_rewards,
    value_clip,
)
from pellucid.data import PreferenceExample
from pellucid.execution.learner import Learner, minibatches
from pellucid.learn.credit_measures import measure_against_continuations, measure_deltas, measure_values
from pellucid.learn.language_pictures import draw_accuracy, draw_scale
from pellucid.learn.lesson import Lesson
from pellucid.learn.small_writer import Writer, small_writer
from pellucid.models import ScalarModel
from pellucid.rewards import ModelReward
from pellucid.rollout import EmbeddedEngine
from pellucid.types import Batch, Prompt, Sample, collate, collate_supervised, derive_seed

SIZES, REPEATS = (50, 100, 200, 400, 800, 2000), 2
"""Pairs that a reward model learns from, and models of each size, on disjoint pairs."""
UPDATES, PAIRS_PER_UPDATE = 60, 32
REPLIES, HELD_OUT, EPOCHS = 1536, 256, 5
"""Replies that the critic learns from, replies it is measured on, passes over the former."""
CONTINUATIONS = 32
"""Replies drawn from one prefix, to measure its value without a critic."""


def pair_scores(model: ScalarModel, pairs: list[PreferenceExample]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected replies, each (P,), read at their last token."""
    rows = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    batch = collate_supervised(rows, [[True] * len(row) for row in rows], pad_id=0)
    chosen, rejected = model.scores(batch.input_ids, batch.attention_mask).chunk(2)
    return chosen, rejected


def train_reward_model(writer: Writer, pairs: list[PreferenceExample], seed: int) -> ScalarModel:
    """The fine-tuned language model with a new head, on -log sigmoid(chosen - rejected)."""
    model = writer.scalar_model(derive_seed(seed, "head"))
    learner = Learner("reward", model.module, OptimizerConfig(lr=1e-3, warmup_steps=5), UPDATES)
    passes = (minibatches(len(pairs), PAIRS_PER_UPDATE, derive_seed(seed, epoch)) for epoch in count())
    for rows in islice(chain.from_iterable(passes), UPDATES):
        learner.zero_grad()
        bradley_terry(*pair_scores(model, [pairs[i] for i in rows.tolist()])).mean().backward()
        learner.step()
    return model


def measure_pairs(lesson: Lesson, writer: Writer) -> ScalarModel:
    """Agreement with the gold preference, against the number of pairs. Returns the first model of the largest size."""
    pairs, held_out = writer.pairs("preferences", SIZES[-1] * REPEATS), writer.pairs("preferences_heldout", 500)
    gaps, models = {}, []
    with lesson.progress("reward models", len(SIZES) * REPEATS) as advance:
        for size in SIZES:
            for k in range(REPEATS):
                part = pairs[k * size : (k + 1) * size]
                models.append(train_reward_model(writer, part, derive_seed(lesson.seed, "reward model", k)))
                with torch.no_grad():
                    chosen, rejected = pair_scores(models[-1], held_out)
                gaps[size, k] = chosen - rejected
                advance()
    right = {size: [(gaps[size, k] > 0).float().mean().item() for k in range(REPEATS)] for size in SIZES}
    width = {size: sum(gaps[size, k].abs().mean().item() for k in range(REPEATS)) / REPEATS for size in SIZES}
    mean = {size: sum(values) / REPEATS for size, values in right.items()}
    few, many = SIZES[0], SIZES[-1]
    lesson.table(
        f"After {UPDATES} updates, on {len(held_out)} held-out pairs without noise",
        ("pairs", "agreement with gold", "mean |chosen - rejected|"),
        [(size, mean[size], width[size]) for size in SIZES],
    )
    lesson.picture("6-pairs", lambda ax: draw_accuracy(ax, right), "Agreement with the hidden preference.")
    lesson.claim(
        "More pairs, better agreement with the gold preference on pairs of prompts that no training saw",
        f"{mean[few]:.1%} with {few} pairs, {mean[many]:.1%} with {many:,}",
        mean[many] > mean[few] + 0.1 and mean[few] > 0.5,
    )
    lesson.claim(
        "Scores far apart are no sign of a good model: learned by heart, few pairs spread the scores more than many do",
        f"held-out scores lie {width[few]:.1f} apart after {few} pairs, {width[many]:.1f} after {many:,}",
        width[few] > width[many] and mean[few] < mean[many],
    )
    return models[-REPEATS]


# ---------------------------------------------------------------- what the loss determines


def fit(swapped: float, updates: int) -> list[float]:
    """Two replies, and labels of which a share is swapped: chosen - rejected after each update, at learning rate 1."""
    gap, path = torch.zeros(1, requires_grad=True), []
    for _ in range(updates):
        loss = (1 - swapped) * bradley_terry(gap, 0 * gap) + swapped * bradley_terry(0 * gap, gap)
        (slope,) = torch.autograd.grad(loss.sum(), gap)
        gap = (gap.detach() - slope).requires_grad_()
        path.append(gap.item())
    return path


def measure_freedom(lesson: Lesson, writer: Writer, model: ScalarModel) -> None:
    """What changes no loss, and what sets the scale."""
    with torch.no_grad():
        chosen, rejected = pair_scores(model, writer.pairs("preferences_heldout", 200))
    by_prompt = 5 * torch.randn(len(chosen), generator=torch.Generator().manual_seed(lesson.seed))
    losses = [
        bradley_terry(chosen + c, rejected + c).mean().item()
        for c in (torch.zeros(1), torch.full((1,), 7.0), by_prompt)
    ]
    gap = max(losses) - min(losses)
    lesson.claim(
        "Only differences count: a constant on all scores changes no loss, nor does a constant for each prompt",
        f"loss {losses[0]:.4f}; with 7 on all scores, and with another number for each prompt, {gap:.1e} apart",
        gap < 1e-5,
    )
    paths = {swapped: fit(swapped, 3000) for swapped in (0.0, 0.1, 0.3)}
    odds = torch.tensor(9.0).log().item()
    lesson.picture("6-scale", lambda ax: draw_scale(ax, paths), "What sets the scale: the share of swapped labels.")
    lesson.claim(
        "The scale is that of odds: where a tenth of the labels is swapped, the best gap is log(0.9 / 0.1)",
        f"{paths[0.1][-1]:.4f} against {odds:.4f}",
        abs(paths[0.1][-1] - odds) < 1e-3,
    )
    lesson.claim(
        "Without noise there is no best gap: it grows for as long as one trains",
        f"{paths[0.0][29]:.1f} after 30 updates, {paths[0.0][299]:.1f} after 300, {paths[0.0][2999]:.1f} after 3,000",
        paths[0.0][2999] > paths[0.0][299] + 1 > paths[0.0][29] + 2,
    )


# ---------------------------------------------------------------- from one number to a value for each token


def batch_of(samples: list[Sample], model: ScalarModel) -> Batch:
    """(B,T): the score on the last token and 0 before; without a discount the return of every token is the score."""
    scores = torch.tensor([score.value for score in ModelReward(model, batch_size=64).score(samples)])
    batch = collate(samples, pad_id=0)
    rewards = kl_shaped_rewards(scores, torch.zeros(batch.input_ids.shape), batch.action_mask, kl_coef=0.0)
    returns = discounted_returns(rewards, batch.action_mask, batch.ended, batch.bootstrap_values, gamma=1.0)
    return batch.having(scores=scores, rewards=rewards, returns=returns)


def copy_of(model: ScalarModel, writer: Writer) -> ScalarModel:
    """How PPO's critic begins: as the reward model, weights and shift."""
    critic = writer.scalar_model(seed=0)
    critic.module.load_state_dict(model.module.state_dict())
    critic.set_shift(model.shift)
    return critic


def train_critic(critic: ScalarModel, batch: Batch, seed: int) -> None:
    """Regression of the value before each token on the score that the reply will get."""
    learner = Learner("critic", critic.module, OptimizerConfig(lr=1e-3, warmup_steps=5), EPOCHS * len(batch) // 64)
    for epoch in range(EPOCHS):
        for rows in minibatches(len(batch), 64, derive_seed(seed, epoch)):
            part = batch.select(rows)
            loss, _ = value_clip(critic.values_of(part), part.get("returns"), part.get("returns"), None)
            learner.zero_grad()
            aggregate(loss, part.action_mask, "token").backward()
            learner.step()


def measure_credit(lesson: Lesson, writer: Writer, model: ScalarModel) -> None:
    """A critic of the policy that wrote the replies, which stays as it is: only the values learn."""
    policy = writer.policy()
    engine = EmbeddedEngine(policy.hf, num_slots=64)
    replies = engine.generate(writer.prompts("prompts", REPLIES), writer.params("replies"))
    model.set_shift(batch_of(replies, model).get("scores").mean().item())  # the reference's mean becomes 0
    held_out = engine.generate(writer.prompts("prompts_heldout", HELD_OUT), writer.params("held out"))
    batch, others = batch_of(replies, model), batch_of(held_out, model)
    scores, rewards = batch.get("scores"), batch.get("rewards")
    lesson.claim(
        "After the shift the policy's replies score 0 on average; a score is one reward, on the last token, and 0 before",
        f"mean {scores.mean().abs():.1e}, standard deviation {scores.std():.2f}, {int((rewards != 0).sum())} rewards "
        f"for {len(batch)} replies of {int(batch.action_mask.sum())} tokens",
        scores.mean().abs().item() < 1e-4
        and torch.equal(rewards[batch.ended], scores)
        and not rewards[~batch.ended].any(),
    )
    critic = copy_of(model, writer)
    with torch.no_grad():
        before = critic.values_of(others)
    train_critic(critic, batch, lesson.seed)
    with torch.no_grad():
        after = critic.values_of(others)
        _, entropy = policy.logprobs_of(others, 1.0, entropy=True)
    assert entropy is not None
    measure_values(lesson, others, before, after)
    measure_deltas(lesson, others, before, after, entropy)
    places, truth = go_on(engine, writer, model, held_out)
    texts = [writer.tokenizer.decode(held_out[i].input_ids[t : t + 2]) for i, t in places]
    rows, columns = ([place[k] for place in places] for k in (0, 1))
    measure_against_continuations(lesson, texts, rows, truth, before[rows, columns], after[rows, columns])


def go_on(
    engine: EmbeddedEngine, writer: Writer, model: ScalarModel, samples: list[Sample]
) -> tuple[list[tuple[int, int]], Tensor]:
    """Every second prefix of six replies, as (sample, column), and the mean score of CONTINUATIONS replies from each: its
    value, measured, as a language model can be started again from wherever it has been."""
    rows = [i for i, s in enumerate(samples) if s.stop_reason == "stop" and 18 < len(s.response_ids) < 40][:6]
    places = [(i, t) for i in rows for t in range(len(samples[i].prompt.input_ids), len(samples[i].input_ids), 2)]
    starts = [Prompt(n, samples[i].input_ids[:t], "") for n, (i, t) in enumerate(places)]
    drawn = engine.generate(starts, writer.params("continuations", samples_per_prompt=CONTINUATIONS))
    return places, batch_of(drawn, model).get("scores").view(-1, CONTINUATIONS).mean(1)


def run(lesson: Lesson) -> None:
    lesson.say("A small language model is made, and fine-tuned on the corpus's replies.")
    with small_writer(lesson.seed, steps=150) as writer:
        model = measure_pairs(lesson, writer)
        measure_freedom(lesson, writer, model)
        measure_credit(lesson, writer, model)
