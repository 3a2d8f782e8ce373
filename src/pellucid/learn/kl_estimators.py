"""k1, k2 and k3 on policies small enough to sum over all tokens: no sampling, so every figure is exact (in float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pellucid.core import kl_estimate, kl_loss
from pellucid.learn.lesson import Lesson

KINDS = ("k1", "k2", "k3")


def draws(lesson: Lesson, *shape: int) -> Tensor:
    """Random logits of the lesson's seed, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(lesson.seed), dtype=torch.float64)


def values(lesson: Lesson) -> None:
    """Mean and standard deviation of k1, k2, k3 over the tokens of a policy, by summing over all of them."""
    ref, step = draws(lesson, 2, 8)
    far, half = torch.tensor([[0.999, 0.001], [0.5, 0.5]], dtype=torch.float64).log()
    cases = {f"drift {d:g}": ((ref + d * step).log_softmax(0), ref.log_softmax(0)) for d in (0.1, 0.5, 2.0)}
    cases["0.999 / 0.001 against 0.5 / 0.5"] = (far, half)
    rows, gap, spread, bias = [], 0.0, {}, 0.0
    for name, (new, old) in cases.items():
        kl = (new.exp() * (new - old)).sum()
        estimates = {kind: kl_estimate(new[None], old[None], kind)[0] for kind in KINDS}
        mean = {kind: (new.exp() * k).sum() for kind, k in estimates.items()}
        spread[name] = {k: (new.exp() * (estimates[k] - mean[k]).square()).sum().sqrt().item() for k in KINDS}
        rows.append([name, kl.item(), *(f"{mean[k]:.4g} ± {spread[name][k]:.3g}" for k in KINDS)])
        gap = max(gap, (mean["k1"] - kl).abs().item(), (mean["k3"] - kl).abs().item())
        bias = max(bias, (mean["k2"] / kl - 1).abs().item())
    lesson.table("One token: mean ± standard deviation, nats", ["policy", "KL(π‖ref)", *KINDS], rows)
    lesson.claim("As values, k1 and k3 are unbiased", f"largest error {gap:.0e} nats", gap < 1e-12)
    lesson.claim("k2 is biased", f"by {bias:.0%} in the worst of these cases", bias > 0.05)
    near, away = spread["drift 0.1"], spread["0.999 / 0.001 against 0.5 / 0.5"]
    lesson.claim(
        "k3 spreads less than k1 near the reference, and more far from it",
        f"{near['k3'] / near['k1']:.3f} of k1's spread at drift 0.1, {away['k3'] / away['k1']:.1f} of it in the last row",
        near["k3"] < 0.5 * near["k1"] and away["k3"] > away["k1"],
    )


def expected_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Σ over tokens of π(token) · ∇ loss(log π)(token): what minibatches on fresh samples give on average."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp().detach() * loss(logprobs)).sum().backward()
    return logits.grad


def gradients(lesson: Lesson) -> None:
    """What each estimator, differentiated as a loss, pulls at: against the exact gradients of both KLs."""
    logits, ref = 2 * draws(lesson, 2, 8)
    ref = ref.log_softmax(0)
    new = logits.log_softmax(0)
    leaf = logits.clone().requires_grad_()
    pi = leaf.log_softmax(0)
    (forward,) = torch.autograd.grad((pi.exp() * (pi - ref)).sum(), leaf, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - pi)).sum(), leaf)
    found = {
        kind: expected_gradient(lambda lp, k=kind: kl_loss(lp, ref, k), logits) for kind in (*KINDS, "k3_corrected")
    }
    found["k1 as a reward"] = expected_gradient(lambda lp: (new - ref) * lp, logits)  # detached, times ∇ log π
    rows = [[name, *((g - target).norm().item() for target in (0 * g, forward, reverse))] for name, g in found.items()]
    lesson.table("Distance of the expected gradient from", ["as a loss", "0", "∇KL(π‖ref)", "∇KL(ref‖π)"], rows)
    error = {row[0]: dict(zip(("zero", "forward", "reverse"), row[1:], strict=True)) for row in rows}
    right = max(error[name]["forward"] for name in ("k2", "k3_corrected", "k1 as a reward"))
    lesson.claim(
        "As a loss, k1 pulls nowhere: its expected gradient is 0",
        f"{error['k1']['zero']:.0e}",
        error["k1"]["zero"] < 1e-12,
    )
    lesson.claim(
        "k2, k3 times the live ratio, and k1 as a reward have the gradient of KL(π‖ref); k3 has that of KL(ref‖π)",
        f"errors {right:.0e} and {error['k3']['reverse']:.0e}; the two gradients differ by {(forward - reverse).norm():.2f}",
        right < 1e-12 and error["k3"]["reverse"] < 1e-12 and (forward - reverse).norm().item() > 1e-3,
    )  # fmt: skip

    def draw(ax: Any) -> None:
        places = range(8)
        ax.bar(places, forward.tolist(), width=0.7, color="lightgrey", label="exact ∇KL(π‖ref)")
        ax.plot(
            places, reverse.tolist(), "s", color="tab:grey", fillstyle="none", markersize=10, label="exact ∇KL(ref‖π)"
        )
        for name, marker, colour in (("k1", "x", "tab:red"), ("k2", "o", "tab:blue"), ("k3", "^", "tab:orange")):
            ax.plot(places, found[name].tolist(), marker, color=colour, label=f"{name} as a loss")
        ax.set(xlabel="token", ylabel="∂ / ∂ logit, nats")
        ax.legend(fontsize=8)

    lesson.picture(
        "7-gradients", draw, "Expected gradients on one token of 8: k2 sits on the bars, k3 on the squares, k1 on 0"
    )


def two_tokens(lesson: Lesson) -> None:
    """Two tokens, the second depending on the first: a loss per token does not see what a token leads to, a return does."""
    first, first_ref = draws(lesson, 2, 4)
    second, second_ref = draws(lesson, 3, 4, 4)[1:].log_softmax(-1)  # (after which token, which token)
    later = (second.exp() * (second - second_ref)).sum(1)  # (4,) KL of the second token after each first one
    ref = first_ref.log_softmax(0)
    new = first.log_softmax(0)
    leaf = first.clone().requires_grad_()
    pi = leaf.log_softmax(0)
    (exact,) = torch.autograd.grad((pi.exp() * (pi - ref + later)).sum(), leaf)
    alone = expected_gradient(lambda lp: kl_loss(lp, ref, "k2"), first)
    reward = expected_gradient(lambda lp: (new - ref + later) * lp, first)  # k1 of this token and of what follows
    off = ((alone - exact).norm() / exact.norm()).item()
    lesson.claim(
        "In a sequence, k1 in the reward pulls at the whole KL; k2 per token leaves out what a token leads to",
        f"at the first of two tokens: error {(reward - exact).norm():.0e} against {off:.0%} of the gradient",
        (reward - exact).norm().item() < 1e-12 and off > 0.01,
    )
