"""What chapter 3 measures: the bias of a gradient, exactly; its noise; and how both depend on λ."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.core import discounted_returns, gae, masked_mean
from pellucid.execution.learner import minibatches
from pellucid.learn.cart import Cart
from pellucid.learn.corridor import STATES, Corridor, Walks
from pellucid.types import Batch

LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
BIAS_COLUMNS = ("critic", "error of V (rms)", "λ = 0", "sampled", "λ = 1", "sampled")
PLAIN, BASELINE = "reward-to-go (chapter 2)", "reward-to-go - V"


# ---------------------------------------------------------------- the corridor: everything exact


def learned_values(walks: Walks) -> Tensor:
    """A critic learned from a sample: for each state the mean of the returns that followed it; 0 where none did. (S,)"""
    _, returns = walks.gae(torch.zeros(STATES).double(), lam=1.0)
    visits = torch.nn.functional.one_hot(walks.states, STATES) * walks.mask[..., None].double()
    return (visits * returns[..., None]).sum((0, 1)) / visits.sum((0, 1)).clamp(min=1)


class Bias(NamedTuple):
    """Of a gradient, in shares of the true one's length. sampled: on the walks, ± noise (standard error)."""

    exact: float
    sampled: float
    noise: float


def gradient_bias(where: Corridor, walks: Walks, critics: dict[str, Tensor], lam: float) -> dict[str, Bias]:
    """What is wrong with the policy gradient if its advantages are GAE with λ and a critic (S,), for each critic."""
    true = where.gradient(where.advantages(where.values(), 1.0))
    biases = {}
    for name, critic in critics.items():
        exact = where.gradient(where.advantages(critic, lam))
        sampled = walks.gradients(where.probs, walks.gae(critic, lam)[0])
        off, noise = (sampled.mean(0) - true).norm(), (sampled.var(0).sum() / len(sampled)).sqrt()
        biases[name] = Bias(*((part / true.norm()).item() for part in ((exact - true).norm(), off, noise)))
    return biases


def bias_rows(critics: dict[str, Tensor], td: dict[str, Bias], whole: dict[str, Bias]) -> list[list[Any]]:
    """Of a table with BIAS_COLUMNS. td, whole: the biases at λ = 0 and at λ = 1."""
    rows = []
    for name, critic in critics.items():
        error = (critic - critics["true V"]).square().mean().sqrt().item()
        cells = [[f"{b.exact:.1%}", f"{b.sampled:.1%} ± {b.noise:.1%}"] for b in (td[name], whole[name])]
        rows.append([name, error, *cells[0], *cells[1]])
    return rows


class Trade(NamedTuple):
    """For each of LAMBDAS, in shares of the squared length of the true gradient: bias², and variance of one episode's."""

    bias: list[float]
    variance: list[float]

    def error(self, episodes: int) -> list[float]:
        """Mean squared error of the gradient of a batch of episodes."""
        return [bias + variance / episodes for bias, variance in zip(self.bias, self.variance, strict=True)]

    def best(self, episodes: int) -> float:
        """The λ with the smallest error."""
        error = self.error(episodes)
        return LAMBDAS[error.index(min(error))]


def bias_and_variance(where: Corridor, walks: Walks, critic: Tensor) -> Trade:
    true = where.gradient(where.advantages(where.values(), 1.0))
    size, trade = true.square().sum(), Trade([], [])
    for lam in LAMBDAS:
        trade.bias.append(((where.gradient(where.advantages(critic, lam)) - true).square().sum() / size).item())
        trade.variance.append((walks.gradients(where.probs, walks.gae(critic, lam)[0]).var(0).sum() / size).item())
    return trade


# ---------------------------------------------------------------- CartPole: how much noise a critic takes out


def fit(cart: Cart, batch: Batch, gamma: float, seed: int) -> None:
    """Five passes of regression: the critic towards the discounted returns of whole episodes."""
    mask, beyond = batch.action_mask, torch.zeros_like(batch.bootstrap_values)
    returns = discounted_returns(batch.get("rewards"), mask, batch.ended, beyond, gamma)[mask]
    seen, learner = batch.get("observations")[mask], cart.learners[1]
    for epoch in range(5):
        for rows in minibatches(len(seen), 256, seed + epoch):
            learner.zero_grad()
            (0.5 * (cart.critic.values(seen[rows]) - returns[rows]).square()).mean().backward()
            learner.step()


def six_weights(batch: Batch, values: Tensor, gamma: float) -> dict[str, Tensor]:
    """What may stand before ∇log π(a_t | s_t) in whole episodes, chapter 2's first: (B,T) each. values: the critic's."""
    mask, rewards, beyond = batch.action_mask, batch.get("rewards"), torch.zeros_like(values)
    to_go = discounted_returns(rewards, mask, batch.ended, beyond, gamma)
    weights = {
        PLAIN: to_go,
        "reward-to-go - its mean": (to_go - masked_mean(to_go, mask)) * mask,
        BASELINE: (to_go - values) * mask,
    }
    for lam in (0.95, 0.8, 0.0):
        weights[f"GAE, λ = {lam}"] = gae(rewards, values, mask, batch.ended, beyond, gamma, lam)[0]
    return weights


def gradient_noise(cart: Cart, batch: Batch, weights: dict[str, Tensor]) -> dict[str, float]:
    """For each kind of weight A: the variance, summed over the parameters, of one episode's Σ_t A_t ∇log π(a_t | s_t)."""
    parameters = list(cart.actor.module.parameters())
    gradients: dict[str, list[Tensor]] = {name: [] for name in weights}
    for i in range(len(batch)):
        logprobs, _ = cart.actor.logprobs_of(batch.select(torch.tensor([i])), 1.0)
        for name, weight in weights.items():
            parts = torch.autograd.grad((logprobs[0] * weight[i]).sum(), parameters, retain_graph=True)
            gradients[name].append(torch.cat([part.flatten() for part in parts]))
    return {name: torch.stack(found).var(0).sum().item() for name, found in gradients.items()}
