"""A corridor small enough to be solved: its values, advantages and policy gradients are systems of linear equations.

States 0 … 6 in a row. Action 0 goes left, action 1 right, and one time in ten it slips the other way. A step costs 0.1;
leaving on the left pays 2, on the right 6, and ends the episode. γ = 1. The policy has a logit for each state and action.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.core import gae

STATES, START, SLIP, STEP_COST, LEFT_EXIT, RIGHT_EXIT = 7, 3, 0.1, -0.1, 2.0, 6.0
LONGEST = 2000
"""Steps by which every walk must have ended; one that long has a chance of less than 1e-9 for the policies used here."""


class Corridor(NamedTuple):
    """probs: (S,A), the policy π. transition: (S,A,S), what is missing to 1 is the chance of leaving. reward: (S,A),
    expected. All float64."""

    probs: Tensor
    transition: Tensor
    reward: Tensor

    def values(self) -> Tensor:
        """V = r_π + P_π V, solved: (S,)."""
        return self._resolvent(1.0) @ (self.probs * self.reward).sum(1)

    def occupancy(self) -> Tensor:
        """Expected visits to each state in an episode that starts in the middle: (S,)."""
        return self._resolvent(1.0)[START]

    def advantages(self, critic: Tensor, lam: float) -> Tensor:
        """What GAE's advantage is for an action on average, exactly, with any critic (S,): (S,A).

        E[A | s, a] = δ(s, a) + λ Σ P(s' | s, a) g(s'),   g = the same, averaged over the policy's actions
        """
        delta = self.reward + self.transition @ critic - critic[:, None]
        later = self._resolvent(lam) @ (self.probs * delta).sum(1)
        return delta + lam * self.transition @ later

    def gradient(self, advantages: Tensor) -> Tensor:
        """E[Σ_t A_t ∇log π(a_t | s_t)] with respect to the logits: (S,A). With the true advantages it is ∇J."""
        centered = advantages - (self.probs * advantages).sum(1, keepdim=True)
        return self.occupancy()[:, None] * self.probs * centered

    def _resolvent(self, lam: float) -> Tensor:
        """(I - λ P_π)⁻¹."""
        policy_transition = (self.probs[:, :, None] * self.transition).sum(1)
        return torch.linalg.inv(torch.eye(STATES, dtype=torch.float64) - lam * policy_transition)


def corridor(logits: Tensor) -> Corridor:
    """logits: (S,A)."""
    transition = torch.zeros(STATES, 2, STATES, dtype=torch.float64)
    reward = torch.full((STATES, 2), STEP_COST).double()
    for state in range(STATES):
        for action in range(2):
            for moved, chance in ((action, 1 - SLIP), (1 - action, SLIP)):
                target = state + 2 * moved - 1
                if 0 <= target < STATES:
                    transition[state, action, target] += chance
                else:
                    reward[state, action] += chance * (LEFT_EXIT if target < 0 else RIGHT_EXIT)
    return Corridor(logits.double().softmax(1), transition, reward)


def random_corridor(seed: int) -> Corridor:
    """Of a policy whose logits are drawn, with a standard deviation of a half."""
    return corridor(0.5 * torch.randn(STATES, 2, generator=torch.Generator().manual_seed(seed)))


class Walks(NamedTuple):
    """Sampled episodes. states, actions, rewards, mask, ended: (B,T)."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    mask: Tensor
    ended: Tensor

    def gae(self, critic: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        """Advantages and returns by `core.gae`, γ = 1: (B,T) each."""
        none_beyond = torch.zeros_like(self.rewards)
        return gae(self.rewards, critic[self.states], self.mask, self.ended, none_beyond, 1.0, lam)

    def gradients(self, probs: Tensor, advantages: Tensor) -> Tensor:
        """Each episode's Σ_t A_t ∇log π(a_t | s_t), with respect to the logits: (B,S,A)."""
        weight = torch.where(self.mask, advantages, 0)
        taken = torch.nn.functional.one_hot(self.actions, 2)
        per_step = weight[..., None] * (taken - probs[self.states])
        total = torch.zeros(len(weight), STATES, 2, dtype=torch.float64)
        return total.scatter_add_(1, self.states[..., None].expand(per_step.shape), per_step)


def walk(where: Corridor, episodes: int, seed: int) -> Walks:
    """Episodes from the middle under the policy, until all have ended."""
    generator = torch.Generator().manual_seed(seed)
    state, alive, steps = torch.full((episodes,), START), torch.ones(episodes, dtype=torch.bool), []
    while alive.any():
        if len(steps) == LONGEST:
            raise RuntimeError(f"corridor: a walk has not ended after {LONGEST} steps")
        uniform = torch.rand(2, episodes, generator=generator, dtype=torch.float64)
        action = (uniform[0] < where.probs[state, 1]).long()
        target = state + 2 * torch.where(uniform[1] < SLIP, 1 - action, action) - 1
        left, right = target < 0, target >= STATES
        reward = STEP_COST + LEFT_EXIT * left.double() + RIGHT_EXIT * right.double()
        steps.append((state, action, torch.where(alive, reward, 0), alive, alive & (left | right)))
        alive = alive & ~(left | right)
        state = torch.where(alive, target, START)
    return Walks(*(torch.stack(column, dim=1) for column in zip(*steps, strict=True)))
