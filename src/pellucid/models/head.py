"""The LM head without its logits: log-probs and entropies of given tokens, in chunks, again in the backward pass.

Logits of shape (B,T,V) never exist. Everything is accumulated in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.models.native import ops
from pellucid.models.weights import Weight

CHUNK_ELEMENTS = 1 << 21
"""Logits alive at once in the LM head: 8 MiB in float32, whatever the number of tokens."""
CHUNK_ROWS = 128
"""But never fewer tokens than this at once, or a large vocabulary's matrix products become thin and slow."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    entropy: bool = False,
    packed: Weight | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature)[target], and the entropy of that distribution if asked.

    hidden: (N,H). weight: (V,H). targets: (N,). packed: the weight for the kernels in C, which do it if there is neither
    bias nor softcap. Returns (N,) float32 in nats. Only CHUNK_ELEMENTS logits exist at any time, in either direction;
    gradients of the weight accumulate in float32.
    """
    if packed is not None and bias is None and softcap is None:
        logprobs, entropies = _NativeHead.apply(hidden.float(), weight, packed, targets, temperature, entropy)
    else:
        logprobs, entropies = _ChunkedHead.apply(hidden, weight, bias, targets, temperature, softcap, entropy)
    return logprobs, entropies if entropy else None


def top_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None = None,
    packed: Weight | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens and their log-probs, likeliest first: (N,K) int64 and (N,K) float32, K = min(k, V).

    Arguments and memory as for `token_logprobs`; no gradient.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for part in _chunks(len(hidden), len(weight)):
        if packed is not None and bias is None and softcap is None:
            logits = ops.product(ops.rounded(hidden[part].float(), packed.dtype), packed.packed())
        else:
            logits = _logits(hidden[part], weight, bias, softcap)
        logprobs, ids = (logits / temperature).log_softmax(-1).topk(min(k, len(weight)))
        found.append((ids, logprobs))
    ids, logprobs = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


class _NativeHead(torch.autograd.Function):
    """The same over kernels: logits stay float32, whatever the two sides of their product are rounded to."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, packed: Weight, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_norms, logprobs, entropies = (torch.zeros(len(hidden)) for _ in range(3))
        for part in _chunks(len(hidden), len(weight)):
            logits = ops.product(ops.rounded(hidden[part], packed.dtype), packed.packed())
            log_norms[part], logprobs[part], found = ops.head(logits, temperature, targets[part], entropy)
            if found is not None:
                entropies[part] = found
        ctx.save_for_backward(hidden, weight, targets, log_norms, entropies)
        ctx.packed, ctx.temperature = packed, temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None) -> Any:
        hidden, weight, targets, log_norms, entropies = ctx.saved_tensors
        packed, dtype = ctx.packed, ctx.packed.dtype
        dlogprobs = torch.zeros_like(log_norms) if dlogprobs is None else dlogprobs.contiguous()
        dentropies = None if dentropies is None else dentropies.contiguous()
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for part in _chunks(len(hidden), len(weight)):
            x = ops.rounded(hidden[part], dtype)
            logits = ops.product(x, packed.packed())
            known = (targets[part], log_norms[part], entropies[part])
            wanted = (dlogprobs[part], None if dentropies is None else dentropies[part])
            dlogits = ops.head_backward(logits, ctx.temperature, *known, *wanted, dtype)
            ops.product(dlogits, packed.packed(transposed=True), out=dhidden[part])
            ops.weight_gradient(dlogits, x, onto=dweight)
        return dhidden, dweight, None, None, None, None


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, with_entropy):
        logprobs = torch.empty(len(hidden), device=hidden.device, dtype=_wide(hidden))
        log_norm, entropy = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        for rows in _chunks(len(hidden), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias, softcap) / temperature
            log_norm[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - log_norm[rows]
            if with_entropy:
                probs = (logits - log_norm[rows, None]).exp_()
                entropy[rows] = log_norm[rows] - (probs.mul_(logits)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(bias))
        for rows in _chunks(len(hidden), weight.shape[0]):
            capped = _logits(hidden[rows], weight, bias, ctx.softcap)
            scaled = capped / ctx.temperature - log_norm[rows, None]  # log-probs of the whole vocabulary
            probs = scaled.exp()
            grad = torch.zeros_like(probs)
            if grad_logprobs is not None:
                grad.addcmul_(probs, grad_logprobs[rows, None], value=-1)
                grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None].to(grad.dtype))
            if grad_entropy is not None:
                grad.addcmul_(probs * (scaled + entropy[rows, None]), grad_entropy[rows, None], value=-1)
            grad.div_(ctx.temperature)
            if ctx.softcap is not None:
                grad.mul_(1 - (capped / ctx.softcap) ** 2)
            low = grad.to(hidden.dtype)
            grad_hidden[rows] = low @ weight.to(hidden.dtype)
            grad_weight += low.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).T).to(_wide(hidden))
    if bias is not None:
        logits += bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where x already is (gradient checks)."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(n: int, vocab: int) -> list[slice]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
