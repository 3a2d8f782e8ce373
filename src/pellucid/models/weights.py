"""Weights that are trained, in the layout that the kernels in C read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pellucid.models import native
from pellucid.models.native import ops
from pellucid.models.precision import Precision


def kernel_dtype(device: torch.device, precision: Precision, *weights: Tensor) -> torch.dtype | None:
    """In what the kernels' products of these weights are, or None where there are no kernels for them."""
    kernels = native.load() if device.type == "cpu" else None
    if kernels is None or any(weight.dtype != torch.float32 for weight in weights):
        return None
    if precision == "float32":
        return torch.float32
    even = all(size % 2 == 0 for weight in weights for size in weight.shape)
    return torch.bfloat16 if kernels.has_bfloat16() and even else None


class Weight:
    """The weights of some linear layers, one below the other, in the layout of the kernels; made anew when they change."""

    def __init__(self, dtype: torch.dtype, *modules: nn.Linear) -> None:
        self.dtype, self.modules = dtype, modules
        self._packed: dict[bool, tuple[tuple[tuple[int, int], ...], ops.Packed]] = {}

    def packed(self, transposed: bool = False) -> ops.Packed:
        """For x . weight^T; transposed: for dy . weight."""
        parts = [module.weight.detach() for module in self.modules]
        state = tuple((part.data_ptr(), part._version) for part in parts)  # a detached tensor shares its version
        kept = self._packed.get(transposed)
        if kept is None or kept[0] != state:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            kept = (state, ops.pack(whole, self.dtype, transposed, out=kept and kept[1]))
            self._packed[transposed] = kept
        return kept[1]
