"""Chapter 5: a language model is a policy. The state is the prefix, the action the next token, the logits the policy.

`improve` is PPO's iteration in full. It sees rows and columns, and is called with carts and with sentences. On the way
`language_measures` looks at what is different with sentences: states, actions, rewards, and what a token hears of the loss.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from pellucid.config import EnvConfig, OptimizerConfig
from pellucid.core import aggregate, gae, kl_shaped_rewards, masked_whiten, ppo_clip, value_clip
from pellucid.execution.learner import Learner, minibatches
from pellucid.learn.language_measures import (
    Episode,
    measure_actions,
    measure_discount,
    measure_passes,
    measure_states,
    measure_tokens,
)
from pellucid.learn.language_pictures import draw_curves
from pellucid.learn.lesson import Lesson
from pellucid.learn.small_writer import Writer, small_writer
from pellucid.models import CausalLM, MLPPolicy, MLPValue, ScalarModel
from pellucid.rollout import EmbeddedEngine
from pellucid.rollout.gym import collect, make_environments
from pellucid.rollout.sampling import request_uniforms
from pellucid.types import Batch, Prompt, Sample, SamplingParams, collate, derive_seed

LIMIT = 40
"""Longest reply, in tokens."""


class Agent(NamedTuple):
    """A policy and a critic with an optimizer each. rows: of a minibatch."""

    policy: CausalLM | MLPPolicy
    critic: ScalarModel | MLPValue
    learners: tuple[Learner, Learner]
    gamma: float
    epochs: int
    rows: int


def make_agent(policy: Any, critic: Any, lr: float, **how: Any) -> Agent:
    actor_learner, critic_learner = (
        Learner(role, model.module, OptimizerConfig(lr=rate, anneal=False), 1)
        for role, model, rate in (("actor", policy, lr), ("critic", critic, 3 * lr))
    )
    return Agent(policy, critic, (actor_learner, critic_learner), **how)


def improve(agent: Agent, batch: Batch, seed: int) -> Batch:
    """One iteration of PPO on a batch (B,T) with rewards. Nothing in here knows whether a row is a cart or a sentence."""
    mask = batch.action_mask
    with torch.no_grad():
        old_logprobs, old_values = agent.policy.logprobs_of(batch, 1.0)[0], agent.critic.values_of(batch)
    rewards, ended, beyond = batch.get("rewards"), batch.ended, batch.bootstrap_values
    advantages, returns = gae(rewards, old_values, mask, ended, beyond, agent.gamma, lam=0.95)
    batch = batch.having(old_logprobs=old_logprobs, old_values=old_values, returns=returns)
    batch = batch.having(advantages=masked_whiten(advantages, mask))
    for epoch in range(agent.epochs):
        for rows in minibatches(len(batch), agent.rows, seed + epoch):
            part = batch.select(rows)
            logprobs, values = agent.policy.logprobs_of(part, 1.0)[0], agent.critic.values_of(part)
            policy_loss, _ = ppo_clip(logprobs, part.get("old_logprobs"), part.get("advantages"), 0.2, 0.2)
            value_loss, _ = value_clip(values, part.get("old_values"), part.get("returns"), None)
            for learner, loss in zip(agent.learners, (policy_loss, value_loss), strict=True):
                learner.zero_grad()
                aggregate(loss, part.action_mask, "token").backward()
                learner.step()
    return batch


# ---------------------------------------------------------------- two makers of batches


def train_cart(seed: int, iterations: int) -> list[float]:
    """Mean return of the episodes that ended in each iteration."""
    environments = make_environments(EnvConfig(num_envs=16), derive_seed(seed, "carts"))
    policy = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "cart actor"), "cpu")
    critic = MLPValue(4, (64, 64), derive_seed(seed, "cart critic"), "cpu")
    agent, curve = make_agent(policy, critic, 1e-3, gamma=0.99, epochs=6, rows=4), []
    for step in range(iterations):
        rollout = collect(environments, policy, 128, derive_seed(seed, "cart rollout", step), version=step)
        with torch.no_grad():
            beyond = critic.values(rollout.after) * ~rollout.terminated
        improve(agent, replace(rollout.batch, bootstrap_values=beyond), derive_seed(seed, "cart rows", step))
        curve.append(sum(total for total, _ in rollout.episodes) / max(1, len(rollout.episodes)))
    return curve


def score(text: str) -> float:
    """The reward of this chapter: how often a reply says "you", "your" or "yours"."""
    return float(len(re.findall(r"\byours?\b|\byou\b", text.lower())))


def batch_of(writer: Writer, samples: list[Sample]) -> Batch:
    """Ragged samples -> (B,T), the score on each one's last token and 0 on all before it."""
    scores, batch = torch.tensor([score(writer.text(sample)) for sample in samples]), collate(samples, pad_id=0)
    no_kl = torch.zeros(batch.input_ids.shape)  # chapter 7 puts a price here
    return batch.having(scores=scores, rewards=kl_shaped_rewards(scores, no_kl, batch.action_mask, kl_coef=0.0))


@torch.no_grad()
def by_hand(policy: CausalLM, prompt: Prompt, params: SamplingParams) -> Episode:
    """An episode: one pass through the model for each action. The last lines of the loop are the whole environment."""
    state, logprobs = list(prompt.input_ids), []
    for u in request_uniforms(params, prompt.id, 0):
        logits = policy.hf(input_ids=torch.tensor([state]), use_cache=False).logits[0, -1]
        distribution = logits.double().softmax(-1)
        action = int((distribution.cumsum(-1) <= u).sum())  # the first whose cumulative probability exceeds u
        logprobs.append(distribution[action].log().item())
        state = [*state, action]
        if action in params.stop_token_ids:
            break
    return state, logprobs


# ---------------------------------------------------------------- the loop


def train_writer(lesson: Lesson, writer: Writer, iterations: int) -> list[float]:
    """PPO on replies, measured on the way. Returns the mean score of each iteration."""
    policy, critic = writer.policy(), writer.scalar_model(derive_seed(lesson.seed, "critic head"))
    agent, curve = make_agent(policy, critic, 3e-4, gamma=1.0, epochs=2, rows=16), []
    engine, prompts = EmbeddedEngine(policy.hf, num_slots=64), writer.prompts("prompts", 64 * iterations)
    held_out, params = writer.prompts("prompts_heldout", 128), writer.params("held out", max_new_tokens=LIMIT)
    before = engine.generate(held_out, params)
    measure_passes(lesson, policy, before[:8], [by_hand(policy, prompt, params) for prompt in held_out[:8]])
    measure_states(lesson, policy, held_out[:8], params)
    measure_actions(lesson, policy, batch_of(writer, before))
    measure_discount(lesson, batch_of(writer, before))
    with lesson.progress("PPO on replies", iterations) as advance:
        for step in range(iterations):
            now = writer.params("rollout", step, max_new_tokens=LIMIT)
            batch = batch_of(writer, engine.generate(prompts[64 * step : 64 * (step + 1)], now))
            batch = improve(agent, batch, derive_seed(lesson.seed, "rows", step))
            if step == 3:
                measure_tokens(lesson, writer.tokenizer, policy, batch)
            curve.append(batch.get("scores").mean().item())
            advance()
    after = engine.generate(held_out, params)
    old, new = batch_of(writer, before).get("scores"), batch_of(writer, after).get("scores")
    error = (new - old).std() / len(old) ** 0.5
    lesson.claim(
        "`improve` teaches a language model, with held-out prompts as the measure",
        f"{old.mean():.2f} to {new.mean():.2f} “you”s a reply (standard error of the difference {error:.2f})",
        bool((new - old).mean() > 4 * error),
    )
    texts = [[a.prompt.text, writer.text(a), writer.text(b)] for a, b in zip(before[:2], after, strict=False)]
    lesson.table("What it writes", ("prompt", "before", "after"), texts)
    return curve


def run(lesson: Lesson) -> None:
    carts = train_cart(lesson.seed, iterations=12)
    first, last = carts[0], sum(carts[-3:]) / 3
    lesson.claim("`improve` teaches CartPole", f"mean return {first:.0f} to {last:.0f} steps", last > 3 * first)
    lesson.say("A small language model is made, and fine-tuned on the corpus's replies.")
    with small_writer(lesson.seed, steps=150) as writer:
        replies = train_writer(lesson, writer, iterations=10)
    panels = [("CartPole", carts, "mean return (steps)"), ("replies", replies, "mean score (“you”s a reply)")]
    lesson.picture(
        "5-one-ppo", lambda axes: draw_curves(axes, panels), "One function, and two kinds of rows.", panels=2
    )
