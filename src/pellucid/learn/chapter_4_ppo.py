"""Chapter 4: PPO. Several passes over one sample, made possible by the ratio and made harmless, mostly, by the clip.

`ppo` is one iteration in full. What a ratio and the clip do is first solved exactly (measures/importance.py). Then one
sample is used up to 40 times by three losses, policies are trained by each of them, and PPO races chapter 3's actor-critic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pellucid.core import aggregate, gae, masked_whiten, ppo_clip, value_clip
from pellucid.execution.learner import minibatches
from pellucid.learn.cart import Cart, learning_curve
from pellucid.learn.chapter_3_actor_critic import GAMMA, LAMBDA, actor_critic
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_4 as measures
from pellucid.learn.measures.importance import show_clip, show_importance, show_surrogate
from pellucid.learn.pictures.chapter_4 import draw_passes, draw_race, draw_training
from pellucid.types import Batch, derive_seed, transitions

CLIP, EPOCHS, ROWS, NUM_STEPS = 0.2, 8, 256, 64
RATES = (3e-3, 1e-2, 3e-2)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {  # (logprobs, old_logprobs, advantages) -> loss per step
    "PPO": lambda logprobs, old, advantages: ppo_clip(logprobs, old, advantages, CLIP, CLIP)[0],
    "no clip": lambda logprobs, old, advantages: -(logprobs - old).exp() * advantages,
    "no ratio": lambda logprobs, old, advantages: -logprobs * advantages,  # chapters 2 and 3: right in the first pass
}


def ppo(cart: Cart, policy_loss: Loss = LOSSES["PPO"]) -> None:
    """One iteration: a sample, its advantages, then EPOCHS passes over its steps in minibatches of ROWS."""
    steps = with_advantages(cart.sample(NUM_STEPS))
    for epoch in range(EPOCHS):
        one_pass(cart, steps, policy_loss, derive_seed(cart.seed, cart.samples, epoch))


def with_advantages(batch: Batch) -> Batch:
    """The batch's steps as rows (num_action_tokens, 1), with advantages, whitened over the whole sample, and returns."""
    mask, values = batch.action_mask, batch.get("old_values")
    advantages, returns = gae(batch.get("rewards"), values, mask, batch.ended, batch.bootstrap_values, GAMMA, LAMBDA)
    return transitions(batch.having(advantages=masked_whiten(advantages, mask), returns=returns))


def one_pass(cart: Cart, steps: Batch, policy_loss: Loss, seed: int) -> None:
    for rows in minibatches(len(steps), ROWS, seed):
        part = steps.select(rows)
        logprobs, _ = cart.actor.logprobs_of(part, 1.0)
        loss = policy_loss(logprobs, part.get("old_logprobs"), part.get("advantages"))
        # None: no clip of the value. Its range would be in reward units, and returns here go from 1 to 100.
        value_loss, _ = value_clip(cart.critic.values_of(part), part.get("old_values"), part.get("returns"), None)
        cart.descend(aggregate(loss, part.action_mask, "token"), aggregate(value_loss, part.action_mask, "token"))


def show_reuse(lesson: Lesson, repeats: int = 3, passes: tuple[int, ...] = (0, 2, 5, 10, 20, 40)) -> None:
    """A half-trained policy, the same for every loss, then one sample over and over. Medians over the repeats."""
    runs: dict[str, list[measures.Reuse]] = {name: [] for name in LOSSES}
    for name, loss in LOSSES.items():
        for i in range(repeats):
            cart = Cart(derive_seed(lesson.seed, "reuse", i), lr=3e-3)
            learning_curve(cart, ppo, goal=60)
            steps = with_advantages(cart.sample(2 * NUM_STEPS))
            runs[name].append(measures.reuse(cart, steps, partial(one_pass, cart, steps, loss), passes))
    reuse = {name: measures.medians(found) for name, found in runs.items()}
    title = "One sample: KL to the policy that sampled (nats) / true return"
    lesson.table(title, ("passes", *LOSSES), measures.reuse_rows(reuse, passes))
    kl, outside = {name: found.kl[-1] for name, found in reuse.items()}, reuse["PPO"].outside
    lesson.claim(
        "Without the ratio, or without the clip, passes over one sample take the policy far from the one that sampled it",
        f"KL after {passes[-1]} passes: " + ", ".join(f"{name} {kl[name]:.2g}" for name in LOSSES) + " nats",
        min(kl["no clip"], kl["no ratio"]) > 10 * kl["PPO"],
    )
    lesson.claim(
        "The clip does not hold the ratio within its range: it takes the gradient away outside, on one side",
        f"after {passes[-1]} passes of PPO {outside:.0%} of the ratios are outside 0.8 to 1.2",
        outside > 0.02,
    )
    caption = "One sample of 2,048 steps from a half-trained policy, used up to 40 times."
    lesson.picture("4-passes", partial(draw_passes, passes=passes, reuse=reuse), caption, panels=2)


def show_training(lesson: Lesson, repeats: int = 5, budget: int = 40_000) -> None:
    entrants = {name: (partial(ppo, policy_loss=loss), 3e-3) for name, loss in LOSSES.items()}
    runs = measures.repeated(lesson, "training", entrants, repeats, budget)
    clipped, no_clip, no_ratio = runs.values()
    lesson.claim(
        f"Trained by {EPOCHS} passes over each sample, only the loss with ratio and clip gets to a return of 475 soon",
        f"median of {repeats} runs: " + ", ".join(f"{name} {found.shown}" for name, found in runs.items()) + " steps",
        clipped.steps < budget and min(no_clip.steps, no_ratio.steps) > 1.3 * clipped.steps,
    )
    lesson.claim(
        "Without the ratio the return collapses",
        f"median of {repeats} runs: at best {no_ratio.peak:.0f} on the way, {no_ratio.last:.0f} after {budget:,} steps; "
        f"without the clip alone {no_clip.last:.0f}; PPO had {clipped.last:.0f} after {clipped.shown}",
        no_ratio.last < 0.5 * clipped.last,
    )
    caption = f"CartPole-v1, {repeats} runs each, which stop at 475: the same passes, three losses."
    lesson.picture("4-training", partial(draw_training, runs=runs), caption)


def show_race(lesson: Lesson, repeats: int = 5, budget: int = 100_000) -> None:
    racers = {"actor-critic": actor_critic, "PPO": ppo}
    entrants = {(name, rate): (iterate, rate) for name, iterate in racers.items() for rate in RATES}
    runs = measures.repeated(lesson, "race", entrants, repeats, budget)
    rows = [[name, *(runs[name, rate].shown for rate in RATES)] for name in racers]
    columns = ("", *(f"rate {rate:g}" for rate in RATES))
    lesson.table(f"Environment steps to a return of 475: median of {repeats} runs", columns, rows)
    slow, fast = (measures.best(runs[name, rate] for rate in RATES) for name in racers)
    factor = min(slow.steps, budget) / min(fast.steps, budget)
    lesson.claim(
        f"PPO balances the pole in fewer environment steps than the actor-critic, each at the best of {len(RATES)} rates",
        f"{fast.shown} against {slow.shown} steps: {factor:.1f} times fewer",
        factor > 1,
    )
    caption = f"CartPole-v1, {repeats} runs each, the same networks and samples of 1,024 steps."
    lesson.picture("4-race", partial(draw_race, actor_critic=slow, ppo=fast), caption)


def run(lesson: Lesson) -> None:
    for show in (show_importance, show_surrogate, show_clip, show_reuse, show_training, show_race):
        show(lesson)
