"""Chapter 6: the reward model. From pairs of replies, of which one is preferred, to one number for a reply; and from this
number, which comes with the last token, to a value for every token.

Three things are measured: how the agreement with the hidden preference grows with the number of pairs; what the loss leaves
open (the zero of the scores) and what it settles (their scale, as odds); and where a trained critic puts the credit.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain, count, islice, product

import torch
from torch import Tensor

from pellucid.config import OptimizerConfig
from pellucid.core import aggregate, bradley_terry, discounted_returns, gae, kl_shaped_rewards, value_clip
from pellucid.data import PreferenceExample
from pellucid.execution.learner import Learner, minibatches
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_6 as measures
from pellucid.learn.small_writer import Writer, small_writer
from pellucid.models import ScalarModel
from pellucid.rewards import ModelReward
from pellucid.rollout import EmbeddedEngine
from pellucid.types import Batch, Sample, collate, collate_supervised, derive_seed

SIZES, REPEATS = (50, 100, 200, 400, 800, 2000), 2  # pairs to learn from; models of each size, on disjoint pairs
UPDATES, PAIRS_PER_UPDATE = 60, 32
REPLIES, HELD_OUT, EPOCHS = 1536, 256, 5  # the critic learns from, is measured on; passes over the former


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


def batch_of(samples: list[Sample], model: ScalarModel) -> Batch:
    """(B,T): the score on the last token and 0 before; without a discount the return of every token is the score."""
    scores = torch.tensor([score.value for score in ModelReward(model, batch_size=64).score(samples)])
    batch = collate(samples, pad_id=0)
    rewards = kl_shaped_rewards(scores, torch.zeros(batch.input_ids.shape), batch.action_mask, kl_coef=0.0)
    returns = discounted_returns(rewards, batch.action_mask, batch.ended, batch.bootstrap_values, gamma=1.0)
    return batch.having(scores=scores, rewards=rewards, returns=returns)


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


def td_errors(batch: Batch, values: Tensor) -> Tensor:
    """δ_t = r_t + V_{t+1} - V_t, which is `gae` with λ = 0: what each token adds to what is expected. (B,T)"""
    rewards, mask, beyond = batch.get("rewards"), batch.action_mask, batch.bootstrap_values
    return gae(rewards, values, mask, batch.ended, beyond, gamma=1.0, lam=0.0)[0]


def learn_preference(lesson: Lesson, writer: Writer) -> ScalarModel:
    """Models that learn from more and more pairs. Returns the first of those that learned from the most."""
    pairs, held_out = writer.pairs("preferences", SIZES[-1] * REPEATS), writer.pairs("preferences_heldout", 500)
    models, gaps = {}, {}
    with lesson.progress("reward models", len(SIZES) * REPEATS) as advance:
        for size, k in product(SIZES, range(REPEATS)):
            part, seed = pairs[k * size : (k + 1) * size], derive_seed(lesson.seed, "reward model", k)
            models[size, k] = train_reward_model(writer, part, seed)
            with torch.no_grad():
                chosen, rejected = pair_scores(models[size, k], held_out)
            gaps[size, k] = chosen - rejected
            advance()
    measures.show_agreement(lesson, gaps, UPDATES)
    return models[SIZES[-1], 0]


def spread_credit(lesson: Lesson, writer: Writer, model: ScalarModel) -> None:
    """A critic of the policy that wrote the replies, which stays as it is: only the values learn."""
    policy = writer.policy()
    engine = EmbeddedEngine(policy.hf, num_slots=64)
    replies = engine.generate(writer.prompts("prompts", REPLIES), writer.params("replies"))
    model.set_shift(batch_of(replies, model).get("scores").mean().item())  # the reference's mean becomes 0
    unseen = engine.generate(writer.prompts("prompts_heldout", HELD_OUT), writer.params("held out"))
    batch, held_out = batch_of(replies, model), batch_of(unseen, model)
    measures.show_terminal_reward(lesson, batch)
    critic = deepcopy(model)  # it has read replies, and knows what is liked
    before = critic.values_of(held_out).detach()
    train_critic(critic, batch, lesson.seed)
    after = critic.values_of(held_out).detach()
    measures.show_values(lesson, held_out, before, after)
    deltas = [td_errors(held_out, values) for values in (before, after)]
    measures.show_deltas(lesson, held_out, (before, after), deltas, measures.entropies(policy, held_out))
    prefixes, drawn = measures.go_on(engine, writer, unseen)
    measures.show_continuations(lesson, prefixes, batch_of(drawn, model).get("scores"), before, after)


def run(lesson: Lesson) -> None:
    lesson.say("A small language model is made, and fine-tuned on the corpus's replies.")
    with small_writer(lesson.seed, steps=150) as writer:
        model = learn_preference(lesson, writer)
        measures.show_zero(lesson, *pair_scores(model, writer.pairs("preferences_heldout", 200)))
        measures.show_scale(lesson)
        spread_credit(lesson, writer, model)
