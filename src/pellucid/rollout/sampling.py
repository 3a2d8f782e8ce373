"""Logits -> the next token and its log-prob, for many sequences at once and without a random state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.models import native
from pellucid.types import SamplingParams


def request_uniforms(params: SamplingParams, prompt_id: int, sample_index: int) -> Tensor:
    """The randomness of one request: u[i] in [0, 1) decides its i-th token. (max_new_tokens,) float64, CPU.

    Drawn at admission from the request's own seed, so that no neighbour, slot or device changes a sample.
    """
    generator = torch.Generator().manual_seed(params.request_seed(prompt_id, sample_index))
    return torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64)


def sample_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF: the first one whose cumulative probability exceeds u.

    logits: (n, V). uniforms: (n,) float64 in [0, 1), ignored when greedy. Returns token ids (n,) int64 and
    their log-probs (n,) float32, in nats: log-softmax(logits / temperature) before top-k and top-p;
    temperature 1 when greedy. A token of probability 0 is never returned, unless logits are NaN.
    """
    plain = params.temperature > 0 and not params.top_k and params.top_p == 1
    if plain and logits.device.type == "cpu" and logits.dtype == torch.float32 and (kernels := native.load()):
        return _sample_natively(kernels, logits.contiguous(), uniforms.contiguous(), params.temperature)
    scaled = logits.float()
    if params.temperature not in (0.0, 1.0):
        scaled = scaled / params.temperature
    highest, likeliest = scaled.max(dim=-1, keepdim=True)
    weights = (scaled - highest).exp_()  # probabilities, times one factor per row
    sums = _block_sums(weights)
    if params.temperature == 0:
        tokens = likeliest
    elif params.top_k or params.top_p < 1:
        kept, ids = _truncate(weights, params)
        tokens = ids.gather(1, _invert_cdf(kept, _block_sums(kept), uniforms))
    else:
        tokens = _invert_cdf(weights, sums, uniforms)
    log_norm = highest + sums.sum(dim=-1, keepdim=True).log().float()
    return tokens.squeeze(1), (scaled.gather(1, tokens) - log_norm).squeeze(1)


def _sample_natively(kernels: Any, logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    n, size = logits.shape
    sums = torch.empty(n, -(-size // BLOCK), dtype=torch.float64)
    tokens, logprobs = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.float32)
    arrays = (uniforms, sums, tokens, logprobs)
    kernels.sample(n, size, logits.data_ptr(), 1 / temperature, *(array.data_ptr() for array in arrays))
    return tokens, logprobs


BLOCK = 64
"""Columns summed at once; a running sum over every column is a chain of V additions."""


def _block_sums(weights: Tensor) -> Tensor:
    """(n, V) float32 -> the sums of blocks of BLOCK columns, (n, V / BLOCK rounded up) float64."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums.double()


def _invert_cdf(weights: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """First the block, then the column in it. weights: (n, V); sums: their _block_sums. Returns columns (n, 1)."""
    # float64: in float32 a sum over a large vocabulary drifts by more than the probability of a rare token.
    ends = sums.cumsum(dim=-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=sums.shape[1] - 1)
    inside = sums.gather(1, block)
    share = (target - (ends.gather(1, block) - inside)) / inside
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    there = columns < weights.shape[1]
    part = weights.gather(1, columns.clamp(max=weights.shape[1] - 1)).double() * there
    cdf = part.cumsum(dim=-1)
    picks = torch.searchsorted(cdf, share * cdf[:, -1:], right=True).clamp_(max=BLOCK - 1)
    impossible = part.gather(1, picks) <= 0
    chosen = columns.gather(1, picks)
    if impossible.any():  # rounding at the last edge of a block, or of the vocabulary
        chosen = torch.where(impossible, weights.argmax(dim=-1, keepdim=True), chosen)
    return chosen.clamp_(max=weights.shape[1] - 1)  # beyond it only where the logits are NaN, which retire reports


def _truncate(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The top-k tokens, then of these the fewest whose share reaches top_p. Not renormalised.

    probs: (n, V). Returns (n, K) with 0 outside the support, and the token ids (n, K) of its columns.
    """
    if params.top_k:
        probs, ids = probs.topk(min(params.top_k, probs.shape[1]), dim=-1)
    else:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    if params.top_p < 1:
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        # A token stays if the ones before it fall short of top_p: the one that crosses the line is kept.
        probs = probs.masked_fill(cumulative - probs >= params.top_p * cumulative[:, -1:], 0.0)
    return probs, ids
