"""Means, whitening and loss aggregation over the tokens that count.

Axes: B sequences, T padded tokens. A mask is True (or non-zero) where a token counts. What lies outside a
mask may be anything, inf and nan included: it never reaches a value or a gradient. Multiplying by the mask
would not do (`nan * 0` is nan), so everything here selects with `torch.where`.
"""

import math
from typing import Any

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`: sum(x[mask]) / count(mask), over everything or along `dim`.

    x, mask: the same shape. Returns a scalar, or x's shape without `dim`, in x's units and dtype.
    Raises ValueError where there is nothing to average (an empty mask, or with `dim` any empty row).
    """
    require_same_shape("masked_mean", x=x, mask=mask)
    keep = mask.bool()
    count = keep.sum() if dim is None else keep.sum(dim)
    if not bool((count > 0).all()):
        raise ValueError("masked_mean: the mask selects nothing to average" + _along(dim))
    kept = torch.where(keep, x, 0)
    # Summed in float64: float32 sums of many equal numbers drift, and whitening divides the drift by a
    # standard deviation near 0.
    total = kept.sum(dtype=torch.float64) if dim is None else kept.sum(dim, dtype=torch.float64)
    return (total / count).to(x.dtype)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `x` to variance 1 (and mean 0) over the masked-in entries of the whole tensor.

    whitened = (x - mean) / sqrt(var + 1e-8), biased variance; with shift_mean=False the mean is added back.

    x, mask: the same shape, usually (B,T). Returns x's shape, dimensionless, 0 where masked out. To whiten
    over a batch, pass the whole batch: whitening micro-batches one by one gives other numbers. Raises
    ValueError on an empty mask.
    """
    require_same_shape("masked_whiten", x=x, mask=mask)
    keep = mask.bool()
    mean = masked_mean(x, keep)
    centered = torch.where(keep, x, mean) - mean
    whitened = centered * torch.rsqrt(masked_mean(centered.square(), keep) + WHITEN_EPS)
    return torch.where(keep, whitened if shift_mean else whitened + mean, 0)


def aggregate(per_token: Tensor, mask: Tensor, mode: str, denominator: Tensor | float | None = None) -> Tensor:
    """Reduce a per-token loss to the scalar that is differentiated.

    "token"     sum(x * mask) / denominator; default: the number of tokens in the mask  [DAPO, Yu et al. 2025]
    "sequence"  sum over sequences of each one's mean / denominator; default: the number of sequences that
                have at least one token in the mask                                   [GRPO, Shao et al. 2024]
    "constant"  sum(x * mask) / denominator, which must be given, such as B * max_new_tokens
                                                                                   [Dr. GRPO, Liu et al. 2025]

    per_token, mask: (B,T); (P,) too, except for "sequence". Returns a scalar in per_token's units.

    When a batch is split over micro-batches or ranks, pass the *global* count as `denominator` and add the
    results: the sum is then exactly the loss of the whole batch, which a mean of means is not. With a
    denominator given, an empty micro-batch contributes 0. Without one, an empty mask raises ValueError, as
    does a denominator that is not a finite number above 0: the loss would be nan.
    """
    require_same_shape("aggregate", per_token=per_token, mask=mask)
    keep = mask.bool()
    kept = torch.where(keep, per_token, 0)
    if mode == "sequence":
        if per_token.ndim != 2:
            raise ValueError(f"aggregate: mode 'sequence' needs shape (B,T), got {tuple(per_token.shape)}")
        lengths = keep.sum(dim=1)
        total = (kept.sum(dim=1) / lengths.clamp(min=1)).sum()
        count = (lengths > 0).sum()
    elif mode in ("token", "constant"):
        total = kept.sum()
        count = keep.sum()
    else:
        raise ValueError(f"aggregate: mode is {mode!r}; it must be 'token', 'sequence' or 'constant'")
    if denominator is None:
        if mode == "constant":
            raise ValueError("aggregate: mode 'constant' needs a denominator, such as B * max_new_tokens")
        if int(count) == 0:
            raise ValueError(
                "aggregate: the mask is empty; pass the global count as denominator if this is a micro-batch"
            )
        denominator = count
    elif not 0 < float(denominator) < math.inf:
        raise ValueError(f"aggregate: the denominator is {float(denominator)}; it must be a finite number above 0")
    return total / denominator


def require_same_shape(caller: str, **tensors: Tensor) -> None:
    """Raise ValueError, naming the tensors, unless all have one shape, as broadcasting hides mistakes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{caller}: shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


# The losses do not know the mask; `aggregate` applies it later. By then a token outside the mask (or beyond a
# clip) has the gradient 0, and backward multiplies this 0 by the local derivative: 0 * inf and 0 * nan are
# nan, and one such token poisons the whole model. The three functions below are ordinary arithmetic whose
# backward takes "not used" as 0.


def exp_where_used(x: Tensor) -> Tensor:
    """exp(x), elementwise; where the result is not used the gradient is 0, even if exp(x) is inf or nan."""
    value = x.detach().exp()
    return _attach_slope(x, value, value)


def times_where_used(x: Tensor, constant: Tensor) -> Tensor:
    """x * constant, elementwise, `constant` taken as such; where not used the gradient is 0, as above."""
    constant = constant.detach()
    return _attach_slope(x, x.detach() * constant, constant)


def square_where_used(x: Tensor) -> Tensor:
    """x², elementwise; where not used the gradient is 0, as above."""
    return _attach_slope(x, x.detach().square(), 2 * x.detach())


def _attach_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    attached: Tensor = _Slope.apply(x, value, slope)
    return attached


class _Slope(torch.autograd.Function):
    """`value`, as a function of x whose derivative is `slope`; a gradient of 0 stays 0, be the slope nan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return torch.where(grad == 0, 0, grad * slope), None, None


def _along(dim: int | None) -> str:
    return "" if dim is None else f" in at least one row along dim {dim}"
