"""Norms, the gate and rotary positions, with their gradients, against float64 and each row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_kernels import (
    HAS_BFLOAT16,
    KERNELS,
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

WIDTHS = [1, 7, 8, 9, 15, 16, 17, 31, 33, 129]
"""Around the lanes of a vector, of either kind of processor."""
EPS = 1e-5
EXACT = 5e-7
"""Relative error of a handful of float32 operations, an exponential among them."""


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    yield from watched(monkeypatch)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("width", WIDTHS)
@each_dtype
def test_rms_norm(dtype, width):
    x, weight = normal(9, width) * torch.logspace(-3, 3, 9)[:, None], normal(width, seed=1)
    x[4] = 0
    expected = normed(x.double(), weight.double())
    out = ops.rms_norm(x, weight, EPS, dtype)
    assert_within(out, expected, EXACT * expected.abs() + stored(expected, dtype))
    assert not out[4].any()
    assert ops.rms_norm(x.view(3, 3, width), weight, EPS, dtype).equal(out.view(3, 3, width))
    for row in range(9):
        assert ops.rms_norm(x[row : row + 1], weight, EPS, dtype).equal(out[row : row + 1])


@pytest.mark.parametrize("width", [7, 33])
def test_rms_norm_in_place(width):
    x, weight = normal(9, width), normal(width, seed=1)
    expected = ops.rms_norm(x, weight, EPS)
    KERNELS.rms_norm(0, 9, width, x.data_ptr(), weight.data_ptr(), EPS, x.data_ptr())
    assert x.equal(expected)


@pytest.mark.parametrize("place", [0, 15, 16, 32])
@each_dtype
def test_a_nan_in_a_row_makes_the_norm_of_that_row_nan(dtype, place):
    x = normal(3, 33)
    x[1, place] = torch.nan
    found = ops.rms_norm(x, normal(33, seed=1), EPS, dtype).isnan()
    assert found[1].all() and found.sum() == 33


def norm_gradients(n: int, width: int, biggest: float = 1.0):
    """(dy, x, weight, onto), and the gradients of x and the weight in float64 with their bounds."""
    dy, weight, onto = normal(n, width), normal(width, seed=2), normal(n, width, seed=3)
    x = normal(n, width, seed=1) * torch.logspace(-2, 2, n)[:, None] * biggest
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    dx, dweight = torch.autograd.grad(normed(*leaves), leaves, dy.double())
    scale = 1 / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    along = (dy * weight * x).double().abs().sum(-1, keepdim=True) * scale**3 / width
    error = SUM * ((dy * weight).double().abs() * scale + x.double().abs() * along)
    return (dy, x, weight, onto), (dx, error), (dweight, SUM * (dy * x * scale).double().abs().sum(0))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 300])
def test_rms_norm_backward(n, width):
    (dy, x, weight, onto), (dx, error), (dweight, weight_error) = norm_gradients(n, width)
    found = ops.rms_norm_backward(dy, x, weight, EPS)
    assert_within(found[0], dx, error)
    assert_within(found[1], dweight, weight_error)
    found = ops.rms_norm_backward(dy, x, weight, EPS, onto)
    assert_within(found[0], dx + onto.double(), error + SUM * onto.double().abs())
    assert_within(found[1], dweight, weight_error)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rms_norm_backward_of_numbers_whose_cubes_are_out_of_range(size):
    (dy, x, weight, _), (dx, error), (dweight, weight_error) = norm_gradients(3, 33, size)
    found = ops.rms_norm_backward(dy, x, weight, EPS)
    assert_within(found[0], dx, error)
    assert_within(found[1], dweight, weight_error)


def test_rms_norm_backward_may_add_to_its_own_output():
    (dy, x, weight, onto), *_ = norm_gradients(300, 33)
    expected, dweight = ops.rms_norm_backward(dy, x, weight, EPS, onto)
    sums = torch.empty(KERNELS.rms_norm_chunks(300), 33)
    pointers = [tensor.data_ptr() for tensor in (dy, x, weight)]
    KERNELS.rms_norm_backward(300, 33, *pointers, EPS, onto.data_ptr(), onto.data_ptr(), sums.data_ptr())
    assert onto.equal(expected) and sums[0].equal(dweight)


@pytest.mark.parametrize("width", [9, 129])
def test_rms_norm_backward_depends_on_no_thread_and_a_row_on_no_other(width):
    (dy, x, weight, onto), *_ = norm_gradients(700, width)
    dx, dweight = ops.rms_norm_backward(dy, x, weight, EPS, onto)
    for row in (0, 127, 128, 699):
        alone = slice(row, row + 1)
        assert ops.rms_norm_backward(dy[alone], x[alone], weight, EPS, onto[alone])[0].equal(dx[alone])
    for threads in each_number_of_threads():
        again = ops.rms_norm_backward(dy, x, weight, EPS, onto)
        assert again[0].equal(dx) and again[1].equal(dweight), threads


@pytest.mark.parametrize("row", [0, 127, 128, 200])
def test_a_nan_reaches_its_row_and_its_columns_of_the_norms_gradient(row):
    (dy, x, weight, _), *_ = norm_gradients(201, 33)
    dy[row, 32] = torch.nan
    dx, dweight = (found.isnan() for found in ops.rms_norm_backward(dy, x, weight, EPS))
    assert dx[row].all() and dx.sum() == 33
    assert dweight.nonzero().tolist() == [[32]]
    dy[row, 32], x[row, 5] = 1, torch.nan
    dx, dweight = (found.isnan() for found in ops.rms_norm_backward(dy, x, weight, EPS))
    assert dx[row].all() and dx.sum() == 33
    assert dweight.all(), "the row's scale is in every column"


# ---------------------------------------------------------------- the gate

GATES = [(torch.float32, torch.float32)]
GATES += [(given, torch.bfloat16) for given in (torch.float32, torch.bfloat16) if HAS_BFLOAT16]
each_gate = pytest.mark.parametrize(("given", "dtype"), GATES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("width", WIDTHS)
@each_gate
def test_gate(memory, given, dtype, width):
    gate_up = (torch.cat([normal(9, width) * 5, normal(9, width, seed=1)], 1)).to(given)
    gate, up = gate_up.double().chunk(2, 1)
    expected = F.silu(gate) * up
    out = ops.gated(gate_up, dtype)
    assert_within(out, expected, 4 * EXACT * expected.abs() + stored(expected, dtype))
    for row in range(9):
        assert ops.gated(gate_up[row : row + 1], dtype).equal(out[row : row + 1])
    given_memory = memory.empty(9, width, dtype=dtype)
    assert ops.gated(gate_up, dtype, given_memory) is given_memory and given_memory.equal(out)


@pytest.mark.parametrize("width", [1, 16], ids=["one by one", "vectors"])
@pytest.mark.parametrize("gate", [0.0, -0.0, 1e-42, -1e-42, 86.9, -86.9, 88.0, -88.0, 200.0, -200.0, 3e38, -3e38])
@each_gate
def test_extreme_gates(given, dtype, gate, width):
    up = 2.0 if abs(gate) < 1e38 else 1.0
    gate_up = torch.tensor([[gate] * width + [up] * width]).to(given)
    out = ops.gated(gate_up, dtype)
    expected = F.silu(gate_up[:, :width].double()) * up
    assert_within(out, expected, 2 * EXACT * expected.abs() + stored(expected, dtype) + 1e-35)
    found = ops.gated_backward(torch.ones(1, width), gate_up)
    assert found[0].isfinite().all() and found[1].isfinite().all()


@each_gate
def test_a_gate_or_its_partner_that_is_nan_stays_nan(given, dtype):
    gate_up = normal(2, 66)
    gate_up[0, 5] = gate_up[0, 32] = gate_up[1, 33 + 6] = torch.nan
    gate_up = gate_up.to(given)
    gate, up = gate_up.isnan().chunk(2, 1)
    assert ops.gated(gate_up, dtype).isnan().equal(gate | up)


def test_the_exponential_is_exact_to_a_few_units():
    """silu(-x) = -x e^-x / (1 + e^-x), which for large x is the exponential itself."""
    x = torch.linspace(1, 87, 16 * 4001)[None]
    out = ops.gated(torch.cat([-x, torch.ones_like(x)], 1), torch.float32)
    assert_within(out, F.silu(-x.double()), 6e-7 * F.silu(-x.double()).abs())


@pytest.mark.parametrize("width", WIDTHS)
@each_dtype
def test_gated_backward(dtype, width):
    dout = normal(9, width, seed=2)
    gate_up = torch.cat([normal(9, width) * 5, normal(9, width, seed=1)], 1).to(dtype)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, 1)
    expected = F.silu(gate) * up
    (dgate_up,) = torch.autograd.grad(expected, leaf, dout.double())
    sizes = dout.double().abs() * gate.sigmoid()
    error = 4 * EXACT * torch.cat([sizes * up.abs() * (1 + gate.abs()), sizes * gate.abs()], 1)
    found, out = ops.gated_backward(dout, gate_up)
    assert_within(found, dgate_up, error + stored(dgate_up, dtype))
    assert_within(out, expected, 4 * EXACT * expected.abs() + stored(expected, dtype))
    for row in range(9):
        alone = slice(row, row + 1)
        assert ops.gated_backward(dout[alone], gate_up[alone])[0].equal(found[alone])


@each_dtype
def test_a_nan_stays_in_its_columns_of_the_gates_gradient(dtype):
    dout, gate_up = normal(3, 33, seed=2), normal(3, 66)
    dout[0, 5] = dout[0, 32] = gate_up[1, 6] = gate_up[2, 33 + 7] = torch.nan
    dgate, dup = ops.gated_backward(dout, gate_up.to(dtype))[0].isnan().chunk(2, 1)
    assert dgate.nonzero().tolist() == [[0, 5], [0, 32], [1, 6], [2, 7]]
    assert dup.nonzero().tolist() == [[0, 5], [0, 32], [1, 6]], "up itself is not in its gradient"


# ---------------------------------------------------------------- rotary positions and rounding


@pytest.mark.parametrize(("heads", "every", "dim"), [(1, 1, 2), (2, 3, 6), (6, 8, 8), (3, 5, 20), (4, 8, 64)])
@each_dtype
def test_rotated(memory, dtype, heads, every, dim):
    x, angles = normal(9, every, dim), normal(9, dim // 2, seed=1) * 3
    cos, sin = angles.cos(), angles.sin()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * turn
    expected = torch.cat([turned.real, turned.imag], -1)
    expected[:, heads:] = x[:, heads:].double()
    out = ops.rotated(memory.copied(x), heads, cos, sin, dtype)
    size = torch.cat([turned.abs()] * 2, -1)
    assert_within(out, expected, EXACT * size + stored(expected, dtype))
    assert out[:, heads:].equal(x[:, heads:].to(dtype))
    for row in range(9):
        alone = slice(row, row + 1)
        assert ops.rotated(x[alone].clone(), heads, cos[alone], sin[alone], dtype).equal(out[alone])


@each_dtype
def test_a_nan_turns_with_its_partner_and_spreads_no_further(dtype):
    x, angles = normal(3, 4, 8), normal(3, 4)
    x[1, 0, 2] = x[2, 3, 7] = torch.nan
    found = ops.rotated(x, 3, angles.cos(), angles.sin(), dtype).isnan()
    assert found.nonzero().tolist() == [[1, 0, 2], [1, 0, 6], [2, 3, 7]]


SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, 1 - 2**-9, -1 - 2**-8]
SPECIAL += [3.38e38, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 2.0**-126, 65504.0]
"""Ties, what is next to them, and the ends of bfloat16's range."""


@needs_bfloat16
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4095, 4096, 4097, 8200])
def test_rounding_is_to_nearest_with_ties_to_even(size):
    x = normal(size) * torch.logspace(-30, 30, size)
    count = min(size, len(SPECIAL))
    x[:count] = torch.tensor(SPECIAL[:count])
    x[-count:] = torch.tensor(SPECIAL[-count:])
    found, expected = ops.rounded(x.view(1, -1), torch.bfloat16)[0], x.bfloat16()
    assert found.isnan().equal(x.isnan())
    assert found[~x.isnan()].view(torch.int16).equal(expected[~x.isnan()].view(torch.int16))


def test_what_has_the_dtype_is_not_copied():
    x = normal(3, 4)
    assert ops.rounded(x, torch.float32) is x
    low = x.bfloat16()
    assert ops.rounded(low, torch.bfloat16) is low
