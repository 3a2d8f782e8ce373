"""What chapter 4 measures: how far passes over one sample take a policy, and repeated runs up to a return of 475."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pellucid.core import masked_mean
from pellucid.learn.cart import Cart, Curve, learning_curve, whole_episodes
from pellucid.learn.lesson import Lesson
from pellucid.types import Batch, derive_seed

GOAL = 475
Key = TypeVar("Key", bound=Hashable)


# ---------------------------------------------------------------- one sample, many passes


class Reuse(NamedTuple):
    """After each number of passes over one sample: the KL (nats) to the policy that sampled, and the true return. outside:
    the share of ratios outside 0.8 to 1.2 at the end."""

    kl: list[float]
    returns: list[float]
    outside: float


@torch.no_grad()
def kl_from_old(cart: Cart, steps: Batch, old: Tensor) -> float:
    """Mean KL(old ‖ now) over the sample's states, in nats. old: the old policy's log-probs of both actions."""
    now = cart.actor.logits(steps.get("observations")).log_softmax(-1)
    return masked_mean((old.exp() * (old - now)).sum(-1), steps.action_mask).item()


def true_return(cart: Cart, seed: int) -> float:
    """Mean return of 40 fresh episodes."""
    batch = whole_episodes(cart.actor, 40, seed)
    return masked_mean((batch.get("rewards") * batch.action_mask).sum(1), torch.ones(40)).item()


def reuse(cart: Cart, steps: Batch, one_pass: Callable[[int], None], passes: Sequence[int]) -> Reuse:
    """Go over the sample up to passes[-1] times. one_pass: of the cart over the steps, with a seed."""
    with torch.no_grad():
        old = cart.actor.logits(steps.get("observations")).log_softmax(-1)
    kl, returns = [], []
    for done in range(passes[-1] + 1):
        if done in passes:
            kl.append(kl_from_old(cart, steps, old))
            returns.append(true_return(cart, derive_seed(cart.seed, "evaluate")))
        one_pass(derive_seed(cart.seed, "reuse", done))
    with torch.no_grad():
        ratio = (cart.actor.logprobs_of(steps, 1.0)[0] - steps.get("old_logprobs")).exp()
    return Reuse(kl, returns, ((ratio - 1).abs() > 0.2).double().mean().item())


def medians(runs: Sequence[Reuse]) -> Reuse:
    """Over the runs, of each figure."""
    kl = [statistics.median(values) for values in zip(*(run.kl for run in runs), strict=True)]
    returns = [statistics.median(values) for values in zip(*(run.returns for run in runs), strict=True)]
    return Reuse(kl, returns, statistics.median(run.outside for run in runs))


def reuse_rows(reuse: dict[str, Reuse], passes: Sequence[int]) -> list[list[str]]:
    """A row for each number of passes, a column for each loss."""
    return [
        [f"{n}", *(f"{found.kl[k]:.3f} / {found.returns[k]:.0f}" for found in reuse.values())]
        for k, n in enumerate(passes)
    ]


# ---------------------------------------------------------------- runs up to a return of 475


class Runs(NamedTuple):
    """Curves of the same algorithm, one for each seed. All figures are medians."""

    curves: list[Curve]
    rate: float
    budget: int

    @property
    def steps(self) -> float:
        """To a return of 475; a run that does not get there counts as endless."""
        return statistics.median(curve[-1][0] if curve[-1][1] >= GOAL else math.inf for curve in self.curves)

    @property
    def shown(self) -> str:
        return f"{self.steps:,.0f}" if self.steps < math.inf else f"> {self.budget:,}"

    @property
    def last(self) -> float:
        """The return at the end."""
        return statistics.median(curve[-1][1] for curve in self.curves)

    @property
    def peak(self) -> float:
        """The best return on the way."""
        return statistics.median(max(value for _, value in curve) for curve in self.curves)


def run_up(cart: Cart, iterate: Callable[[Cart], None], budget: int) -> Curve:
    """From 0 to a return of 475, or until the budget of environment steps is used."""
    return [(0, 0.0), *learning_curve(cart, iterate, budget, GOAL)]


def repeated(
    lesson: Lesson, purpose: str, entrants: dict[Key, tuple[Callable[[Cart], Any], float]], repeats: int, budget: int
) -> dict[Key, Runs]:
    """Every entrant, an iteration and a learning rate, runs up from the same `repeats` seeds."""
    runs = {}
    with lesson.progress(purpose, len(entrants) * repeats) as advance:
        for name, (iterate, rate) in entrants.items():
            runs[name] = Runs([], rate, budget)
            for i in range(repeats):
                runs[name].curves.append(run_up(Cart(derive_seed(lesson.seed, purpose, i), rate), iterate, budget))
                advance()
    return runs


def best(candidates: Iterable[Runs]) -> Runs:
    """The first with the fewest steps."""
    return min(candidates, key=lambda runs: runs.steps)
