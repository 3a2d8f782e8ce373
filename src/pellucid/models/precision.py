"""Where a model runs, and how precisely."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from pellucid.errors import DataError

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Weights stay float32; in bfloat16 the products around them are rounded."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def resolve_device(device: str) -> str:
    """Raises DataError when CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("run.device is 'cuda', but PyTorch sees no CUDA device; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_precision(precision: str, device: str) -> Precision:
    """auto: bfloat16 where the hardware is faster at it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if precision != "auto":
        return precision
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else _cpu_has_bfloat16()
    return "bfloat16" if fast else "float32"


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
