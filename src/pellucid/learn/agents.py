"""Policies and critics with an optimizer each, and the carts of chapter 5 that give them batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.config import EnvConfig, OptimizerConfig
from pellucid.execution.learner import Learner
from pellucid.models import CausalLM, MLPPolicy, MLPValue, ScalarModel
from pellucid.rollout.gym import collect, make_environments
from pellucid.types import Batch, derive_seed


class Agent(NamedTuple):
    """A policy, a critic, and how they learn. rows: of a minibatch."""

    policy: CausalLM | MLPPolicy
    critic: ScalarModel | MLPValue
    learners: tuple[Learner, Learner]
    gamma: float
    epochs: int
    rows: int

    def descend(self, policy_loss: Tensor, value_loss: Tensor) -> None:
        """One step of Adam on each model."""
        for learner, loss in zip(self.learners, (policy_loss, value_loss), strict=True):
            learner.zero_grad()
            loss.backward()
            learner.step()


def make_agent(policy: Any, critic: Any, lr: float, **how: Any) -> Agent:
    """lr: the policy's; the critic's is three times as high. how: Agent's other fields."""
    actor_learner, critic_learner = (
        Learner(role, model.module, OptimizerConfig(lr=rate, anneal=False), 1)
        for role, model, rate in (("actor", policy, lr), ("critic", critic, 3 * lr))
    )
    return Agent(policy, critic, (actor_learner, critic_learner), **how)


class Carts:
    """16 poles on carts, and the agent that is to balance them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.environments = make_environments(EnvConfig(num_envs=16), derive_seed(seed, "carts"))
        policy = MLPPolicy(4, (64, 64), 2, derive_seed(seed, "cart actor"), "cpu")
        critic = MLPValue(4, (64, 64), derive_seed(seed, "cart critic"), "cpu")
        self.agent = make_agent(policy, critic, 1e-3, gamma=0.99, epochs=6, rows=4)

    def sample(self, step: int) -> tuple[Batch, float]:
        """128 steps of each cart under the policy of this iteration, and the mean return of the episodes that ended."""
        policy, critic = self.agent.policy, self.agent.critic
        assert isinstance(policy, MLPPolicy) and isinstance(critic, MLPValue)
        rollout = collect(self.environments, policy, 128, derive_seed(self.seed, "cart rollout", step), version=step)
        with torch.no_grad():
            beyond = critic.values(rollout.after) * ~rollout.terminated
        mean_return = sum(total for total, _ in rollout.episodes) / max(1, len(rollout.episodes))
        return replace(rollout.batch, bootstrap_values=beyond), mean_return
