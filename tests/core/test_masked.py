"""Masked means, whitening, aggregation: hand cases, loops from the formulas, garbage behind the mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core import aggregate, masked_mean, masked_whiten
from pellucid.core.masked import exp_where_used, square_where_used, times_where_used

NAN, INF = math.nan, math.inf
FAST = settings(max_examples=40, deadline=None)


@st.composite
def masked_tensors(draw):
    """(x, mask): random ragged rows, at least one token masked in, garbage where masked out."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    number = st.floats(-10, 10, allow_subnormal=False)
    x = [[draw(number) for _ in range(columns)] for _ in range(rows)]
    mask = [[draw(st.booleans()) for _ in range(columns)] for _ in range(rows)]
    mask[draw(st.integers(0, rows - 1))][draw(st.integers(0, columns - 1))] = True
    garbage = draw(st.sampled_from([0.0, NAN, INF, -INF]))
    x = [[v if m else garbage for v, m in zip(xs, ms, strict=True)] for xs, ms in zip(x, mask, strict=True)]
    return torch.tensor(x, dtype=torch.float64), torch.tensor(mask)


def kept_rows(x, mask):
    pairs = zip(x.tolist(), mask.tolist(), strict=True)
    return [[v for v, m in zip(xs, ms, strict=True) if m] for xs, ms in pairs]


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, NAN], [INF, 6.0, 9.0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    # (1 + 2 + 6 + 9) / 4 = 4.5; rows: 3/2, 15/2
    assert masked_mean(x, mask).item() == 4.5
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 7.5]


@FAST
@given(masked_tensors())
def test_masked_mean_equals_a_loop(case):
    x, mask = case
    kept = [v for row in kept_rows(x, mask) for v in row]
    assert masked_mean(x, mask).item() == pytest.approx(sum(kept) / len(kept), abs=1e-12)


def test_masked_mean_refuses_nothing_to_average():
    with pytest.raises(ValueError, match="nothing to average"):
        masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="along dim 1"):
        masked_mean(torch.ones(2, 2), torch.tensor([[True, True], [False, False]]), dim=1)


def test_masked_whiten_by_hand():
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    # mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5, so 1 -> -3 / sqrt(5)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(masked_whiten(x, mask), expected, rtol=1e-8, atol=1e-8)
    unshifted = torch.where(mask, expected + 4, 0)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), unshifted, rtol=1e-8, atol=1e-8)


@FAST
@given(masked_tensors(), st.booleans())
def test_masked_whiten_equals_a_loop(case, shift_mean):
    x, mask = case
    kept = [v for row in kept_rows(x, mask) for v in row]
    mean = sum(kept) / len(kept)
    scale = math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept) + 1e-8)
    whitened = masked_whiten(x, mask, shift_mean)
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        expected = (x[b, t].item() - mean) / scale + (0 if shift_mean else mean) if mask[b, t] else 0.0
        assert whitened[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_whitening_equal_numbers_gives_zero_not_amplified_rounding():
    x = torch.full((64, 33), 1000.1)
    assert masked_whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-6


def test_whitening_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        masked_whiten(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


AGGREGATE_X = [[1.0, 2.0, 3.0], [10.0, NAN, INF], [NAN, NAN, NAN]]
AGGREGATE_MASK = [[True, True, True], [True, False, False], [False, False, False]]


@pytest.mark.parametrize(
    ("mode", "denominator", "expected"),
    [
        ("token", None, 4.0),  # (1 + 2 + 3 + 10) / 4 tokens
        ("token", 8, 2.0),  # 16 / 8
        ("sequence", None, 6.0),  # (6/3 + 10/1) / 2 sequences that have tokens
        ("sequence", 3, 4.0),  # 12 / 3
        ("constant", 32.0, 0.5),  # 16 / 32
        ("constant", torch.tensor(4), 4.0),
    ],
)
def test_aggregate_by_hand(mode, denominator, expected):
    loss = aggregate(torch.tensor(AGGREGATE_X), torch.tensor(AGGREGATE_MASK), mode, denominator)
    assert loss.item() == expected


@FAST
@given(masked_tensors(), st.sampled_from(["token", "sequence"]), st.sampled_from([None, 7.0]))
def test_aggregate_equals_a_loop(case, mode, denominator):
    x, mask = case
    rows = [row for row in kept_rows(x, mask) if row]
    if mode == "token":
        total, count = sum(sum(row) for row in rows), sum(len(row) for row in rows)
    else:
        total, count = sum(sum(row) / len(row) for row in rows), len(rows)
    assert aggregate(x, mask, mode, denominator).item() == pytest.approx(total / (denominator or count), abs=1e-12)


def test_aggregate_takes_one_loss_per_pair():
    assert aggregate(torch.tensor([1.0, 5.0]), torch.tensor([True, True]), "token").item() == 3.0
    with pytest.raises(ValueError, match=r"needs shape \(B,T\)"):
        aggregate(torch.tensor([1.0, 5.0]), torch.tensor([True, True]), "sequence")


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_aggregate_refuses_an_empty_mask_unless_the_denominator_is_given(mode):
    x, nothing = torch.full((2, 3), NAN, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="the mask is empty"):
        aggregate(x, nothing, mode)
    loss = aggregate(x, nothing, mode, denominator=5)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None and x.grad.eq(0).all()


@pytest.mark.parametrize("denominator", [0, -1, NAN, INF, torch.tensor(0)])
def test_aggregate_refuses_a_denominator_that_is_no_count(denominator):
    with pytest.raises(ValueError, match="finite number above 0"):
        aggregate(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), "token", denominator)


def test_aggregate_refuses_unknown_modes_missing_denominators_and_other_shapes():
    x, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="'token', 'sequence' or 'constant'"):
        aggregate(x, mask, "mean")
    with pytest.raises(ValueError, match="needs a denominator"):
        aggregate(x, mask, "constant")
    with pytest.raises(ValueError, match=r"per_token \(1, 2\), mask \(2,\)"):
        aggregate(x, mask[0], "token")


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_a_mask_of_numbers_means_the_same_as_one_of_booleans(mode):
    x, mask = torch.tensor(AGGREGATE_X), torch.tensor(AGGREGATE_MASK)
    expected = aggregate(x, mask, mode, 8)
    assert aggregate(x, mask.float(), mode, 8) == expected
    assert aggregate(x, mask.long(), mode, 8) == expected


def test_gradients_of_mean_whitening_and_aggregation():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def at(kept):
        return torch.full((2, 3), NAN, dtype=torch.float64).masked_scatter(mask, kept)

    kept = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: masked_mean(at(k), mask), kept)
    assert torch.autograd.gradcheck(lambda k: masked_mean(at(k), mask, dim=1), kept)
    assert torch.autograd.gradcheck(lambda k: masked_whiten(at(k), mask), kept)
    for mode in ("token", "sequence", "constant"):
        assert torch.autograd.gradcheck(lambda k, mode=mode: aggregate(at(k), mask, mode, 3.0), kept)


def test_garbage_behind_the_mask_gets_gradient_zero():
    mask = torch.tensor([[True, True, False, False]])
    for reduce in (
        lambda x: masked_mean(x, mask),
        lambda x: masked_whiten(x, mask).square().sum(),
        lambda x: aggregate(x, mask, "token"),
        lambda x: aggregate(x, mask, "sequence"),
    ):
        x = torch.tensor([[1.0, 2.0, NAN, INF]], requires_grad=True)
        (grad,) = torch.autograd.grad(reduce(x), x)
        assert grad.isfinite().all()
        assert grad[0, 2:].tolist() == [0.0, 0.0]


def test_where_used_arithmetic_has_the_usual_value_and_gradient():
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(exp_where_used(x), x.exp())
    torch.testing.assert_close(times_where_used(x, factor), x * factor)
    torch.testing.assert_close(square_where_used(x), x * x)
    assert torch.autograd.gradcheck(exp_where_used, x)
    assert torch.autograd.gradcheck(lambda x: times_where_used(x, factor), x)
    assert torch.autograd.gradcheck(square_where_used, x)


def test_where_used_arithmetic_is_silent_where_unused_and_loud_where_used():
    x = torch.tensor([NAN, INF, 1000.0, 1.0], requires_grad=True)
    unused = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for function in (exp_where_used, square_where_used, lambda x: times_where_used(x, torch.full((4,), NAN))):
        (grad,) = torch.autograd.grad(function(x), x, grad_outputs=unused)
        assert grad[:3].tolist() == [0.0, 0.0, 0.0]
        (grad,) = torch.autograd.grad(function(x), x, grad_outputs=torch.ones(4))
        assert not grad[0].isfinite()
