"""The ratio and the clip of PPO, solved exactly: what each corrects, what it costs, and what it leaves out."""

from __future__ import annotations

from functools import partial

import torch

from pellucid.core import ppo_clip
from pellucid.learn.corridor import START, STATES, corridor
from pellucid.learn.lesson import Lesson
from pellucid.learn.pictures.chapter_4 import draw_clip, draw_importance
from pellucid.types import derive_seed


def show_importance(lesson: Lesson) -> None:
    """Four actions. The new policy's logits are the old one's, moved by a distance along a random direction."""
    generator = torch.Generator().manual_seed(derive_seed(lesson.seed, "importance"))
    logits, direction, worth = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    direction = (direction - direction.mean()) / direction.std()
    old, distances = logits.softmax(0), torch.linspace(0, 3, 13, dtype=torch.float64)
    new = (logits + distances[:, None] * direction).softmax(1)  # (distances, actions)
    ratio = new / old
    gap = ((old * ratio * worth).sum(1) - (new * worth).sum(1)).abs().max().item()
    second = (old * ratio.square()).sum(1)  # E[ratio²] under the old policy = 1 + Var(ratio)
    kl = (old * -ratio.log()).sum(1)
    draws = torch.multinomial(old, 20_000 * 50, replacement=True, generator=generator).view(20_000, 50)
    weights = ratio[:, draws].log().sum(2).exp()  # (distances, 20,000): the ratio of a sequence of 50 actions
    means = weights.view(len(distances), 20, 1000).mean(2).median(1).values
    lesson.claim(
        "Weighted by the ratio, the old policy's samples have the new policy's mean, at every distance",
        f"the exact means differ by {gap:.0e} at most",
        gap < 1e-12,
    )
    grows = bool((second.diff() > 0).all())
    lesson.claim(
        "The ratio's variance grows with the distance, and multiplies along a sequence: 50 actions have (1 + Var)^50 - 1",
        f"at distance 1 (KL {kl[4]:.2f} nats an action) the variance is {second[4] - 1:.2f} for one action, "
        f"{second[4] ** 50 - 1:.1e} for 50",
        grows and second[4].item() > 1.05,
    )
    lesson.table(
        "The ratio's variance, exact; and what the mean of 1,000 sampled ratios of 50 actions typically is (median of 20)",
        ("distance", "KL an action", "Var, 1 action", "Var, 50 actions", "typical mean"),
        [
            [f"{distances[i]:.2f}", *map(float, (kl[i], second[i] - 1, second[i] ** 50 - 1, means[i]))]
            for i in (0, 1, 2, 4, 8, 12)
        ],
    )
    lesson.claim(
        "Unbiased is not enough: far away the mean is made by sequences that a sample does not contain",
        f"at distance 3 half of the means of 1,000 ratios of 50 actions are below {means[-1]:.0e}; their expectation is 1",
        means[-1].item() < 0.1,
    )

    caption = "Importance sampling is unbiased at every distance; its variance is not for free."
    lesson.picture("4-importance", partial(draw_importance, kl=kl, second=second), caption)


def show_surrogate(lesson: Lesson) -> None:
    """The mean of ratio · A over the old policy's steps, against what the return does, in chapter 3's solved corridor."""
    generator = torch.Generator().manual_seed(derive_seed(lesson.seed, "surrogate"))
    logits, direction = torch.randn(2, STATES, 2, generator=generator, dtype=torch.float64) / 2
    old = corridor(logits)
    advantages, errors, gains = old.advantages(old.values(), lam=1.0), [], []
    for distance in (0.02, 0.01):
        new = corridor(logits + distance * direction / direction.norm())
        gains.append((new.values() - old.values())[START].item())
        promised = (old.occupancy()[:, None] * new.probs * advantages).sum().item()
        errors.append(abs(gains[-1] - promised))
    lesson.claim(
        "With a ratio for each step, and not for the whole past, the objective is the return to first order: half the "
        "distance, a quarter of the error",
        f"gain of the return {gains[0]:.4f} and {gains[1]:.4f}, error of the objective {errors[0]:.1e} and {errors[1]:.1e}: "
        f"a factor of {errors[0] / errors[1]:.2f}",
        3.5 < errors[0] / errors[1] < 4.5 and errors[1] > 1e-9,
    )


def show_clip(lesson: Lesson, clip: float = 0.2) -> None:
    """The clipped loss as a curve over the ratio, for a good and a bad action."""
    log_ratio = torch.linspace(-3, 1.1, 4101, dtype=torch.float64).requires_grad_()
    ratio, zeros = log_ratio.detach().exp(), torch.zeros(4101, dtype=torch.float64)
    losses, differ, below = {}, 0, 0
    for sign in (1.0, -1.0):
        advantages = torch.full_like(zeros, sign)
        loss, _ = ppo_clip(log_ratio, zeros, advantages, clip, clip)
        (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
        flat = ratio > 1 + clip if sign > 0 else ratio < 1 - clip
        differ += int(((slope == 0) != flat).sum())
        below += int((loss < -ratio * advantages - 1e-15).sum())
        losses[sign] = loss.detach()
    lesson.claim(
        "The clipped loss is never below the unclipped one: the objective is a pessimistic bound",
        f"below it at {below} of 4,101 ratios from 0.05 to 3, for A = 1 and A = -1",
        below == 0,
    )
    lesson.claim(
        "Its slope is 0 exactly where the ratio is past the clip on the side that A asks for, and nowhere else",
        f"A > 0: above 1.2; A < 0: below 0.8; otherwise at {differ} of 4,101 ratios",
        differ == 0,
    )
    draw = partial(draw_clip, ratio=ratio, losses=losses, clip=clip)
    lesson.picture("4-clip", draw, "Which branch wins: flat on one side only.", panels=2)
