"""The slot KV cache: preallocated keys and values, one row per sequence in flight, each of its own length.

It is passed to a transformers model as past_key_values. Attention then sees (rows, heads, length, head_dim)
of the active rows and the longest length, as views; the caller's mask hides what lies beyond a row's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

from pellucid.errors import ConfigError

KeysValues = list[tuple[Tensor, Tensor]]
"""Per layer: keys (kv_heads, length, key_dim) and values (kv_heads, length, value_dim) of one sequence."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def measure_layers(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer caches, found by running one token: exact for every attention variant, as no config is.

    Raises ConfigError if some layer keeps no keys and values.
    """
    cache = DynamicCache()
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    kept = [layer for layer in cache.layers if isinstance(layer.keys, Tensor) and layer.keys.numel()]
    if len(kept) != expected:
        raise ConfigError(
            f"rollout: {expected - len(kept)} of the {expected} layers of {type(model).__name__} keep no "
            "keys and values of their own, which the embedded engine needs. Use the vllm engine instead."
        )
    return [
        LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype) for layer in kept
    ]


def cache_bytes(layers: list[LayerShape], num_slots: int, length: int) -> int:
    """Bytes that a SlotCache of this size takes."""
    return num_slots * length * sum(layer.bytes_per_token for layer in layers)


@dataclass
class _Aim:
    """Where the next decode step writes, and how far it reads. One object, shared by all layers."""

    rows: Tensor  # (n,)
    positions: Tensor  # (n,)
    length: int


class SlotLayer(DynamicLayer):
    """Keys (N, kv_heads, L, key_dim) and values (N, kv_heads, L, value_dim) of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: LayerShape, num_slots: int, length: int, device: torch.device, aim: _Aim) -> None:
        super().__init__()
        # Zeros, not empty: a masked position has weight 0, and 0 times an uninitialised NaN is NaN.
        size = (num_slots, shape.kv_heads, length)
        self.keys = torch.zeros((*size, shape.key_dim), dtype=shape.dtype, device=device)
        self.values = torch.zeros((*size, shape.value_dim), dtype=shape.dtype, device=device)
        self.dtype, self.device = shape.dtype, device
        self.is_initialized = True
        self._aim = aim

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """One new token per row, (n, kv_heads, 1, dim) -> views of these rows, (n, kv_heads, length, dim)."""
        aim = self._aim
        n = key_states.shape[0]
        # Under autocast keys come in float32 (from the rotation) and values in bfloat16.
        self.keys[aim.rows, :, aim.positions] = key_states.squeeze(2).to(self.dtype)
        self.values[aim.rows, :, aim.positions] = value_states.squeeze(2).to(self.dtype)
        return self.keys[:n, :, : aim.length], self.values[:n, :, : aim.length]

    def get_seq_length(self) -> int:
        """Tokens before the one being written, in the longest row. Positions are always given explicitly."""
        return self._aim.length - 1


class SlotCache(Cache):
    """N slots of L tokens for every layer. Row i is slot i; a decode step's active slots are rows 0..n-1."""

    layers: list[SlotLayer]

    def __init__(self, layers: list[LayerShape], num_slots: int, length: int, device: torch.device) -> None:
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        self._aim = _Aim(nowhere, nowhere, 1)
        super().__init__(layers=[SlotLayer(shape, num_slots, length, device, self._aim) for shape in layers])

    def aim(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """Before a decode step: row i's token goes to positions[i]; attention sees columns 0..length-1."""
        self._aim.rows, self._aim.positions, self._aim.length = rows, positions, length

    def fill(self, rows: list[int], prompt: KeysValues) -> None:
        """Copy one prompt's keys and values into the front of each of these rows."""
        for layer, (keys, values) in zip(self.layers, prompt, strict=True):
            layer.keys[rows, :, : keys.shape[1]] = keys
            layer.values[rows, :, : values.shape[1]] = values

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` tokens of each source row over the target row."""
        for layer in self.layers:
            layer.keys[targets, :, :length] = layer.keys[sources, :, :length]
            layer.values[targets, :, :length] = layer.values[sources, :, :length]


def attention_bias(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Which keys each query sees, (n, queries, keys) bool -> the 4-D mask that transformers uses as it is.

    SDPA takes the booleans; eager attention adds its mask to the scores, so it needs 0 and the lowest number.
    """
    mask = visible[:, None]
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def readable_bytes(count: float) -> str:
    """1234567890 -> '1.1 GiB'."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
