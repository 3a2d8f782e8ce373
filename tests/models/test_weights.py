"""Packed copies of weights: when there are any, and that they are never of another moment."""

from __future__ import annotations

import pytest
import torch
from native_kernels import HAS_BFLOAT16, each_dtype, linear, needs_kernels, normal
from torch import nn

from pellucid.config import OptimizerConfig
from pellucid.execution.learner import Learner
from pellucid.models import native
from pellucid.models.native import ops
from pellucid.models.weights import Weight, kernel_dtype

CPU = torch.device("cpu")


def unpacked(weight: Weight, transposed: bool = False) -> torch.Tensor:
    packed = weight.packed(transposed)
    return ops.product(torch.eye(packed.inputs, dtype=packed.dtype), packed).T


@needs_kernels
def test_the_dtype_of_products():
    even, odd = normal(4, 6), normal(5, 6)
    low = torch.bfloat16 if HAS_BFLOAT16 else None
    assert kernel_dtype(CPU, "float32", even, odd) == torch.float32
    assert kernel_dtype(CPU, "bfloat16", even) == low
    assert kernel_dtype(CPU, "bfloat16", even, odd) is None, "bfloat16 is multiplied in pairs, in both directions"
    assert kernel_dtype(CPU, "float32", even, odd.double()) is None
    assert kernel_dtype(CPU, "bfloat16", even.bfloat16()) is None
    assert kernel_dtype(torch.device("cuda"), "float32", even) is None


def test_without_kernels_there_is_no_dtype(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    assert kernel_dtype(CPU, "float32", normal(4, 6)) is None


@needs_kernels
def test_a_processor_without_bfloat16_products_has_float32_alone(monkeypatch):
    class Without:
        def has_bfloat16(self) -> int:
            return 0

    monkeypatch.setattr(native, "load", Without)
    assert kernel_dtype(CPU, "float32", normal(4, 6)) == torch.float32
    assert kernel_dtype(CPU, "bfloat16", normal(4, 6)) is None


@needs_kernels
@each_dtype
def test_weights_lie_one_below_the_other(dtype):
    parts = [nn.Parameter(normal(rows, 6, seed=rows)) for rows in (4, 2, 40)]
    weight, whole = Weight(dtype, *map(linear, parts)), torch.cat(list(parts)).detach().to(dtype).float()
    assert unpacked(weight).equal(whole)
    assert unpacked(weight, transposed=True).equal(whole.T)


@needs_kernels
@each_dtype
def test_packing_happens_once_for_each_change(monkeypatch, dtype):
    calls, pack = [], ops.pack
    monkeypatch.setattr(ops, "pack", lambda *args, **kwargs: calls.append(1) or pack(*args, **kwargs))
    parts = [nn.Parameter(normal(4, 6)), nn.Parameter(normal(2, 6, seed=1))]
    weight = Weight(dtype, *map(linear, parts))
    assert not calls
    addresses = set()
    for change in range(3):
        with torch.no_grad():
            parts[change % 2].mul_(2)
        for transposed in (False, True, False, True):
            addresses.add(weight.packed(transposed).panels.data_ptr())
        assert len(calls) == 2 * (change + 1)
    assert len(addresses) == 2, "in the same memory each time"


def move(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone() + 1


def write(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter[1, 3] += 1


def load(parameter: nn.Parameter) -> None:
    linear(parameter).load_state_dict({"weight": parameter.detach() * 2})


def learn(parameter: nn.Parameter) -> None:
    parameter.grad = normal(4, 6, seed=3)
    Learner("actor", linear(parameter), OptimizerConfig(lr=0.1), 10).step()


@needs_kernels
@pytest.mark.parametrize("change", [move, write, load, learn])
@each_dtype
def test_every_change_is_seen(dtype, change):
    first, second = nn.Parameter(normal(4, 6)), nn.Parameter(normal(2, 6, seed=1))
    weight = Weight(dtype, linear(first), linear(second))
    before = [unpacked(weight, transposed) for transposed in (False, True)]
    change(first)
    whole = torch.cat([first, second]).detach().to(dtype).float()
    assert not whole.equal(before[0])
    assert unpacked(weight).equal(whole) and unpacked(weight, transposed=True).equal(whole.T)


@needs_kernels
@each_dtype
def test_another_parameter_in_a_module_is_seen(dtype):
    module = linear(normal(4, 6))
    weight = Weight(dtype, module)
    weight.packed()
    module.weight = nn.Parameter(normal(4, 6, seed=5))
    assert unpacked(weight).equal(module.weight.detach().to(dtype).float())
