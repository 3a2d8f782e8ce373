"""Attention without padding: the layouts that our own passes use, for any model that goes through the transformers
attention interface. Tokens always come as one row (1,N).

    Packed    sequences end to end: every pass over known tokens
    Serving   one new token for each of n cached sequences, then prompts end to end: a step of the embedded engine

A caller passes `layout=` to the model's forward, which hands it down to `attention` in every layer. Without a layout, as in
`hf(input_ids)` or `hf.generate`, the model is plain transformers with SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import DataError

IMPLEMENTATION = "pellucid"
"""The name under which transformers knows `attention`."""


@dataclass(frozen=True)
class Packed:
    """Sequences of these lengths, end to end: N = sum(lengths) tokens. Each attends, causally, to itself alone."""

    lengths: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int]]:
        """(sequences, length) of each run of neighbours of one length: a run is a batch without padding."""
        for length, run in groupby(self.lengths):
            yield len(list(run)), length


@dataclass(frozen=True)
class Serving:
    """The first n tokens belong to slots 0..n-1 of a cache, the others to new prompts of these lengths.

    positions: (n,), of the slots' tokens; each sees the cached keys 0..position of `length` columns. ragged: whether the
    positions differ, so that columns must be hidden. cached: layer -> keys and values of the n slots, (n, kv_heads, length,
    dim), this step's included.
    """

    positions: Tensor
    length: int
    ragged: bool
    prompts: Packed
    cached: Callable[[int], tuple[Tensor, Tensor]]
    _bias: dict[int | None, Tensor | None] = field(default_factory=dict)

    def bias(self, window: int | None) -> Tensor | None:
        """0 where a slot's key is seen and -inf where not, (n,1,1,length) float32; None where all are seen."""
        if window not in self._bias:
            limit = window if window is not None and window < self.length else None
            self._bias[window] = self._hidden(limit) if self.ragged or limit is not None else None
        return self._bias[window]

    def _hidden(self, window: int | None) -> Tensor:
        columns, positions = torch.arange(self.length, device=self.positions.device), self.positions[:, None]
        hidden = columns > positions
        if window is not None:
            hidden |= columns <= positions - window
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return bias[:, None, None]

    def last_tokens(self) -> Tensor:
        """Where the tokens stand whose successors are asked for: each slot's, and the last of each prompt."""
        n, device = len(self.positions), self.positions.device
        if not self.prompts.lengths:  # nothing from the host's memory, so that a CUDA graph can hold this
            return torch.arange(n, device=device)
        ends = torch.tensor(self.prompts.lengths, dtype=torch.int64, device=device).cumsum(0) + n - 1
        return torch.cat([torch.arange(n, device=device), ends])


@dataclass(frozen=True)
class Probe(Packed):
    """Packed, and a note of the window that each layer asks for, in their order."""

    windows: list[int | None] = field(default_factory=list)


Layout = Packed | Serving


def forward(model: Any, input_ids: Tensor, position_ids: Tensor, layout: Layout, **kwargs: Any) -> Any:
    """The model's forward under a layout. input_ids, position_ids: (1,N)."""
    # transformers takes a 4-D mask as it is; this one keeps it from building another, and nobody reads it.
    unread = torch.empty((1, 1, 1, 1), device=input_ids.device)
    return model(input_ids=input_ids, position_ids=position_ids, attention_mask=unread, layout=layout, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. query: (b, heads, t, d); key, value: (b, kv_heads, keys, d).

    Returns (b, t, heads, d). sliding_window: a token sees itself and the window - 1 before it. Scores are
    softcap * tanh(scores / softcap) where a softcap is given.
    """
    for unknown in ("s_aux", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise DataError(f"{type(module).__name__} adds {unknown} to its attention, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        return _plain(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
    if isinstance(layout, Probe):
        layout.windows.append(sliding_window)
    if isinstance(layout, Packed):
        return packed_attention(query, key, value, layout, scale, sliding_window, softcap), None
    return serving_attention(query, key, value, layout, module.layer_idx, scale, sliding_window, softcap), None


def serving_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Serving,
    layer: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query: (1, heads, N, d); key, value: (1, kv_heads, N, d), which the cache already holds. Returns (1, N, heads, d)."""
    n = len(layout.positions)
    prompts = (x[:, :, n:] for x in (query, key, value))
    if not n:
        return packed_attention(*prompts, layout.prompts, scale, window, softcap)
    slots = slot_attention(query[0, :, :n].transpose(0, 1), *layout.cached(layer), scale, layout.bias(window), softcap)
    if not layout.prompts.lengths:
        return slots[None]
    return torch.cat([slots[None], packed_attention(*prompts, layout.prompts, scale, window, softcap)], dim=1)


def slot_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, softcap: float | None = None
) -> Tensor:
    """One query per sequence. query: (n, heads, d); key, value: (n, kv_heads, length, d); bias: (n,1,1,length).

    Returns (n, heads, d). Heads that share keys are rows of one product, so keys are never repeated.
    """
    n, heads, dim = query.shape
    grouped = query.reshape(n, key.shape[1], heads // key.shape[1], dim) * scale
    weights = _softmax(grouped @ key.transpose(2, 3), bias, softcap)
    return (weights @ value).view(n, heads, value.shape[-1])


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Packed,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query: (1, heads, N, d); key, value: (1, kv_heads, N, d). Returns (1, N, heads, d)."""
    runs = list(layout.runs())
    sizes = [count * length for count, length in runs]
    outputs = []
    pieces = [tensor.transpose(1, 2).split(sizes, dim=1) for tensor in (query, key, value)]
    for (count, length), *rows in zip(runs, *pieces, strict=True):
        # (1, count * length, heads, d) -> (count, heads, length, d)
        q, k, v = (x.reshape(count, length, *x.shape[2:]).transpose(1, 2) for x in rows)
        out = _causal(q, k, v, scale, window if window is not None and window < length else None, softcap)
        outputs.append(out.transpose(1, 2).reshape(1, count * length, *out.shape[1::2]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Without a layout: transformers' own mask, boolean (b,1,t,keys), or None for "causal, or all for one query"."""
    if mask is None and softcap is None and query.shape[2] == key.shape[2]:
        return _causal(query, key, value, scale, None, None)
    if mask is None:
        rows = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
        mask = rows >= torch.arange(key.shape[2], device=query.device)
    return _masked(query, key, value, mask, scale, softcap)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """A batch of sequences of one length. q: (B, heads, T, d). Returns the same shape."""
    if window is None and softcap is None:
        shared = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    row = torch.arange(q.shape[2], device=q.device)
    seen = row[:, None] >= row
    if window is not None:
        seen &= row[:, None] - row < window
    return _masked(q, k, v, seen, scale, softcap)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """seen: bool, broadcast to (B, heads, t, keys)."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # Not -inf: a row of left padding sees nothing, and its NaN would reach the others as 0 * NaN.
    bias = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return _softmax(q @ k.transpose(2, 3) * scale, bias, softcap) @ v


def _softmax(scores: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """In float32, returned in the dtype of the scores."""
    wide = scores.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    return (wide if bias is None else wide + bias).softmax(-1).to(scores.dtype)


def adopt(hf: Any) -> None:
    """Route the model's attention through `attention`, and see that sequences end to end give what they give alone.

    Raises DataError, the model as it was, where it has an attention of its own, or hands it no layout or no window.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = hf.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before == IMPLEMENTATION:
        return
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    gap, scale = math.inf, 1.0
    if hf._supports_attention_backend:
        hf.set_attn_implementation(IMPLEMENTATION)
        gap, scale = _packing_gap(hf, config)
    if not gap <= (1e-4 if hf.dtype == torch.float32 else 0.05) * scale:
        hf.set_attn_implementation(before)
        raise DataError(
            f"{type(hf).__name__} has an attention of its own (ALiBi, say, or a window that only its mask knows), so its "
            "sequences cannot be laid end to end: set packing = false and rollout.engine = 'generate'"
        )


@torch.no_grad()
def _packing_gap(hf: Any, config: Any) -> tuple[float, float]:
    """Largest difference of the hidden states of two sequences end to end and alone, and the largest hidden state."""
    base, device = hf.base_model, next(hf.parameters()).device

    def states(lengths: tuple[int, ...], layout: Packed) -> tuple[Tensor, tuple[Tensor, ...]]:
        ids = (torch.arange(sum(lengths), device=device) * 5 + 1)[None] % hf.get_input_embeddings().num_embeddings
        places = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        return forward(base, ids, places, layout, use_cache=False).last_hidden_state, ids.split(lengths, 1)

    probe, lengths = Probe((4, 2)), (4, 2)
    packed, parts = states(lengths, probe)
    window = getattr(config, "sliding_window", None)
    if window and not any(probe.windows):  # it may hide tokens by its mask alone, which shows beyond the window only
        lengths = (window + 2, 2)
        packed, parts = states(lengths, Packed(lengths))
    alone = torch.cat([base(input_ids=part, use_cache=False).last_hidden_state for part in parts], 1)
    return (packed - alone).abs().max().item(), max(packed.abs().max().item(), 1.0)
