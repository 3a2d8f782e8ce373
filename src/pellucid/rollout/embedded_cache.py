"""The slot KV cache: preallocated keys and values, one row per sequence in flight, each of its own length.

It is passed to a transformers model as its cache, or used directly by our own forward (embedded_llama.py). Nothing is
copied in a step: attention reads views of the active rows up to the longest length, and hides what a row has not reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

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


def cache_bytes(layers: list[LayerShape], num_slots: int, length: int) -> int:
    """Bytes that a SlotCache of this size takes."""
    return num_slots * length * sum(layer.bytes_per_token for layer in layers)


class SlotLayer(DynamicLayer):
    """Keys (S, kv_heads, L, key_dim) and values (S, kv_heads, L, value_dim) of one layer, for S slots of L tokens."""

    keys: Tensor
    values: Tensor

    def __init__(
        self, shape: LayerShape, num_slots: int, length: int, device: torch.device, aim: Aim, cleared: bool
    ) -> None:
        super().__init__()
        size, new = (num_slots, shape.kv_heads, length), torch.zeros if cleared else torch.empty
        self.keys = new((*size, shape.key_dim), dtype=shape.dtype, device=device)
        self.values = new((*size, shape.value_dim), dtype=shape.dtype, device=device)
        self.dtype, self.device = shape.dtype, device
        self.is_initialized = True
        self._aim = aim

    def write(self, keys: Tensor, values: Tensor) -> None:
        """The keys (n, kv_heads, key_dim) and values of the last n of the step's tokens, to where the cache is aimed."""
        rows, positions = self._aim.rows[-len(keys) :], self._aim.positions[-len(keys) :]
        self.keys[rows, :, positions] = keys
        self.values[rows, :, positions] = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """What transformers calls: keys and values of this step's tokens, (1, kv_heads, N, dim). Returns them again; the
        attention reads the rest through the layout."""
        self.write(*(x[0].transpose(0, 1).to(self.dtype) for x in (key_states, value_states)))
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Positions are always given explicitly, so nothing depends on this."""
        return 0


@dataclass
class Aim:
    """Where the tokens of the next forward are written, row and column: (N,) each. One object, shared by all layers."""

    rows: Tensor
    positions: Tensor


class SlotCache(Cache):
    """S slots of L tokens for every layer. Row i is slot i."""

    layers: list[SlotLayer]

    def __init__(
        self, layers: list[LayerShape], num_slots: int, length: int, device: torch.device, cleared: bool = True
    ) -> None:
        """cleared: zeros, for attention that multiplies hidden columns by 0, which does not rid it of a NaN."""
        self.num_slots, self.length = num_slots, length
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        self.aim = Aim(nowhere, nowhere)
        super().__init__(layers=[SlotLayer(shape, num_slots, length, device, self.aim, cleared) for shape in layers])

    def clear(self) -> None:
        """As if it were new, and cleared."""
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()

    def views(self, n: int, length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """layer -> the first `length` keys and values of the first n rows, (n, kv_heads, length, dim), not copied."""
        return lambda layer: (self.layers[layer].keys[:n, :, :length], self.layers[layer].values[:n, :, :length])

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """The first `length` tokens of each source row over its target row."""
        for layer in self.layers:
            layer.keys[targets, :, :length] = layer.keys[sources, :, :length]
            layer.values[targets, :, :length] = layer.values[sources, :, :length]

    def read(self, row: int, length: int) -> KeysValues:
        """A copy of the first `length` tokens of a row."""
        return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self.layers]

    def fill(self, rows: list[int], kept: KeysValues) -> None:
        """What `read` gave, to the front of each of these rows."""
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            layer.keys[rows, :, : keys.shape[1]] = keys
            layer.values[rows, :, : values.shape[1]] = values


def readable_bytes(count: float) -> str:
    """1234567890 -> '1.1 GiB'."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
