"""Logits -> the next token and its log-prob, for many sequences at once and without a random state."""

from __future__ import annotations

import torch
from torch import Tensor

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
    scaled = logits.float()
    if params.temperature not in (0.0, 1.0):
        scaled = scaled / params.temperature
    logprobs = scaled.log_softmax(dim=-1)
    if params.temperature == 0:
        tokens = scaled.argmax(dim=-1, keepdim=True)
    else:
        tokens = _invert_cdf(logprobs.exp(), uniforms, params)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _invert_cdf(probs: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """probs: (n, V) float32. Returns token ids (n, 1)."""
    probs, ids = _truncate(probs, params)
    # float64: in float32 the sum over a large vocabulary drifts by more than the probability of a rare token.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    picks = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
    impossible = probs.gather(1, picks) <= 0
    if impossible.any():  # a parallel prefix sum (CUDA) need not be monotone in its last bit
        picks = torch.where(impossible, probs.argmax(dim=-1, keepdim=True), picks)
    return picks if ids is None else ids.gather(1, picks)


def _truncate(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The top-k tokens, then of these the fewest whose share reaches top_p. Not renormalised.

    probs: (n, V). Returns (n, K) with 0 outside the support, and the token ids (n, K) of its columns; None
    stands for 0..V-1.
    """
    if params.top_k:
        probs, ids = probs.topk(min(params.top_k, probs.shape[1]), dim=-1)
    elif params.top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    else:
        return probs, None
    if params.top_p < 1:
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        # A token stays if the ones before it fall short of top_p: the one that crosses the line is kept.
        probs = probs.masked_fill(cumulative - probs >= params.top_p * cumulative[:, -1:], 0.0)
    return probs, ids
