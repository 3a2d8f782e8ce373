"""Chapter 2: the policy gradient, exactly on a problem that can be listed, then by REINFORCE on CartPole.

`estimates` is the whole idea: a trajectory's estimate of the gradient is Σ_t weight_t · ∇ log π(a_t | s_t). `weightings` are
what the weights may be; `reinforce` is the algorithm. `measures` gives each claim its figure, and whether it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vmap

from pellucid.core import aggregate, discounted_returns, masked_mean
from pellucid.learn.lesson import Lesson
from pellucid.learn.measures import chapter_2 as measures
from pellucid.learn.measures.chapter_1 import first_episodes
from pellucid.learn.pictures.chapter_2 import draw_estimates, draw_learning
from pellucid.learn.tiny_mdp import machine
from pellucid.models import MLPPolicy
from pellucid.types import derive_seed

GAMMA, BATCHES, EPISODES = 0.9, 4000, 20  # on the small problem
ITERATIONS, CARTS, RUNS = 50, 16, 3  # on CartPole


def estimates(logits: Tensor, states: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """What each trajectory says the gradient is: Σ_t weight_t · ∇ log π(a_t | s_t). (S,A), (N,T) three times -> (N,S,A)."""

    def weighted(x: Tensor, states: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
        return (weights * x.log_softmax(-1)[states, actions]).sum()

    return vmap(grad(weighted), in_dims=(None, 0, 0, 0))(logits, states, actions, weights)


def weightings(to_go: Tensor, values: Tensor) -> dict[str, Tensor]:
    """What ∇ log π(a_t | s_t) may be multiplied by. to_go: G_t, the return from step t on. values: V(s_t). Each (N,T)."""
    fade = GAMMA ** torch.arange(to_go.shape[1], dtype=to_go.dtype)
    return {
        "whole return": to_go[:, :1].expand_as(to_go),
        "reward-to-go": fade * to_go,
        "reward-to-go less the value": fade * (to_go - values),
        "reward-to-go less 10": fade * (to_go - 10),
        "reward-to-go without γ^t": to_go,
    }


def reinforce(seed: int, whole: bool, advance: Callable[[], None]) -> list[float]:
    """REINFORCE [Williams 1992]. whole: weights are whole returns, else reward-to-go less a baseline. Returns the mean return
    of each iteration's episodes, which the policy played before it was changed."""
    policy = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "policy"), "cpu")
    adam, curve = torch.optim.Adam(policy.module.parameters(), lr=3e-3), []
    for step in range(ITERATIONS):
        rollout, mask = first_episodes(policy, derive_seed(seed, "carts", step), carts=CARTS)
        batch, rewards = rollout.batch, rollout.batch.get("rewards")
        returns = discounted_returns(rewards, mask, batch.ended, batch.bootstrap_values, gamma=0.99)
        weights = returns[:, :1].expand_as(returns) if whole else returns - masked_mean(returns, mask)
        logprobs, _ = policy.logprobs_of(batch, temperature=1.0)
        adam.zero_grad()
        aggregate(-weights * logprobs, mask, "token").backward()
        adam.step()
        curve.append((rewards * mask).sum(1).mean().item())
        advance()
    return curve


def run(lesson: Lesson) -> None:
    chance = torch.Generator().manual_seed(derive_seed(lesson.seed, "logits"))
    logits = torch.randn(2, 2, dtype=torch.float64, generator=chance) / 2
    every = measures.Listing(machine(horizon=4), logits, GAMMA)
    weights = weightings(every.to_go, every.values)
    found = {name: every.moments(estimates(logits, *every.paths, weight)) for name, weight in weights.items()}
    title = f"All {len(every.to_go)} trajectories of the machine, γ = {GAMMA}"
    lesson.table(title, measures.MOMENT_COLUMNS, measures.moment_rows(found))
    lesson.claim(
        "Policy gradient theorem: the mean of the estimate over all trajectories is the slope of the expected return",
        *measures.theorem(found),
    )
    lesson.claim(
        "Reward-to-go has the same mean as the whole return, and here less variance",
        *measures.reward_to_go(found),
    )
    lesson.claim(
        "A baseline leaves the mean alone, whatever it is; a good one lowers the variance, a bad one raises it",
        *measures.baselines(found),
    )
    lesson.claim(
        "Without γ^t, as everybody runs it, the mean is not the gradient of the discounted return, nor of anything else",
        *measures.without_fade(estimates, every, weights, found),
    )
    lesson.claim(
        "That reward-to-go has less variance is no law: where what comes later undoes what came before, it has more",
        *measures.undone_reward(estimates),
    )

    guesses = measures.sample(estimates, every, weights, derive_seed(lesson.seed, "samples"), BATCHES, EPISODES)
    lesson.claim(
        f"From samples: the mean of {BATCHES:,} estimates, each from {EPISODES} episodes, is the exact gradient",
        *measures.centres(guesses, every.slope),
    )
    draw = partial(draw_estimates, guesses=guesses, exact=every.slope)
    caption = f"Estimates of one slope, each from {EPISODES} episodes: one mean, three variances."
    lesson.picture("2-estimates", draw, caption)
    lesson.claim(
        "So it is on CartPole (γ = 1): reward-to-go is less noisy than the whole return, and less so again with a baseline",
        *measures.noise_on_cartpole(lesson.seed),
    )

    with lesson.progress("REINFORCE", 2 * RUNS * ITERATIONS) as advance:
        better, whole = (
            [reinforce(derive_seed(lesson.seed, run), kind, advance) for run in range(RUNS)] for kind in (False, True)
        )
    lesson.claim(
        f"REINFORCE learns CartPole in {ITERATIONS} updates of {CARTS} episodes each", *measures.learned(better)
    )
    lesson.claim(
        "Less noise is faster learning: with the whole return it gets less far in the same number of episodes",
        *measures.less_learned(whole, better),
    )
    curves = {"reward-to-go less its mean": better, "whole return": whole}
    draw = partial(draw_learning, curves=curves, episodes=CARTS)
    lesson.picture("2-learning", draw, "REINFORCE on CartPole, with two kinds of weights.")
