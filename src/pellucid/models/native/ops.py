"""The kernels over tensors: shapes and dtypes as PyTorch has them, on the CPU, contiguous. What is `dtype` here may be
bfloat16 where `native.load().has_bfloat16()`; everything else is float32. Nothing here is recorded by autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.models import native


def kernels() -> Any:
    """Whoever comes here has asked `native.load` before."""
    library = native.load()
    assert library is not None
    return library


def _low(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


def _at(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class Packed(NamedTuple):
    """A weight (outputs, inputs) as `product` reads it. Half the bytes of the float32 weight if dtype is bfloat16."""

    panels: Tensor
    outputs: int
    inputs: int
    dtype: torch.dtype


def pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False, out: Packed | None = None) -> Packed:
    """weight: (outputs, inputs) float32. transposed: for products with the weight's columns. out: memory to use again."""
    weight = weight.detach()
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    columns = kernels().panel_columns()
    assert not _low(dtype) or inputs % 2 == 0
    if out is None:
        steps = inputs // 2 if _low(dtype) else inputs
        out = Packed(torch.empty(-(-outputs // columns), steps, columns), outputs, inputs, dtype)
    row, column = weight.stride()
    steps = (column, row) if transposed else (row, column)
    kernels().pack(_low(dtype), outputs, inputs, weight.data_ptr(), *steps, _at(out.panels))
    return out


def product(
    x: Tensor, weight: Packed, bias: Tensor | None = None, out: Tensor | None = None, *, add: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x (N, inputs) in the weight's dtype -> x . weight^T + bias, (N, outputs) in dtype; or into out, or added to it."""
    if out is None:
        out = torch.empty(len(x), weight.outputs, dtype=dtype)
    low, out_low = _low(x.dtype), _low(out.dtype)
    assert x.dtype == weight.dtype and x.shape[1] == weight.inputs and low >= out_low
    kernels().product(
        low, out_low, len(x), weight.outputs, weight.inputs, _at(x), _at(weight.panels), _at(bias), _at(out), add
    )
    return out


def weight_gradient(dy: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """dy (N, outputs), x (N, inputs) -> dy^T . x, (outputs, inputs) float32; added to `onto` if given."""
    assert dy.dtype == x.dtype
    (n, outputs), inputs = dy.shape, x.shape[1]
    if not n:
        return torch.zeros(outputs, inputs) if onto is None else onto
    scratch = torch.empty(kernels().weight_gradient_scratch(inputs))
    out = torch.empty(outputs, inputs) if onto is None else onto
    add, low = onto is not None, _low(x.dtype)
    kernels().weight_gradient(low, n, outputs, inputs, _at(dy), _at(x), _at(scratch), _at(out), add)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (..., W) float32 -> the same shape in dtype."""
    out, width = torch.empty_like(x, dtype=dtype), len(weight)
    kernels().rms_norm(_low(dtype), x.numel() // width, width, _at(x), _at(weight), eps, _at(out))
    return out


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dy, x, onto: (N, W) float32. Returns (dx + onto, dweight (W,))."""
    (n, width), dx = x.shape, torch.empty_like(x)
    sums = torch.zeros(max(kernels().rms_norm_chunks(n), 1), width)
    kernels().rms_norm_backward(n, width, _at(dy), _at(x), _at(weight), eps, _at(onto), _at(dx), _at(sums))
    return dx, sums[0]


def gated(gate_up: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """gate_up (N, 2 W): gate, then up -> silu(gate) * up, (N, W) in dtype."""
    n, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(n, width, dtype=dtype) if out is None else out
    assert _low(out.dtype) >= _low(gate_up.dtype)
    kernels().gated(_low(out.dtype), _low(gate_up.dtype), n, width, _at(gate_up), _at(out))
    return out


def gated_backward(dout: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """dout (N, W) float32. Returns (the gradient of gate_up, silu(gate) * up), in gate_up's dtype."""
    n, width = dout.shape
    dgate_up, out = torch.empty_like(gate_up), torch.empty(n, width, dtype=gate_up.dtype)
    kernels().gated_backward(_low(gate_up.dtype), n, width, _at(dout), _at(gate_up), _at(dgate_up), _at(out))
    return dgate_up, out


def rotated(x: Tensor, heads: int, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, all heads, dim) float32, overwritten; cos, sin (N, dim / 2) -> the first `heads` turned, in dtype."""
    (n, every, dim), out = x.shape, torch.empty_like(x, dtype=dtype)
    kernels().rotated(_low(dtype), n, heads, every, dim, _at(x), _at(cos), _at(sin), _at(out))
    return out


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; itself if it is."""
    if x.dtype == dtype:
        return x
    out = torch.empty_like(x, dtype=dtype)
    kernels().round_all(x.numel(), _at(x), _at(out))
    return out


class Heads(NamedTuple):
    """The shape of an attention layer. window: tokens that one sees, itself included; 0 for all."""

    heads: int
    kv_heads: int
    dim: int
    window: int
    scale: float


def packed_attention(qkv: Tensor, heads: Heads, ends: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (N, heads + 2 kv_heads, dim), queries and keys turned; ends: (S,) int64, where each sequence ends.

    Returns (outputs (N, heads * dim) in qkv's dtype, log-norms (N, heads) for `packed_attention_backward`)."""
    n, low, (h, kv, dim, window, scale) = len(qkv), _low(qkv.dtype), heads
    out, log_norms = torch.empty(n, h * dim, dtype=qkv.dtype), torch.empty(n, h)
    kernels().packed_attention(low, len(ends), h, kv, dim, _at(ends), window, scale, _at(qkv), _at(out), _at(log_norms))
    return out, log_norms


def packed_attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, log_norms: Tensor, heads: Heads, ends: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient with respect to qkv before its queries and keys were turned, in its dtype."""
    low, (h, kv, dim, window, scale), dqkv = _low(qkv.dtype), heads, torch.empty_like(qkv)
    kernels().packed_attention_backward(
        low, len(ends), h, kv, dim, _at(ends), window, scale, _at(qkv), _at(out), _at(log_norms), _at(dout),
        _at(cos), _at(sin), _at(dqkv),
    )  # fmt: skip
    return dqkv


def head(
    logits: Tensor, temperature: float, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits (n, V) float32, targets (n,) int64 -> log-norms, log-probs of the targets, entropies: (n,) each, in nats."""
    n, size = logits.shape
    log_norms, logprobs = torch.empty(n), torch.empty(n)
    entropies = torch.empty(n) if with_entropy else None
    kernels().head(n, size, _at(logits), 1 / temperature, _at(targets), _at(log_norms), _at(logprobs), _at(entropies))
    return log_norms, logprobs, entropies


def head_backward(
    logits: Tensor, temperature: float, targets: Tensor, log_norms: Tensor, entropies: Tensor,
    dlogprobs: Tensor, dentropies: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient with respect to the logits, (n, V) in dtype."""
    out = torch.empty_like(logits, dtype=dtype)
    kernels().head_backward(
        _low(dtype), *logits.shape, _at(logits), 1 / temperature, _at(targets), _at(log_norms), _at(entropies),
        _at(dlogprobs), _at(dentropies), _at(out),
    )  # fmt: skip
    return out
