"""Chapter 5: a language model is a policy. The state is the prefix, the action the next token, the logits the policy.

`improve` is PPO's iteration in full. It sees rows and columns, and is called with carts and with sentences. On the way the
chapter looks at what is different with sentences: states, actions, rewards, and what a token hears of the loss.
"""

from __future__ import annotations

import re
from functools import partial

import torch

from pellucid.core import aggregate, gae, kl_shaped_rewards, masked_whiten, ppo_clip, value_clip
from pellucid.execution.learner import minibatches
from pellucid.learn.agents import Agent, Carts, make_agent
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_5 as measures
from pellucid.learn.pictures.chapter_5 import draw_curves
from pellucid.learn.small_writer import Writer, small_writer
from pellucid.models import CausalLM
from pellucid.rollout import EmbeddedEngine
from pellucid.rollout.sampling import request_uniforms
from pellucid.types import Batch, Prompt, Sample, SamplingParams, collate, derive_seed

LIMIT = 40  # longest reply, in tokens


def improve(agent: Agent, batch: Batch, seed: int) -> Batch:
    """One iteration of PPO on a batch (B,T) with rewards. Nothing in here knows whether a row is a cart or a sentence."""
    mask, rewards = batch.action_mask, batch.get("rewards")
    with torch.no_grad():
        old_logprobs, old_values = agent.policy.logprobs_of(batch, 1.0)[0], agent.critic.values_of(batch)
    advantages, returns = gae(rewards, old_values, mask, batch.ended, batch.bootstrap_values, agent.gamma, lam=0.95)
    advantages = masked_whiten(advantages, mask)
    batch = batch.having(old_logprobs=old_logprobs, old_values=old_values, advantages=advantages, returns=returns)
    for epoch in range(agent.epochs):
        for rows in minibatches(len(batch), agent.rows, seed + epoch):
            part = batch.select(rows)
            logprobs, values = agent.policy.logprobs_of(part, 1.0)[0], agent.critic.values_of(part)
            policy_loss, _ = ppo_clip(logprobs, part.get("old_logprobs"), part.get("advantages"), 0.2, 0.2)
            value_loss, _ = value_clip(values, part.get("old_values"), part.get("returns"), None)
            agent.descend(
                aggregate(policy_loss, part.action_mask, "token"), aggregate(value_loss, part.action_mask, "token")
            )
    return batch


def score(text: str) -> float:
    """The reward of this chapter: how often a reply says "you", "your" or "yours"."""
    return float(len(re.findall(r"\byours?\b|\byou\b", text.lower())))


def batch_of(writer: Writer, samples: list[Sample]) -> Batch:
    """Ragged samples -> (B,T), the score on each one's last token and 0 on all before it."""
    scores, batch = torch.tensor([score(writer.text(sample)) for sample in samples]), collate(samples, pad_id=0)
    no_kl = torch.zeros(batch.input_ids.shape)  # chapter 7 puts a price here
    return batch.having(scores=scores, rewards=kl_shaped_rewards(scores, no_kl, batch.action_mask, kl_coef=0.0))


@torch.no_grad()
def by_hand(policy: CausalLM, prompt: Prompt, params: SamplingParams) -> measures.Episode:
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


def train_writer(lesson: Lesson, writer: Writer, iterations: int) -> list[float]:
    """PPO on replies, measured on the way. Returns the mean score of each iteration."""
    policy, critic = writer.policy(), writer.scalar_model(derive_seed(lesson.seed, "critic head"))
    agent, curve = make_agent(policy, critic, 3e-4, gamma=1.0, epochs=2, rows=16), []
    engine, prompts = EmbeddedEngine(policy.hf, num_slots=64), writer.prompts("prompts", 64 * iterations)
    held_out, params = writer.prompts("prompts_heldout", 128), writer.params("held out", max_new_tokens=LIMIT)
    before = engine.generate(held_out, params)
    untrained = batch_of(writer, before)
    measures.show_passes(lesson, policy, before[:8], [by_hand(policy, prompt, params) for prompt in held_out[:8]])
    measures.show_states(lesson, policy, held_out[:8], params)
    measures.show_actions(lesson, policy, untrained)
    measures.show_discount(lesson, untrained)
    with lesson.progress("PPO on replies", iterations) as advance:
        for step in range(iterations):
            now = writer.params("rollout", step, max_new_tokens=LIMIT)
            batch = batch_of(writer, engine.generate(prompts[64 * step : 64 * (step + 1)], now))
            batch = improve(agent, batch, derive_seed(lesson.seed, "rows", step))
            if step == 3:
                measures.show_tokens(lesson, writer.tokenizer, policy, batch)
            curve.append(batch.get("scores").mean().item())
            advance()
    after = engine.generate(held_out, params)
    old, new = untrained.get("scores"), batch_of(writer, after).get("scores")
    error = (new - old).std() / len(old) ** 0.5
    lesson.claim(
        "`improve` teaches a language model, with held-out prompts as the measure",
        f"{old.mean():.2f} to {new.mean():.2f} “you”s a reply (standard error of the difference {error:.2f})",
        bool((new - old).mean() > 4 * error),
    )
    texts = [[a.prompt.text, writer.text(a), writer.text(b)] for a, b in zip(before[:2], after[:2], strict=True)]
    lesson.table("What it writes", ("prompt", "before", "after"), texts)
    return curve


def run(lesson: Lesson) -> None:
    carts, returns = Carts(lesson.seed), []
    for step in range(12):
        batch, mean_return = carts.sample(step)
        improve(carts.agent, batch, derive_seed(lesson.seed, "cart rows", step))
        returns.append(mean_return)
    first, last = returns[0], sum(returns[-3:]) / 3
    lesson.claim("`improve` teaches CartPole", f"mean return {first:.0f} to {last:.0f} steps", last > 3 * first)
    lesson.say("A small language model is made, and fine-tuned on the corpus's replies.")
    with small_writer(lesson.seed, steps=150) as writer:
        scores = train_writer(lesson, writer, iterations=10)
    draw = partial(draw_curves, carts=returns, replies=scores)
    lesson.picture("5-one-ppo", draw, "One function, and two kinds of rows.", panels=2)
