"""Keeping the policy near its reference: KL estimators, KL-shaped rewards, coefficient controllers.

Write l = log pi(token) - log pi_ref(token) for a token sampled from pi, in nats. The estimators are
Schulman's ("Approximating KL divergence", 2020):

    k1 = l                    unbiased for KL(pi || ref), may be negative
    k2 = l² / 2               biased, never negative
    k3 = exp(-l) - 1 + l      unbiased for KL(pi || ref), never negative

Unbiased as a *value* does not mean unbiased as a *loss*: see `kl_loss`.
"""

import math

import torch
from torch import Tensor

from pellucid.core.masked import exp_where_used, require_same_shape, square_where_used, times_where_used

KL_STEP_LIMIT = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(pi || ref), by `kind` "k1", "k2" or "k3" (formulas at the top of this file).

    As a detached reward k1 is the right one. To differentiate an estimate, use `kl_loss`.

    logprobs, ref_logprobs: (B,T), in nats. Returns (B,T), in nats.
    """
    require_same_shape("kl_estimate", logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * square_where_used(log_ratio)
    if kind == "k3":
        return exp_where_used(-log_ratio) - 1 + log_ratio
    raise ValueError(f"kl_estimate: kind is {kind!r}; it must be 'k1', 'k2' or 'k3'")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k2") -> Tensor:
    """A per-token KL penalty to differentiate, on tokens sampled from the current policy.

    In expectation over such tokens, its gradient is

    "k1"            0: it is the score function, so this penalty does nothing but add noise
    "k2"            that of KL(pi || ref): the default, and correct
    "k3"            that of KL(ref || pi), the other direction (the form of the GRPO paper)
    "k3_corrected"  that of KL(pi || ref): k3 times the live ratio pi / sg(pi), which is 1 in value and
                    carries k3 * grad log pi, the part of the gradient that plain k3 drops

    [Schulman 2020; Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"]

    logprobs: (B,T) with gradient; ref_logprobs: (B,T), taken as constant. In nats. Returns (B,T), in nats.
    """
    ref_logprobs = ref_logprobs.detach()
    if kind != "k3_corrected":
        if kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_loss: kind is {kind!r}; it must be 'k1', 'k2', 'k3' or 'k3_corrected'")
        return kl_estimate(logprobs, ref_logprobs, kind)
    k3 = kl_estimate(logprobs, ref_logprobs, "k3")
    # ratio * k3 by the product rule at ratio = 1: log(ratio) is 0 in value and has the ratio's gradient.
    log_live_ratio = logprobs - logprobs.detach()
    return k3 + times_where_used(log_live_ratio, k3)


@torch.no_grad()
def kl_shaped_rewards(scores: Tensor, kl: Tensor, action_mask: Tensor, kl_coef: float) -> Tensor:
    """Token rewards: a price on every action's KL, and the score on the last action.

    rewards[t] = -kl_coef * kl[t] + (score if t is the sequence's last action token)     [Ziegler et al. 2019]

    scores: (B,), in reward units; kl: (B,T), the k1 estimate in nats; action_mask: (B,T); kl_coef: reward
    units per nat. Returns (B,T), in reward units, detached, 0 outside the action mask. The last action is
    found from the mask, wherever padding or other turns lie. A sequence without any action gets no reward at
    all: nothing in it was chosen.
    """
    require_same_shape("kl_shaped_rewards", kl=kl, action_mask=action_mask)
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"kl_shaped_rewards: scores {tuple(scores.shape)} must be (B,) for kl {tuple(kl.shape)}")
    keep = action_mask.bool()
    columns = torch.arange(kl.shape[1], device=kl.device)
    last_action = torch.where(keep, columns, -1).amax(dim=1, keepdim=True)
    rewards = torch.where(keep, -kl_coef * kl, 0)
    return rewards + torch.where(columns == last_action, scores[:, None].to(kl.dtype), 0)


class FixedKL:
    """A KL coefficient that stays what it is; `update` is there so that callers treat both alike."""

    def __init__(self, coef: float) -> None:
        self.coef = float(coef)

    def update(self, sequence_kl: Tensor | float, n: int) -> float:
        """Return the unchanged coefficient."""
        return self.coef

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])


class AdaptiveKL:
    """A KL coefficient that steers the KL of a sequence towards a target.

    coef *= 1 + clip(sequence_kl / target - 1, -0.2, 0.2) * n / horizon                  [Ziegler et al. 2019]

    coef: reward units per nat. target: nats per sequence. horizon: in sequences; after that many sequences a
    KL far off the target has moved the coefficient by about 20 %.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        if not (coef > 0 and target > 0 and horizon > 0):
            raise ValueError(f"AdaptiveKL: coef {coef}, target {target} and horizon {horizon} must all be above 0")
        self.coef = float(coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, sequence_kl: Tensor | float, n: int) -> float:
        """Move the coefficient after a step of `n` sequences; return it.

        sequence_kl: a scalar, the mean over those sequences of the per-sequence sum of KL against the
        reference, in nats. Raises ValueError if it is not finite, or if n >= 5 * horizon, where the rule
        could turn the coefficient negative.
        """
        observed = float(sequence_kl)
        if not math.isfinite(observed):
            raise ValueError(f"AdaptiveKL: the sequence KL is {observed}; the policy or its reference has diverged")
        if not 0 <= n * KL_STEP_LIMIT < self.horizon:
            raise ValueError(f"AdaptiveKL: n is {n}; it must be at least 0 and below 5 * horizon ({5 * self.horizon})")
        error = min(max(observed / self.target - 1, -KL_STEP_LIMIT), KL_STEP_LIMIT)
        self.coef *= 1 + error * n / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])
