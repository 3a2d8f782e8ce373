"""A problem so small that every trajectory can be listed: what is estimated elsewhere is computed exactly here.

A machine is cool or hot and runs slow or fast. Fast earns more while it is cool, and heats it; a hot machine that runs fast
loses. An episode has a fixed number of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TinyMDP(NamedTuple):
    """S states, A actions, T steps; float64. start: (S,) and dynamics: (S,A,S), probabilities. rewards: (S,A)."""

    start: Tensor
    dynamics: Tensor
    rewards: Tensor
    horizon: int

    def trajectories(self) -> tuple[Tensor, Tensor]:
        """Every sequence of T states with an action each: states and actions, each ((S*A)**T, T)."""
        num_actions = self.rewards.shape[1]
        pairs = torch.cartesian_prod(*[torch.arange(self.rewards.numel())] * self.horizon).view(-1, self.horizon)
        return pairs // num_actions, pairs % num_actions

    def places(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,T), (N,T) -> (N,): where `trajectories` lists these."""
        digits = states * self.rewards.shape[1] + actions
        return (digits * self.rewards.numel() ** torch.arange(self.horizon).flip(0)).sum(1)

    def log_dynamics(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,T), (N,T) -> (N,): log of start(s_0) * prod_t P(s_t+1 | s_t, a_t), what the world contributes."""
        moves = self.dynamics[states[:, :-1], actions[:, :-1], states[:, 1:]]
        return self.start[states[:, 0]].log() + moves.log().sum(1)

    def expected_return(self, policy: Tensor, gamma: float) -> Tensor:
        """Exactly, step by step and without listing trajectories. policy: (S,A), probabilities. Returns a scalar."""
        where, total = self.start, torch.zeros((), dtype=self.start.dtype)
        for t in range(self.horizon):
            taken = where[:, None] * policy
            total = total + gamma**t * (taken * self.rewards).sum()
            where = (taken[..., None] * self.dynamics).sum((0, 1))
        return total

    def sample(self, policy: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """count trajectories: states and actions, each (count,T)."""
        states, actions = [_draw(self.start.expand(count, -1), generator)], []
        for _ in range(self.horizon):
            actions.append(_draw(policy[states[-1]], generator))
            states.append(_draw(self.dynamics[states[-1], actions[-1]], generator))
        return torch.stack(states[:-1], 1), torch.stack(actions, 1)


def machine(horizon: int = 3) -> TinyMDP:
    """States cool, hot; actions slow, fast."""
    to_hot = torch.tensor([[0.1, 0.6], [0.3, 0.8]], dtype=torch.float64)
    return TinyMDP(
        start=torch.tensor([0.8, 0.2], dtype=torch.float64),
        dynamics=torch.stack([1 - to_hot, to_hot], -1),
        rewards=torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64),
        horizon=horizon,
    )


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """(N,K) -> (N,): an index a row."""
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
