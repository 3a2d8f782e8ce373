"""What the tests of the kernels in C share: inputs, bounds of rounding, and memory that notices stray writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid.models import native
from pellucid.models.native import ops

KERNELS: Any = native.load()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason=f"no kernels here: {native.why_not()}")
HAS_BFLOAT16 = KERNELS is not None and bool(KERNELS.has_bfloat16())
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor multiplies no bfloat16")
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=["float32", "bfloat16"]
)

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding a number once: half of its last place."""
SUM = 2e-6
"""Relative error that a float32 sum of some hundred terms may have, of the sum of their sizes."""
ZONE = 256
"""Bytes of guard before and behind what a kernel writes."""
GUARD, UNWRITTEN = 0xA5, 0xFF


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|found - expected| <= bound, element by element. found: any dtype; the others float64. A NaN is never within."""
    gap = (found.double() - expected).abs()
    excess = (gap - bound).nan_to_num(torch.inf)
    assert found.shape == expected.shape
    assert (gap <= bound).all(), f"{gap.flatten()[excess.argmax()]} at {excess.argmax()} of {found.shape}"


def stored(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of keeping these numbers in dtype. Below 1e-37 a processor may give 0."""
    return expected.abs() * ROUNDING[dtype] + 1e-37


def each_number_of_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert KERNELS.omp_get_max_threads() == threads, "the kernels have another OpenMP runtime than PyTorch"
            yield threads
    finally:
        torch.set_num_threads(before)


class Watched:
    """Stands for `torch` in `ops`: what it allocates lies between guards, and is NaN until somebody writes it."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.full((ZONE + size + ZONE,), GUARD, dtype=torch.uint8)
        memory[ZONE : ZONE + size] = UNWRITTEN
        self._made.append(memory)
        return memory[ZONE : ZONE + size].view(dtype).view(shape)

    def empty_like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(*x.shape, dtype=dtype or x.dtype)

    def copied(self, x: Tensor) -> Tensor:
        """For what a kernel adds to or overwrites."""
        return self.empty_like(x).copy_(x)

    def check(self) -> None:
        for memory in self._made:
            assert (memory[:ZONE] == GUARD).all() and (memory[-ZONE:] == GUARD).all(), "written outside of an output"
        self._made.clear()


def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """The body of a fixture: all memory of `ops` is watched during a test and checked after it."""
    memory = Watched()
    monkeypatch.setattr(ops, "torch", memory)
    yield memory
    memory.check()


def linear(weight: torch.Tensor) -> nn.Linear:
    """A layer of this weight (outputs, inputs), which becomes its parameter, without a bias."""
    module = nn.Linear(*weight.shape[::-1], bias=False)
    module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return module
