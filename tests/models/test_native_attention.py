"""Attention of sequences end to end and its gradient, against float64 autograd of a loop over sequences and heads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from native_kernels import (
    ROUNDING,
    SUM,
    assert_within,
    each_dtype,
    each_number_of_threads,
    needs_kernels,
    normal,
    stored,
    watched,
)
from torch import Tensor

from pellucid.models.native import ops

pytestmark = needs_kernels

LENGTHS = {
    "single tokens": (1, 1, 1),
    "short": (5, 1, 7, 2, 3),
    "a tile of queries": (11, 12, 13, 1),
    "a panel of keys": (31, 32, 33),
    "a block of queries": (95, 1, 96, 97),
    "several": (159, 160, 161),
}
"""The sequences' tokens: around what the kernel takes at once, on either kind of processor."""
DIMS = [8, 16, 20, 48, 64, 128]
TINY = 1e-30
"""Weights below e^-87 are 0 in the kernel."""


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    yield from watched(monkeypatch)


# ---------------------------------------------------------------- the reference, and how far rounding may lead from it


@dataclass
class Case:
    """One call. Everything is rounded to dtype already, and `expected...` calculates from that in float64."""

    dtype: torch.dtype
    heads: ops.Heads
    lengths: tuple[int, ...]
    spread: float = 1.0

    def __post_init__(self) -> None:
        n, (heads, kv_heads, dim, *_) = sum(self.lengths), self.heads
        self.qkv = (normal(n, heads + 2 * kv_heads, dim, seed=dim) * self.spread).to(self.dtype)
        self.dout = normal(n, heads * dim, seed=1, dtype=self.dtype)
        angles = normal(n, dim // 2, seed=2) * 3
        self.cos, self.sin, self.ends = angles.cos(), angles.sin(), torch.tensor(self.lengths).cumsum(0)

    def sequences(self):
        """(tokens, query head, key head, value head) of every sequence and head; heads as places in the rows of qkv."""
        heads, kv_heads, *_ = self.heads
        for end, length in zip(self.ends.tolist(), self.lengths, strict=True):
            for head in range(heads if length else 0):
                shared = heads + head // (heads // kv_heads)
                yield slice(end - length, end), head, shared, shared + kv_heads

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """-infinity where a token does not see another."""
        places, window = torch.arange(len(q)), self.heads.window
        distance = places[:, None] - places
        hidden = (distance < 0) | (distance >= window if window else torch.tensor(False))
        return (q @ k.T * self.heads.scale).masked_fill(hidden, -torch.inf)

    def attended(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs (N, heads, dim), log-norms (N, heads)) from float64, differentiable."""
        out, log_norms = torch.zeros_like(qkv[:, : self.heads.heads]), torch.zeros_like(qkv[:, : self.heads.heads, 0])
        for tokens, *places in self.sequences():
            q, k, v = (qkv[tokens, place] for place in places)
            scores = self.scores(q, k)
            out[tokens, places[0]] = scores.softmax(-1) @ v
            log_norms[tokens, places[0]] = scores.logsumexp(-1)
        return out, log_norms

    def turned_back(self, x: Tensor) -> Tensor:
        """Queries and keys turned back by their angles, as complex numbers; values as they are."""
        count, back = self.heads.heads + self.heads.kv_heads, torch.complex(self.cos.double(), -self.sin.double())
        turned = torch.complex(*x[:, :count].chunk(2, -1)) * back[:, None]
        return torch.cat([torch.cat([turned.real, turned.imag], -1), x[:, count:]], 1)

    def sums(self, weights: Tensor) -> float:
        """The relative error of sums of these scores' exponentials."""
        return SUM * (1 + weights.abs().max().item())

    def forward_bounds(self) -> tuple[Tensor, Tensor]:
        """Of the outputs and log-norms. In bfloat16 each weight is rounded once, before it meets its value."""
        qkv, (out, log_norms) = self.qkv.double(), self.attended(self.qkv.double())
        bound, of_norms = stored(out, self.dtype) + TINY, torch.zeros_like(log_norms)
        rounding = ROUNDING[self.dtype]
        for tokens, *places in self.sequences():
            q, k, v = (qkv[tokens, place] for place in places)
            sums = self.sums(q @ k.T * self.heads.scale)
            bound[tokens, places[0]] += (rounding + sums) * (self.scores(q, k).softmax(-1) @ v.abs())
            of_norms[tokens, places[0]] = sums
        return bound.flatten(1), of_norms

    def backward_bounds(self, out: Tensor) -> Tensor:
        """Of the gradient, before it is stored, where the kernel is given these rounded outputs."""
        bound = torch.full(self.qkv.shape, TINY, dtype=torch.float64)
        qkv, dout, exact = self.qkv.double(), self.dout.double().view(out.shape), self.attended(self.qkv.double())[0]
        rounding = ROUNDING[self.dtype]
        for tokens, head, key, value in self.sequences():
            q, k, v = (qkv[tokens, place] for place in (head, key, value))
            d, o = dout[tokens, head], exact[tokens, head]
            p, sums = self.scores(q, k).softmax(-1), self.sums(q @ k.T * self.heads.scale)
            along, of_along = (d * o).sum(-1, keepdim=True), (d.abs() * (out[tokens, head].double() - o).abs()).sum(-1)
            sizes = d.abs() @ v.abs().T + (d * o).abs().sum(-1, keepdim=True)
            ds = (p * (d @ v.T - along)).abs() * rounding + p * (sums * sizes + of_along[:, None])
            bound[tokens, head] += ds @ k.abs() * self.heads.scale
            bound[tokens, key] += ds.T @ q.abs() * self.heads.scale
            bound[tokens, value] += (rounding + sums) * p.T @ d.abs()
        half, cos, sin = self.heads.dim // 2, self.cos.double().abs()[:, None], self.sin.double().abs()[:, None]
        turned = bound[:, : -self.heads.kv_heads]
        first, second = turned[..., :half].clone(), turned[..., half:].clone()
        turned[..., :half], turned[..., half:] = first * cos + second * sin, second * cos + first * sin
        return bound


def check(case: Case) -> None:
    leaf = case.qkv.double().requires_grad_()
    out, log_norms = case.attended(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, case.dout.double().view(out.shape))
    of_out, of_norms = case.forward_bounds()
    found, found_norms = ops.packed_attention(case.qkv, case.heads, case.ends)
    assert found.dtype == case.dtype
    assert_within(found, out.detach().flatten(1), of_out)
    assert_within(found_norms, log_norms.detach(), of_norms)
    given = out.detach().to(case.dtype)
    dqkv = backward(case, given.flatten(1), log_norms.detach().float())
    expected = case.turned_back(gradient)
    assert dqkv.dtype == case.dtype
    assert_within(dqkv, expected, case.backward_bounds(given) + stored(expected, case.dtype))


def backward(case: Case, out: Tensor, log_norms: Tensor) -> Tensor:
    return ops.packed_attention_backward(case.dout, case.qkv, out, log_norms, case.heads, case.ends, case.cos, case.sin)


def both(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, log-norms, gradient), the gradient from what the forward pass gave."""
    out, log_norms = ops.packed_attention(case.qkv, case.heads, case.ends)
    return out, log_norms, backward(case, out, log_norms)


def heads_of(dim: int, window: int = 0) -> ops.Heads:
    heads, kv_heads = {8: (4, 2), 16: (4, 4), 20: (6, 1), 64: (6, 2)}.get(dim, (2, 1))
    return ops.Heads(heads, kv_heads, dim, window, dim**-0.5)


def part(case: Case, tokens: slice, lengths: tuple[int, ...]) -> Case:
    """Some of the sequences as a case of their own."""
    alone = Case(case.dtype, case.heads, lengths)
    for name in ("qkv", "dout", "cos", "sin"):
        setattr(alone, name, getattr(case, name)[tokens].clone())
    return alone


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
@each_dtype
def test_attention_and_its_gradient(dtype, dim, lengths):
    check(Case(dtype, heads_of(dim), lengths))


@pytest.mark.parametrize("window", [1, 2, 5, 12, 31, 32, 33, 96, 97, 500])
@pytest.mark.parametrize("dim", [16, 20])
@each_dtype
def test_a_window_hides_what_is_too_long_ago(dtype, dim, window):
    check(Case(dtype, heads_of(dim, window), (1, 5, 33, 98, 130)))


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (9, 3), (8, 8)], ids=str)
@each_dtype
def test_heads_that_share_keys(dtype, counts):
    check(Case(dtype, ops.Heads(*counts, 16, 0, 0.3), (3, 14, 33)))


@pytest.mark.parametrize("spread", [0.01, 4.0, 30.0])
@each_dtype
def test_small_and_large_scores(dtype, spread):
    """From weights that are all the same to one that takes everything."""
    check(Case(dtype, heads_of(16), (5, 33, 70), spread))


@each_dtype
def test_scores_beyond_the_exponentials_range_do_not_overflow(dtype):
    """The key of the largest score takes all."""
    case = Case(dtype, ops.Heads(2, 1, 16, 0, 1.0), (40, 7), spread=1e4)
    out, log_norms, gradient = both(case)
    assert gradient.isfinite().all() and log_norms.isfinite().all()
    expected, _ = case.attended(case.qkv.double())
    assert_within(out, expected.flatten(1), ROUNDING[dtype] * expected.flatten(1).abs() + 1e-6)


def test_sequences_without_tokens_add_nothing():
    for lengths in ((0, 5, 0, 0, 3, 0), (0,), ()):
        case = Case(torch.float32, heads_of(16), lengths)
        if sum(lengths):
            check(case)
        assert [len(found) for found in both(case)] == [sum(lengths)] * 3


# ---------------------------------------------------------------- what depends on what


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("dim", [20, 64])
@each_dtype
def test_a_sequence_alone_gives_the_same_bits_as_among_others(dtype, dim, window):
    case = Case(dtype, heads_of(dim, window), (33, 1, 12, 13, 97, 2, 160))
    whole = both(case)
    for end, length in zip(case.ends.tolist(), case.lengths, strict=True):
        tokens = slice(end - length, end)
        for alone, every in zip(both(part(case, tokens, (length,))), whole, strict=True):
            assert alone.equal(every[tokens]), length


@pytest.mark.parametrize("dim", [16, 20, 64])
@each_dtype
def test_attention_depends_on_no_thread(dtype, dim):
    case = Case(dtype, heads_of(dim), (33, 1, 12, 97, 40))
    first = both(case)
    for threads in each_number_of_threads():
        assert all(again.equal(one) for again, one in zip(both(case), first, strict=True)), threads


@each_dtype
def test_no_token_sees_a_later_one_or_another_sequence(dtype):
    case = Case(dtype, heads_of(16), (40, 61))
    out, log_norms = ops.packed_attention(case.qkv, case.heads, case.ends)
    for changed in (20, 39, 40, 41, 75):
        qkv = case.qkv.clone()
        qkv[changed] += 1
        places = torch.arange(101)
        same = (places < changed) | ((places >= 40) & (changed < 40))
        found, found_norms = ops.packed_attention(qkv, case.heads, case.ends)
        assert found[same].equal(out[same]) and found_norms[same].equal(log_norms[same])
        assert not found[changed].equal(out[changed])


# ---------------------------------------------------------------- numbers that are not finite


def sees(case: Case, token: int) -> Tensor:
    """(N,): which tokens see this one."""
    places, length = torch.arange(sum(case.lengths)), case.lengths[0]
    seen = (places >= token) & ((places < length) == (token < length))
    return seen & (places < token + case.heads.window) if case.heads.window else seen


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("token", [0, 13, 39, 40, 75])
@each_dtype
def test_a_nan_reaches_every_output_that_sees_it_and_no_other_head_or_sequence(dtype, token, window):
    """A value's NaN may also reach tokens before it in its own sequence, as 0 * NaN."""
    case = Case(dtype, ops.Heads(4, 2, 16, window, 0.25), (40, 61))
    clean = case.qkv.clone()
    own = (torch.arange(101) < 40) == (token < 40)
    for place, heads in ((1, [1]), (5, [2, 3]), (6, [0, 1])):  # a query, a key, a value
        case.qkv = clean.clone()
        case.qkv[token, place, 3] = torch.nan
        out, log_norms, gradient = both(case)
        found = out.view(101, 4, 16).isnan()
        reached = torch.arange(101) == token if place == 1 else sees(case, token)
        assert (found[reached][:, heads, 3]).all()
        touched = found.any(-1)
        assert not touched[~own].any() and not touched[:, [h for h in range(4) if h not in heads]].any()
        assert not touched[own & ~reached].any() or place == 6
        assert gradient[own].isnan().any() and gradient[~own].isfinite().all()
        assert log_norms.isnan()[reached][:, heads].all() or place == 6


@pytest.mark.parametrize("token", [0, 13, 39, 40, 100])
@each_dtype
def test_a_nan_of_the_upstream_gradient_reaches_what_made_the_output(dtype, token):
    case = Case(dtype, ops.Heads(4, 2, 16, 0, 0.25), (40, 61))
    case.dout[token, 2 * 16 + 3] = torch.nan  # head 2, whose keys are head 5 and values head 7
    found = both(case)[2].isnan()
    start = 0 if token < 40 else 40
    assert found[token, 2].all() and found[start : token + 1, 5].all() and found[start : token + 1, 7, 3].all()
    other = torch.ones(101, dtype=torch.bool)
    other[start : 40 if token < 40 else 101] = False
    assert not found[other].any() and not found[:, [0, 1, 3, 4, 6]].any()
