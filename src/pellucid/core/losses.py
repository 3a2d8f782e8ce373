"""Losses, per token or per pair; `aggregate` alone reduces them to a scalar.

Axes: B sequences, T padded tokens, P preference pairs. Log-probs are in nats; only `logprobs` and `values`
(and the policy's log-probs in `dpo`) carry a gradient. These functions do not see the mask (`gspo` needs it
for its ratio): whatever they return for a token outside it, `aggregate` drops, value and gradient, even where
it is inf or nan.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pellucid.core.masked import exp_where_used, require_same_shape, square_where_used, times_where_used


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, as a loss per token.

    ratio = exp(logprobs - old_logprobs)
    loss  = max(-ratio * A, -clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A)      [Schulman et al. 2017]
    with dual_clip c, where A < 0: loss = min(that, -c * A)                                   [Ye et al. 2020]

    The max takes the worse of the two: a ratio already past the clip in the direction that A asks for earns
    nothing more, one on the wrong side is still pulled back. Dual clip bounds that pull when A < 0 and the
    ratio is huge.

    logprobs, old_logprobs, advantages: (B,T). dual_clip: above 1, such as 3. Returns (loss, clipped), each
    (B,T); `clipped` is True where a bound replaced -ratio * A: there the gradient is 0.
    """
    require_same_shape("ppo_clip", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = logprobs - old_logprobs.detach()
    loss, clipped = _clipped_surrogate(exp_where_used(log_ratio), advantages, clip_eps_low, clip_eps_high)
    if dual_clip is None:
        return loss, clipped
    if dual_clip <= 1:
        raise ValueError(f"ppo_clip: dual_clip is {dual_clip}; it must be above 1")
    ceiling = -dual_clip * advantages.detach()
    beyond = (advantages < 0) & (loss > ceiling)
    return torch.where(beyond, ceiling, loss), clipped | beyond


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
) -> tuple[Tensor, Tensor]:
    """Group sequence policy optimisation: PPO's clip on one ratio per sequence, in the GSPO-token form.

    s        = exp(mean over the sequence's masked-in tokens of (logprobs - old_logprobs)) [Zheng et al. 2025]
    ratio[t] = sg(s) * exp(logprobs[t] - sg(logprobs[t])): s in value, with the gradient of token t
    loss     = max(-ratio * A, -clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A)

    Aggregated with mode "sequence", the gradient is that of the sequence-level objective when A is the same
    for all tokens of a sequence. The clip range is far tighter than PPO's: the paper uses 3e-4 and 4e-4.

    logprobs, old_logprobs, advantages, mask: (B,T). Returns (loss, clipped), each (B,T), 0 and False where
    masked out.
    """
    require_same_shape("gspo", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    keep = mask.bool()
    logprobs = torch.where(keep, logprobs, 0)
    frozen = logprobs.detach()
    log_ratio = torch.where(keep, frozen - old_logprobs.detach(), 0)
    log_sequence_ratio = log_ratio.sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = exp_where_used(log_sequence_ratio + (logprobs - frozen))
    loss, clipped = _clipped_surrogate(ratio, torch.where(keep, advantages, 0), clip_eps_low, clip_eps_high)
    return torch.where(keep, loss, 0), keep & clipped


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_eps_low: float, clip_eps_high: float
) -> tuple[Tensor, Tensor]:
    """REINFORCE with a clipped importance weight: every token keeps a gradient, the clip bounds its weight.

    loss = -sg(clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)) * A * logprobs   [MiniMax-M1 2025, eq. 4, 5]

    The paper sets no lower bound: that is clip_eps_low = 1 (a ratio is never below 0).

    logprobs, old_logprobs, advantages: (B,T). Returns (loss, clipped), each (B,T); `clipped` is True where
    the weight was bounded. The value of the loss means nothing by itself; its gradient does.
    """
    require_same_shape("cispo", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _require_clip_range(clip_eps_low, clip_eps_high)
    ratio = (logprobs.detach() - old_logprobs.detach()).exp()
    clipped = (ratio < 1 - clip_eps_low) | (ratio > 1 + clip_eps_high)
    weight = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    return times_where_used(logprobs, -weight * advantages.detach()), clipped


def value_clip(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_eps: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the critic, which may not move far from its value at rollout time in one iteration.

    loss = 0.5 * max((V - R)², (clip(V, V_old - eps, V_old + eps) - R)²)           [OpenAI Baselines, ppo2]
    with value_clip_eps None: 0.5 * (V - R)².

    values, old_values, returns: (B,T), in reward units; value_clip_eps: in reward units. Returns (loss,
    clipped), each (B,T), the loss in reward units squared; `clipped` is True where the clipped term is the
    larger: there the gradient is 0.
    """
    require_same_shape("value_clip", values=values, old_values=old_values, returns=returns)
    returns, old_values = returns.detach(), old_values.detach()
    loss = 0.5 * square_where_used(values - returns)
    if value_clip_eps is None:
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    if value_clip_eps <= 0:
        raise ValueError(f"value_clip: value_clip_eps is {value_clip_eps}; it must be above 0, or None for no clipping")
    limited = old_values + (values.detach() - old_values).clamp(-value_clip_eps, value_clip_eps)
    bound = 0.5 * (limited - returns).square()
    # Inside the range the two terms are equal but for rounding, which must not be taken for a clip.
    outside = (values.detach() - old_values).abs() > value_clip_eps
    clipped = outside & (bound > loss)
    return torch.where(clipped, bound, loss), clipped


def nll(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood per token: -logprobs. logprobs: (B,T), in nats. Returns (B,T), in nats."""
    return -logprobs


def bradley_terry(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood that the chosen response wins, per pair.

    loss = -log sigmoid(chosen - rejected [- margin])  [Ouyang et al. 2022, eq. 1; margin: Llama 2, 2023]

    chosen_scores, rejected_scores, margin: (P,), in reward units. Returns (P,), in nats.
    """
    require_same_shape("bradley_terry", chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    gap = chosen_scores - rejected_scores
    if margin is None:
        return -logsigmoid(gap)
    require_same_shape("bradley_terry", chosen_scores=chosen_scores, margin=margin)
    return -logsigmoid(gap - margin)


def dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    kind: str = "sigmoid",
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, per pair.

    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    "sigmoid"  -(1 - e) * log sigmoid(beta * gap) - e * log sigmoid(-beta * gap)  [Rafailov et al. 2023, 7;
               e = label_smoothing, the chance that a label is flipped               Mitchell 2023, "cDPO"]
    "ipo"      (gap - 1 / (2 * beta))²                                              [Azar et al. 2024, eq. 17]

    All log-probs: (P,), in nats, each the *sum* over the response's tokens (for "ipo" too). The reference's
    are taken as constant. Returns (P,). beta: above 0; label_smoothing: in [0, 0.5), for "sigmoid" only; else
    ValueError.
    """
    require_same_shape(
        "dpo",
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    if beta <= 0:
        raise ValueError(f"dpo: beta is {beta}; it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo: label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    gap = (chosen_logprobs - ref_chosen_logprobs.detach()) - (rejected_logprobs - ref_rejected_logprobs.detach())
    if kind == "sigmoid":
        return -(1 - label_smoothing) * logsigmoid(beta * gap) - label_smoothing * logsigmoid(-beta * gap)
    if kind != "ipo":
        raise ValueError(f"dpo: kind is {kind!r}; it must be 'sigmoid' or 'ipo'")
    if label_smoothing:
        raise ValueError("dpo: label_smoothing is defined for kind 'sigmoid' only")
    return (gap - 1 / (2 * beta)).square()


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_eps_low: float, clip_eps_high: float
) -> tuple[Tensor, Tensor]:
    """max(-ratio * A, -clip(ratio) * A), and where the second term is strictly the larger."""
    _require_clip_range(clip_eps_low, clip_eps_high)
    loss = times_where_used(ratio, -advantages)
    bound = -ratio.detach().clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages.detach()
    clipped = bound > loss
    return torch.where(clipped, bound, loss), clipped


def _require_clip_range(clip_eps_low: float, clip_eps_high: float) -> None:
    if clip_eps_low < 0 or clip_eps_high < 0:
        raise ValueError(f"clip_eps_low {clip_eps_low} and clip_eps_high {clip_eps_high} must not be negative")
