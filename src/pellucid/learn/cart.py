"""CartPole for chapters 3 and 4: environments, an actor and a critic with an optimizer each, and samples of their steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pellucid.config import EnvConfig, OptimizerConfig
from pellucid.execution.learner import Learner
from pellucid.learn.measures.chapter_1 import first_episodes
from pellucid.models import MLPPolicy, MLPValue
from pellucid.rollout.gym import collect, make_environments
from pellucid.types import Batch, derive_seed

RECENT = 20
"""Episodes that `Cart.recent_return` is the mean of."""
Curve = list[tuple[int, float]]
"""(environment steps, mean return of the last 20 episodes) of each iteration."""


class Cart:
    """num_envs carts that a policy drives; actor and critic are two MLPs, 64-64 tanh, and learn by Adam with one rate.

    steps: environment steps sampled so far. returns: of the last episodes that ended.
    """

    def __init__(self, seed: int, lr: float, num_envs: int = 16) -> None:
        self.seed = seed
        self.environments = make_environments(EnvConfig(num_envs=num_envs), derive_seed(seed, "carts"))
        self.actor = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "actor"), "cpu")
        self.critic = MLPValue(4, (64, 64), derive_seed(seed, "critic"), "cpu")
        self.learners = tuple(
            Learner(role, model.module, OptimizerConfig(lr=lr, beta2=0.999, max_grad_norm=0.5, anneal=False), 1)
            for role, model in (("actor", self.actor), ("critic", self.critic))
        )
        self.samples = self.steps = 0
        self.returns: deque[float] = deque(maxlen=RECENT)

    @torch.no_grad()
    def sample(self, num_steps: int) -> Batch:
        """num_steps of each environment under the policy, (N,T), with old_logprobs and old_values. bootstrap_values[t] is
        the critic's V of what came after step t, 0 where the episode terminated: a pole that fell earns nothing more."""
        rollout = collect(
            self.environments, self.actor, num_steps, derive_seed(self.seed, "sample", self.samples), self.samples
        )
        self.samples, self.steps = self.samples + 1, self.steps + int(rollout.batch.action_mask.sum())
        self.returns += [total for total, _ in rollout.episodes]
        batch = replace(rollout.batch, bootstrap_values=self.critic.values(rollout.after) * ~rollout.terminated)
        old_logprobs, _ = self.actor.logprobs_of(batch, 1.0)
        return batch.having(old_logprobs=old_logprobs, old_values=self.critic.values_of(batch))

    @property
    def recent_return(self) -> float:
        """Mean return of the last 20 episodes that ended; 0 before there are so many."""
        return sum(self.returns) / RECENT if len(self.returns) == RECENT else 0.0

    def descend(self, actor_loss: Tensor, critic_loss: Tensor) -> None:
        """One step of Adam on each network."""
        for learner, loss in zip(self.learners, (actor_loss, critic_loss), strict=True):
            learner.zero_grad()
            loss.backward()
            learner.step()


def whole_episodes(policy: MLPPolicy, count: int, seed: int) -> Batch:
    """The first episode of each of `count` carts, (count, 500); action_mask ends where the episode does."""
    rollout, first = first_episodes(policy, seed, carts=count)
    return replace(rollout.batch, action_mask=first)


def learning_curve(
    cart: Cart, iterate: Callable[[Cart], None], budget: float = math.inf, goal: float = math.inf
) -> Curve:
    """Iterations until the recent return reaches the goal, or the budget of environment steps is used."""
    curve = []
    while cart.recent_return < goal and cart.steps < budget:
        iterate(cart)
        curve.append((cart.steps, cart.recent_return))
    return curve
