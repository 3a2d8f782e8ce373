"""Chapter 3: a critic. It takes noise out of the policy gradient, and, where it is wrong, puts a bias in.

The bias is measured exactly, in a corridor whose every value is the solution of a linear equation. The noise is measured on
CartPole, the same trajectories with and without a critic. Then `actor_critic`, one iteration in full, learns to balance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.core import aggregate, discounted_returns, explained_variance, gae, masked_mean, masked_whiten, value_clip
from pellucid.execution.learner import minibatches
from pellucid.learn.cart import Cart, whole_episodes
from pellucid.learn.corridor import START, STATES, Corridor, Walks, corridor, walk
from pellucid.learn.lesson import Lesson
from pellucid.types import Batch, derive_seed

GAMMA, LAMBDA = 0.99, 0.95
LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)


def actor_critic(cart: Cart, num_steps: int) -> None:
    """One iteration: a sample, its advantages by the critic, one step of the policy, one of the critic."""
    batch = cart.sample(num_steps)
    mask, rewards = batch.action_mask, batch.get("rewards")
    advantages, returns = gae(
        rewards, batch.get("old_values"), mask, batch.ended, batch.bootstrap_values, GAMMA, LAMBDA
    )
    logprobs, _ = cart.actor.logprobs_of(batch, 1.0)
    values = cart.critic.values_of(batch)
    value_loss, _ = value_clip(values, batch.get("old_values"), returns, None)  # 0.5 (V - return)², nothing clipped
    cart.descend(
        aggregate(-masked_whiten(advantages, mask) * logprobs, mask, "token"), aggregate(value_loss, mask, "token")
    )


# ---------------------------------------------------------------- the corridor: everything exact


def learned_values(walks: Walks) -> Tensor:
    """A critic learned from a sample: for each state the mean of the returns that followed it; 0 where none did. (S,)"""
    _, returns = walks.gae(torch.zeros(STATES).double(), lam=1.0)
    visits = torch.nn.functional.one_hot(walks.states, STATES) * walks.mask[..., None].double()
    return (visits * returns[..., None]).sum((0, 1)) / visits.sum((0, 1)).clamp(min=1)


def show_value(lesson: Lesson, where: Corridor, walks: Walks) -> None:
    true = where.values()
    _, returns = walks.gae(true, lam=1.0)
    first = returns[:, 0]
    error = (first.std() / len(first) ** 0.5).item()
    gap = (first.mean() - true[START]).item()
    lesson.claim(
        "The true V is the mean of the returns; of a single return it says little",
        f"V(start) = {true[START]:.3f}, mean of {len(first)} returns {first.mean():.3f} ± {error:.3f}; "
        f"the standard deviation of one return is {first.std():.2f}",
        abs(gap) < 4 * error and first.std().item() > 10 * abs(gap),
    )


def show_bias(lesson: Lesson, where: Corridor, critics: dict[str, Tensor], walks: Walks) -> None:
    true = where.gradient(where.advantages(critics["true V"], 1.0))
    rows, biases = [], {}
    for name, critic in critics.items():
        cells: list[Any] = [name, (critic - critics["true V"]).square().mean().sqrt().item()]
        for lam in (0.0, 1.0):
            exact = where.gradient(where.advantages(critic, lam))
            biases[name, lam] = ((exact - true).norm() / true.norm()).item()
            sampled = walks.gradients(where.probs, walks.gae(critic, lam)[0])
            off, noise = (sampled.mean(0) - true).norm(), (sampled.var(0).sum() / len(sampled)).sqrt()
            cells += [f"{biases[name, lam]:.1%}", f"{off / true.norm():.1%} ± {noise / true.norm():.1%}"]
        rows.append(cells)
    columns = ("critic", "error of V (rms)", "λ = 0", "sampled", "λ = 1", "sampled")
    lesson.table("Bias of the policy gradient, as a share of its length", columns, rows)
    wrong = [name for name in critics if name != "true V"]
    lesson.claim(
        "Bootstrapping from a wrong V (λ = 0) biases the gradient; from the true V it does not",
        ", ".join(f"{name}: {biases[name, 0.0]:.0%}" for name in wrong) + f"; true V: {biases['true V', 0.0]:.0e}",
        all(biases[name, 0.0] > 0.01 for name in wrong) and biases["true V", 0.0] < 1e-9,
    )
    lesson.claim(
        "Used as a baseline alone (λ = 1), any V leaves the gradient unbiased, however wrong",
        f"largest bias {max(biases[name, 1.0] for name in critics):.0e} of the gradient",
        all(biases[name, 1.0] < 1e-9 for name in critics),
    )


def show_lambda(lesson: Lesson, where: Corridor, critic: Tensor, walks: Walks) -> None:
    true = where.gradient(where.advantages(where.values(), 1.0))
    size = true.square().sum()
    bias, variance = [], []
    for lam in LAMBDAS:
        bias.append(((where.gradient(where.advantages(critic, lam)) - true).square().sum() / size).item())
        variance.append((walks.gradients(where.probs, walks.gae(critic, lam)[0]).var(0).sum() / size).item())
    best = {n: LAMBDAS[min(range(len(LAMBDAS)), key=lambda i: bias[i] + variance[i] / n)] for n in (10, 100, 10_000)}
    lesson.claim(
        "λ trades bias for variance: from 0 to 1 the bias goes to 0, and the variance of an episode's gradient grows",
        f"bias {bias[0] ** 0.5:.0%} to {bias[-1] ** 0.5:.0e} of the gradient; variance × {variance[-1] / variance[0]:.1f}",
        bias[0] ** 0.5 > 0.05 and bias[-1] < 1e-18 and variance[-1] > 1.5 * variance[0],
    )
    lesson.claim(
        "Which λ has the smallest error depends on how much is sampled: the more episodes, the nearer to 1",
        ", ".join(f"{n} episodes: λ = {lam}" for n, lam in best.items()),
        best[10] < best[10_000] and best[10] <= best[100] <= best[10_000],
    )

    def draw(axes: Any) -> None:
        axes[0].plot(range(STATES), where.values(), "o-", color="tab:blue", label="true V of this policy")
        axes[0].plot(range(STATES), critic, "s--", color="tab:orange", label="learned from 10 episodes")
        axes[0].set(xlabel="state (0 is next to the left exit)", ylabel="value (reward units)")
        axes[1].plot(LAMBDAS, bias, "o-", color="tab:blue", label="bias², exact")
        for n, style in ((10, "-"), (100, "--")):
            noise = [v / n for v in variance]
            axes[1].plot(LAMBDAS, noise, style, marker="s", color="tab:orange", label=f"variance, {n} episodes")
            both = [b + v for b, v in zip(bias, noise, strict=True)]
            axes[1].plot(LAMBDAS, both, style, color="black", lw=1, label=f"sum, {n} episodes")
        axes[0].legend(fontsize=8)
        axes[1].set(xlabel="λ", ylabel="share of the squared gradient", ylim=(0, 1.6 * max(bias[0], variance[-1] / 10)))
        axes[1].legend(fontsize=8, ncols=2, loc="upper center")

    lesson.picture("3-lambda", draw, "A critic that is a little wrong, and what λ makes of it.", panels=2)


# ---------------------------------------------------------------- CartPole: how much noise a critic takes out


def fit(cart: Cart, batch: Batch, seed: int) -> None:
    """Five passes of regression: the critic towards the discounted returns of whole episodes."""
    mask, beyond = batch.action_mask, torch.zeros_like(batch.bootstrap_values)
    returns = discounted_returns(batch.get("rewards"), mask, batch.ended, beyond, GAMMA)[mask]
    seen, learner = batch.get("observations")[mask], cart.learners[1]
    for epoch in range(5):
        for rows in minibatches(len(seen), 256, seed + epoch):
            learner.zero_grad()
            (0.5 * (cart.critic.values(seen[rows]) - returns[rows]).square()).mean().backward()
            learner.step()


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


def show_noise(lesson: Lesson) -> None:
    cart = Cart(derive_seed(lesson.seed, "noise"), lr=1e-2)
    while cart.recent_return < 45:
        actor_critic(cart, num_steps=64)
    fit(cart, whole_episodes(cart.actor, 100, derive_seed(lesson.seed, "fit")), derive_seed(lesson.seed, "rows"))
    batch = whole_episodes(cart.actor, 200, derive_seed(lesson.seed, "measure"))
    mask, rewards, beyond = batch.action_mask, batch.get("rewards"), torch.zeros_like(batch.bootstrap_values)
    with torch.no_grad():
        values = cart.critic.values_of(batch)
    to_go = discounted_returns(rewards, mask, batch.ended, beyond, GAMMA)
    weights = {
        "reward-to-go (chapter 2)": to_go,
        "reward-to-go - its mean": (to_go - masked_mean(to_go, mask)) * mask,
        "reward-to-go - V": (to_go - values) * mask,
    }
    for lam in (0.95, 0.8, 0.0):
        weights[f"GAE, λ = {lam}"] = gae(rewards, values, mask, batch.ended, beyond, GAMMA, lam)[0]
    noise = gradient_noise(cart, batch, weights)
    plain = noise["reward-to-go (chapter 2)"]
    rows = [[name, f"{value:.3g}", f"{plain / value:.1f}"] for name, value in noise.items()]
    lesson.table(f"Noise of one episode's gradient, {len(batch)} episodes", ("weight", "variance", "smaller by"), rows)
    explained = explained_variance(values, to_go, mask).item()
    factor, gae_factor = plain / noise["reward-to-go - V"], plain / noise["GAE, λ = 0.95"]
    lesson.claim(
        "The same policy, the same trajectories: less noise with a critic than with chapter 2's reward-to-go",
        f"variance smaller by {factor:.1f} with V as a baseline, by {gae_factor:.1f} with GAE at λ = 0.95; this critic "
        f"explains {explained:.0%} of the returns' variance",
        factor > 2 and gae_factor > factor,
    )

    def draw(ax: Any) -> None:
        ax.barh(list(noise), [value / plain for value in noise.values()], color=["tab:orange"] + 5 * ["tab:blue"])
        ax.invert_yaxis()
        ax.set(xlabel="variance of one episode's gradient (share of reward-to-go's)", xlim=(0, 1.05))

    lesson.picture("3-noise", draw, "CartPole: the same trajectories, the same policy, six weights A.")


def show_learning(lesson: Lesson, budget: int = 60_000) -> None:
    carts = [Cart(derive_seed(lesson.seed, "learning", i), lr=1e-2) for i in range(3)]
    curves = []
    for cart in carts:
        curve = []
        while cart.steps < budget:
            actor_critic(cart, num_steps=64)
            curve.append((cart.steps, cart.recent_return))
        curves.append(curve)
    best = sorted(max(value for _, value in curve) for curve in curves)
    lesson.claim(
        "An actor-critic learns from 64 steps at a time, no episode need end in them",
        f"best mean return of 20 episodes within {budget} steps, three seeds: " + ", ".join(f"{v:.0f}" for v in best),
        best[1] > 150,
    )

    def draw(ax: Any) -> None:
        for (curve, style), i in zip(zip(curves, ("-", "--", ":"), strict=True), range(3), strict=True):
            ax.plot(*zip(*curve, strict=True), style, color="tab:blue", label=f"seed {i}")
        ax.set(xlabel="environment steps", ylabel="return (mean of the last 20 episodes)", ylim=(0, 510))
        ax.legend()

    lesson.picture("3-learning", draw, "Actor-critic on CartPole-v1, a step of Adam after every 1,024 steps.")


def run(lesson: Lesson) -> None:
    generator = torch.Generator().manual_seed(derive_seed(lesson.seed, "policy"))
    where = corridor(0.5 * torch.randn(STATES, 2, generator=generator))
    critics = {
        "true V": where.values(),
        "V of another policy": corridor(torch.zeros(STATES, 2)).values(),
        "learned from 10 episodes": learned_values(walk(where, 10, derive_seed(lesson.seed, "few"))),
    }
    walks = walk(where, 10_000, derive_seed(lesson.seed, "many"))
    show_value(lesson, where, walks)
    show_bias(lesson, where, critics, walks)
    show_lambda(lesson, where, critics["learned from 10 episodes"], walks)
    show_noise(lesson)
    show_learning(lesson)
