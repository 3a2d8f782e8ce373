"""`LlamaModel` on a CPU, with kernels in C for what a decode step does: in float32, and in bfloat16 on processors
that multiply it (AVX512-BF16)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pellucid.models import Precision, Serving, kernel_dtype, native
from pellucid.models.native import ops
from pellucid.rollout.embedded_cache import SlotCache
from pellucid.rollout.embedded_llama import Angles, Layer, Linear, LlamaModel, joined

LONG_PROMPT = 128
"""Tokens beyond which prompts' attention is left to PyTorch's kernel."""


class NativeLlamaModel(LlamaModel):
    """The same forward over other kernels."""

    any_rows = True

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        kernels = native.load()
        assert kernels is not None
        self._kernels: ctypes.CDLL = kernels
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}
        super().__init__(model, precision)

    @staticmethod
    def serves(model: PreTrainedModel, precision: Precision = "float32") -> bool:
        if not LlamaModel.serves(model):
            return False
        weights = (p for p in model.base_model.layers.parameters() if p.dim() == 2)
        return kernel_dtype(model.device, precision, *weights) is not None

    def release(self) -> None:
        self._held.clear()
        super().release()

    def _linear(self, *modules: nn.Linear) -> Linear:
        weight, bias = joined(torch.float32, *modules)
        return Product(self._buffer, ops.pack(weight, self.dtype), bias)

    def _buffer(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, width), the same memory for the same width in every layer and step: fresh memory of this size costs the
        system more than the products that fill it. Nothing lives longer than until the next buffer of its width."""
        held = self._held.get((width, dtype))
        if held is None or len(held) < rows:
            held = self._held[width, dtype] = torch.empty(rows, width, dtype=dtype)
        return held[:rows]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_contiguous():  # the heads of a prompt's queries
            return super()._normed(x, weight)
        return ops.rms_norm(x, weight, self._eps, self.dtype)

    def _gated(self, gate_up: Tensor) -> Tensor:
        return ops.gated(gate_up, self.dtype, self._buffer(len(gate_up), gate_up.shape[1] // 2, self.dtype))

    def _attention(
        self, qkv: Tensor, layer: Layer, index: int, angles: Angles, layout: Serving, cache: SlotCache
    ) -> Tensor:
        slots, aim = cache.layers[index], cache.aim
        out = torch.empty(len(qkv), self._heads * self._dim, dtype=self.dtype)
        # A prompt's tokens are tokens like others; only where they are many does a kernel in blocks pay.
        n = len(qkv) if max(layout.prompts.lengths, default=0) <= LONG_PROMPT else len(layout.positions)
        if n < len(qkv):
            prompts, rest = replace(layout, positions=layout.positions[:0]), (angles[0][n:], angles[1][n:])
            out[n:] = super()._attention(qkv[n:].to(self.dtype), layer, index, rest, prompts, cache)
        self._kernels.attend(
            self.dtype == torch.bfloat16, n, self._heads, self._kv_heads, self._dim, slots.keys.shape[2], qkv.data_ptr(),
            angles[0].data_ptr(), angles[1].data_ptr(), _pointer(layer.q_norm), _pointer(layer.k_norm), self._eps,
            slots.keys.data_ptr(), slots.values.data_ptr(), aim.rows.data_ptr(), aim.positions.data_ptr(),
            layer.window or 0, self._scale, out.data_ptr(),
        )  # fmt: skip
        return out


class Product(NamedTuple):
    """x (N, in) -> (N, out) in float32, over a weight in the layout of the kernels. x is in the weight's dtype."""

    buffer: Callable[[int, int], Tensor]
    weight: ops.Packed
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.product(x.contiguous(), self.weight, self.bias, self.buffer(len(x), self.weight.outputs))

    def add_to(self, total: Tensor, x: Tensor) -> None:
        ops.product(x.contiguous(), self.weight, self.bias, total, add=True)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
