"""Products over packed weights, and the gradient of a weight, against float64."""

from __future__ import annotations

import pytest
import torch
from native_kernels import (
    SUM,
    assert_within,
    each_dtype,
    each_number_of_threads,
    needs_bfloat16,
    needs_kernels,
    normal,
    stored,
    watched,
)

from pellucid.models.native import ops

pytestmark = needs_kernels

SIZES = [(1, 2), (5, 4), (16, 8), (17, 34), (32, 6), (33, 64), (61, 130)]
"""(outputs, inputs) of a product: smaller than a panel of columns, exactly one, and no multiple of it."""
ODD_SIZES = [(1, 1), (5, 3), (17, 33)]
"""Depths that only float32 has, since bfloat16 is multiplied in pairs."""
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 19, 69, 70, 119, 120, 121, 250]
"""On both sides of each tile and of the band of rows that goes over the panels at once."""
OUTPUTS = {torch.float32: [torch.float32], torch.bfloat16: [torch.float32, torch.bfloat16]}
"""In what a product of each dtype may be stored."""


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    yield from watched(monkeypatch)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double()


def check_product(memory, dtype, outputs, inputs, biased, rows) -> None:
    weight, bias = normal(outputs, inputs, seed=1), normal(outputs, seed=2) if biased else None
    packed, rounded = ops.pack(weight, dtype), wide(weight.to(dtype))
    shift = torch.zeros(outputs) if bias is None else bias
    for m in rows:
        x = normal(m, inputs, seed=m, dtype=dtype)
        expected = wide(x) @ rounded.T + wide(shift)
        error = SUM * (wide(x).abs() @ rounded.abs().T + wide(shift).abs())
        for out in OUTPUTS[dtype]:
            assert_within(ops.product(x, packed, bias, dtype=out), expected, error + stored(expected, out))
            onto = memory.copied(normal(m, outputs, seed=3, dtype=out))
            total = expected + wide(onto)
            bound = error + SUM * wide(onto).abs() + stored(total, out)
            assert ops.product(x, packed, bias, onto, add=True) is onto
            assert_within(onto, total, bound)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@each_dtype
def test_product(memory, dtype, outputs, inputs, biased):
    check_product(memory, dtype, outputs, inputs, biased, [*range(1, 50), *ROWS[-6:]])


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), ODD_SIZES)
def test_product_of_an_odd_depth(memory, outputs, inputs, biased):
    check_product(memory, torch.float32, outputs, inputs, biased, ROWS)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@each_dtype
def test_a_row_of_a_product_depends_on_no_other_row_and_no_thread(dtype, outputs, inputs):
    x, weight, bias = normal(250, inputs, dtype=dtype), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    packed = ops.pack(weight, dtype)
    for out in OUTPUTS[dtype]:
        start = normal(250, outputs, seed=3, dtype=out)
        for given in (None, bias):
            whole = ops.product(x, packed, given, start.clone(), add=True)
            for m in ROWS:
                assert ops.product(x[-m:], packed, given, start[-m:].clone(), add=True).equal(whole[-m:]), m
            for threads in each_number_of_threads():
                again = ops.pack(weight, dtype)
                assert ops.product(x, again, given, start.clone(), add=True).equal(whole), threads


@each_dtype
def test_a_product_may_go_into_memory_that_is_there(memory, dtype):
    x, packed = normal(7, 34, dtype=dtype), ops.pack(normal(17, 34, seed=1), dtype)
    out = memory.empty(7, 17)
    assert ops.product(x, packed, out=out) is out
    assert out.equal(ops.product(x, packed))


@each_dtype
def test_a_product_without_rows(dtype):
    packed = ops.pack(normal(17, 34), dtype)
    assert ops.product(torch.empty(0, 34, dtype=dtype), packed).shape == (0, 17)
    assert ops.product(torch.empty(0, 34, dtype=dtype), packed, normal(17)).shape == (0, 17)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@each_dtype
def test_a_number_that_is_not_finite_reaches_its_row_or_column_and_no_other(dtype, wrong):
    outputs, inputs, rows = 61, 34, 15
    for place in ((0, 0), (13, 33), (14, 16)):
        x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, seed=1)
        x[place] = wrong
        found = ops.product(x, ops.pack(weight, dtype)).isfinite()
        assert not found[place[0]].any() and found.sum() == (rows - 1) * outputs
        x, weight[place] = normal(rows, inputs, dtype=dtype), wrong
        found = ops.product(x, ops.pack(weight, dtype)).isfinite()
        assert not found[:, place[0]].any() and found.sum() == rows * (outputs - 1)


# ---------------------------------------------------------------- packing


def unpacked(packed: ops.Packed) -> torch.Tensor:
    """(outputs, inputs), exactly: the product of the identity with it."""
    return ops.product(torch.eye(packed.inputs, dtype=packed.dtype), packed).T


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@each_dtype
def test_a_packed_weight_is_the_weight_rounded_to_its_dtype(dtype, outputs, inputs):
    weight = normal(outputs, inputs)
    assert unpacked(ops.pack(weight, dtype)).equal(weight.to(dtype).float())


@each_dtype
def test_packing_rounds_to_nearest_with_ties_to_even(dtype):
    special = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, 1 - 2**-9, -1 - 2**-8, 3e38, -3e38, 1e-30]])
    assert unpacked(ops.pack(special, dtype)).equal(special.to(dtype).float())


@pytest.mark.parametrize(("outputs", "inputs"), SIZES[1:])
@each_dtype
def test_transposed_packing_is_packing_of_the_transpose(dtype, outputs, inputs):
    weight = normal(outputs, inputs)
    packed = ops.pack(weight.T.contiguous(), dtype, transposed=True)
    assert (packed.outputs, packed.inputs) == (outputs, inputs)
    assert unpacked(packed).equal(weight.to(dtype).float())


@each_dtype
def test_packing_reads_a_weight_with_any_strides(dtype):
    whole = normal(34, 80)
    for weight in (whole.T, whole[:, 7:41], whole[::2, ::2], whole[1:].T):
        for transposed in (False, True):
            expected = (weight.T if transposed else weight).to(dtype).float()
            if expected.shape[1] % 2 and dtype == torch.bfloat16:
                continue
            assert unpacked(ops.pack(weight, dtype, transposed)).equal(expected)


@each_dtype
def test_packing_into_the_memory_of_another_leaves_nothing_of_it(dtype):
    first = ops.pack(torch.full((17, 34), torch.nan), dtype)
    weight = normal(17, 34)
    second = ops.pack(weight, dtype, out=first)
    assert second.panels.data_ptr() == first.panels.data_ptr()
    assert unpacked(second).equal(weight.to(dtype).float())


@needs_bfloat16
def test_a_packed_bfloat16_weight_takes_half_the_bytes():
    sizes = [ops.pack(normal(64, 96), dtype).panels.nbytes for dtype in (torch.float32, torch.bfloat16)]
    assert sizes == [4 * 64 * 96, 2 * 64 * 96]


@each_dtype
def test_a_product_refuses_inputs_that_are_not_the_weights(dtype):
    packed, other = ops.pack(normal(17, 34), dtype), {torch.float32: torch.bfloat16}.get(dtype, torch.float32)
    for x in (normal(3, 34, dtype=other), normal(3, 32, dtype=dtype), normal(34, 3, dtype=dtype).T):
        with pytest.raises(AssertionError):
            ops.product(x, packed)


# ---------------------------------------------------------------- the gradient of a weight

SHAPES = [(1, 1), (7, 31), (47, 32), (48, 33), (49, 64), (97, 20), (130, 97)]
"""(outputs, inputs): around a group of outputs and a panel of inputs."""
TOKENS = [1, 2, 3, 12, 31, 255, 256, 257, 515]
"""On both sides of the tokens that are summed at once."""


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@each_dtype
def test_weight_gradient(memory, dtype, outputs, inputs):
    for n in TOKENS:
        dy, x = normal(n, outputs, seed=n, dtype=dtype), normal(n, inputs, seed=n + 1, dtype=dtype)
        expected, error = wide(dy).T @ wide(x), SUM * wide(dy).abs().T @ wide(x).abs()
        assert_within(ops.weight_gradient(dy, x), expected, error)
        start = normal(outputs, inputs, seed=3)
        onto = memory.copied(start)
        assert ops.weight_gradient(dy, x, onto) is onto
        assert_within(onto, expected + wide(start), error + SUM * wide(start).abs())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@each_dtype
def test_a_weight_gradient_depends_on_no_thread(dtype, outputs, inputs):
    for n in (5, 257, 515):
        dy, x = normal(n, outputs, dtype=dtype), normal(n, inputs, seed=1, dtype=dtype)
        first = ops.weight_gradient(dy, x)
        for threads in each_number_of_threads():
            assert ops.weight_gradient(dy, x).equal(first), threads


@pytest.mark.parametrize("token", [0, 255, 256, 299])
@each_dtype
def test_a_nan_reaches_the_row_or_column_of_the_weight_gradient(dtype, token):
    dy, x = normal(300, 50, dtype=dtype), normal(300, 40, seed=1, dtype=dtype)
    dy[token, 49] = torch.nan
    found = ops.weight_gradient(dy, x).isnan()
    assert found[49].all() and found.sum() == 40
    dy[token, 49], x[token, 39] = 1, torch.nan
    found = ops.weight_gradient(dy, x).isnan()
    assert found[:, 39].all() and found.sum() == 50
