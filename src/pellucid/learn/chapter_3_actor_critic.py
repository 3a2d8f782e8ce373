"""Chapter 3: a critic. It takes noise out of the policy gradient, and, where it is wrong, puts a bias in.

The bias is measured exactly, in a corridor whose every value is the solution of a linear equation. The noise is measured on
CartPole, the same trajectories with and without a critic. Then `actor_critic`, one iteration in full, learns to balance.
"""

from __future__ import annotations

from functools import partial

import torch

from pellucid.core import aggregate, explained_variance, gae, masked_whiten, value_clip
from pellucid.learn.cart import Cart, learning_curve, whole_episodes
from pellucid.learn.corridor import START, STATES, corridor, random_corridor, walk
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_3 as measures
from pellucid.learn.pictures.chapter_3 import draw_lambda, draw_learning, draw_noise
from pellucid.types import derive_seed

GAMMA, LAMBDA = 0.99, 0.95


def actor_critic(cart: Cart, num_steps: int = 64) -> None:
    """One iteration: a sample, its advantages by the critic, one step of the policy, one of the critic."""
    batch = cart.sample(num_steps)
    mask, rewards, old_values = batch.action_mask, batch.get("rewards"), batch.get("old_values")
    advantages, returns = gae(rewards, old_values, mask, batch.ended, batch.bootstrap_values, GAMMA, LAMBDA)
    logprobs, _ = cart.actor.logprobs_of(batch, 1.0)
    policy_loss = -masked_whiten(advantages, mask) * logprobs
    value_loss, _ = value_clip(cart.critic.values_of(batch), old_values, returns, None)  # 0.5 (V - return)², no clip
    cart.descend(aggregate(policy_loss, mask, "token"), aggregate(value_loss, mask, "token"))


def show_corridor(lesson: Lesson) -> None:
    """γ = 1. Three critics of one policy, and the gradient that each makes of the same walks."""
    where = random_corridor(derive_seed(lesson.seed, "policy"))
    walks, true = walk(where, 10_000, derive_seed(lesson.seed, "many")), where.values()
    another = corridor(torch.zeros(STATES, 2)).values()
    learned = measures.learned_values(walk(where, 10, derive_seed(lesson.seed, "few")))
    critics = {"true V": true, "V of another policy": another, "learned from 10 episodes": learned}
    first = walks.gae(true, lam=1.0)[1][:, 0]
    gap, error = (first.mean() - true[START]).item(), (first.std() / len(first) ** 0.5).item()
    lesson.claim(
        "The true V is the mean of the returns; of a single return it says little",
        f"V(start) = {true[START]:.3f}, mean of {len(first)} returns {first.mean():.3f} ± {error:.3f}; "
        f"the standard deviation of one return is {first.std():.2f}",
        abs(gap) < 4 * error and first.std().item() > 10 * abs(gap),
    )

    td, whole = (measures.gradient_bias(where, walks, critics, lam) for lam in (0.0, 1.0))
    rows = measures.bias_rows(critics, td, whole)
    lesson.table("Bias of the policy gradient, as a share of its length", measures.BIAS_COLUMNS, rows)
    wrong = [name for name in critics if name != "true V"]
    lesson.claim(
        "Bootstrapping from a wrong V (λ = 0) biases the gradient; from the true V it does not",
        ", ".join(f"{name}: {td[name].exact:.0%}" for name in wrong) + f"; true V: {td['true V'].exact:.0e}",
        all(td[name].exact > 0.01 for name in wrong) and td["true V"].exact < 1e-9,
    )
    lesson.claim(
        "Used as a baseline alone (λ = 1), any V leaves the gradient unbiased, however wrong",
        f"largest bias {max(bias.exact for bias in whole.values()):.0e} of the gradient",
        all(bias.exact < 1e-9 for bias in whole.values()),
    )

    trade = measures.bias_and_variance(where, walks, learned)
    bias, variance = [bias**0.5 for bias in trade.bias], trade.variance
    lesson.claim(
        "λ trades bias for variance: from 0 to 1 the bias goes to 0, and the variance of an episode's gradient grows",
        f"bias {bias[0]:.0%} to {bias[-1]:.0e} of the gradient; variance × {variance[-1] / variance[0]:.1f}",
        bias[0] > 0.05 and bias[-1] < 1e-9 and variance[-1] > 1.5 * variance[0],
    )
    best = {episodes: trade.best(episodes) for episodes in (10, 100, 10_000)}
    lesson.claim(
        "Which λ has the smallest error depends on how much is sampled: the more episodes, the nearer to 1",
        ", ".join(f"{episodes} episodes: λ = {lam}" for episodes, lam in best.items()),
        best[10] < best[10_000] and best[10] <= best[100] <= best[10_000],
    )
    draw = partial(draw_lambda, true=true, learned=learned, trade=trade)
    lesson.picture("3-lambda", draw, "A critic that is a little wrong, and what λ makes of it.", panels=2)


def show_noise(lesson: Lesson) -> None:
    """CartPole: one policy and its trajectories, the gradient under six weights."""
    cart = Cart(derive_seed(lesson.seed, "noise"), lr=1e-2)
    learning_curve(cart, actor_critic, goal=45)
    known = whole_episodes(cart.actor, 100, derive_seed(lesson.seed, "fit"))
    measures.fit(cart, known, GAMMA, derive_seed(lesson.seed, "rows"))
    batch = whole_episodes(cart.actor, 200, derive_seed(lesson.seed, "measure"))
    values = cart.critic.values_of(batch).detach()
    weights = measures.six_weights(batch, values, GAMMA)
    noise = measures.gradient_noise(cart, batch, weights)
    smaller = {name: noise[measures.PLAIN] / variance for name, variance in noise.items()}
    rows = [[name, f"{noise[name]:.3g}", f"{smaller[name]:.1f}"] for name in weights]
    lesson.table(f"Noise of one episode's gradient, {len(batch)} episodes", ("weight", "variance", "smaller by"), rows)
    explained = explained_variance(values, weights[measures.PLAIN], batch.action_mask)
    baseline, with_gae = smaller[measures.BASELINE], smaller["GAE, λ = 0.95"]
    lesson.claim(
        "The same policy, the same trajectories: less noise with a critic than with chapter 2's reward-to-go",
        f"variance smaller by {baseline:.1f} with V as a baseline, by {with_gae:.1f} with GAE at λ = 0.95; this critic "
        f"explains {explained:.0%} of the returns' variance",
        baseline > 2 and with_gae > baseline,
    )
    caption = "CartPole: the same trajectories, the same policy, six weights A."
    lesson.picture("3-noise", partial(draw_noise, noise=noise), caption)


def show_learning(lesson: Lesson, budget: int = 60_000) -> None:
    carts = [Cart(derive_seed(lesson.seed, "learning", i), lr=1e-2) for i in range(3)]
    curves = [learning_curve(cart, actor_critic, budget) for cart in carts]
    best = sorted(max(value for _, value in curve) for curve in curves)
    lesson.claim(
        "An actor-critic learns from 64 steps at a time, no episode need end in them",
        f"best mean return of 20 episodes within {budget} steps, three seeds: " + ", ".join(f"{v:.0f}" for v in best),
        best[1] > 150,
    )
    caption = "Actor-critic on CartPole-v1, a step of Adam after every 1,024 steps."
    lesson.picture("3-learning", partial(draw_learning, curves=curves), caption)


def run(lesson: Lesson) -> None:
    show_corridor(lesson)
    show_noise(lesson)
    show_learning(lesson)
