"""The kernels of a decode step: attention over the slot cache against a brute-force loop in float64, and sampling."""

from __future__ import annotations

import pytest
import torch
from native_kernels import (
    KERNELS,
    ROUNDING,
    SUM,
    Watched,
    assert_within,
    each_dtype,
    each_number_of_threads,
    needs_kernels,
    normal,
    stored,
)
from torch import Tensor

from pellucid.models import native
from pellucid.rollout.sampling import sample_tokens
from pellucid.types import SamplingParams

pytestmark = needs_kernels

ALMOST_ONE = 1 - 2**-53


# ---------------------------------------------------------------- attention

LENGTH, POSITIONS = 200, (0, 1, 62, 63, 64, 65, 130, 199)
"""A token at position p sees p + 1 keys: on both sides of the blocks of 64."""

SLOTS = (4, 2, 0, 7, 1, 8, 3, 6)
"""Of these tokens. Slot 5 takes no part."""


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Step:
    """The inputs of one call of `attend`. The cache is in dtype; the new token's queries, keys and values are float32."""

    eps = 1e-5

    def __init__(
        self, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int = 0, norms: bool = False,
        scale: float = 0.3, slots: tuple[int, ...] = SLOTS, positions: tuple[int, ...] = POSITIONS,
    ):  # fmt: skip
        n = len(slots)
        self.dtype, self.heads, self.kv_heads, self.dim = dtype, heads, kv_heads, dim
        self.window, self.scale = window, scale
        self.slots, self.positions = torch.tensor(slots), torch.tensor(positions)
        self.qkv = normal(n, heads + 2 * kv_heads, dim)
        angles = normal(n, dim // 2, seed=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.q_norm, self.k_norm = (normal(dim, seed=2), normal(dim, seed=3)) if norms else (None, None)
        self._memory = Watched()
        shape = 9, kv_heads, LENGTH, dim
        self.keys, self.values = (self._memory.copied(normal(*shape, seed=seed, dtype=dtype)) for seed in (4, 5))

    def places(self) -> list[tuple[int, tuple[int, int]]]:
        """(row, (slot, position)) of each token."""
        return list(enumerate(zip(self.slots.tolist(), self.positions.tolist(), strict=True)))

    def first(self, position: int) -> int:
        """The first column that a token at this position sees."""
        return max(0, position + 1 - self.window) if self.window else 0

    def run(self, rows: slice = slice(None)) -> Tensor:
        """(n, heads, dim). Writes the new keys and values into self.keys and self.values."""
        n = len(self.positions[rows])
        out = self._memory.empty(n, self.heads, self.dim, dtype=self.dtype)
        qkv, cos, sin = self._memory.copied(self.qkv[rows]), self.cos[rows], self.sin[rows]
        KERNELS.attend(
            self.dtype == torch.bfloat16, n, self.heads, self.kv_heads, self.dim, LENGTH, address(qkv), address(cos),
            address(sin), address(self.q_norm), address(self.k_norm), self.eps, address(self.keys),
            address(self.values), address(self.slots[rows]), address(self.positions[rows]), self.window, self.scale,
            address(out),
        )  # fmt: skip
        self._memory.check()
        return out

    def _placed(self, x: Tensor, weight: Tensor | None, row: int) -> Tensor:
        """A query or key (dim,), normed and rotated, in float64."""
        if weight is not None:
            x = x / (x.square().mean() + self.eps).sqrt() * weight.double()
        half = self.dim // 2
        first, second, cos, sin = x[:half], x[half:], self.cos[row].double(), self.sin[row].double()
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def query(self, row: int, head: int) -> Tensor:
        return self._placed(self.qkv[row, head].double(), self.q_norm, row)

    def expected_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values in float64 as they are to be after the step; new ones not yet rounded to the cache's dtype."""
        qkv, keys, values = self.qkv.double(), self.keys.double(), self.values.double()
        for row, (slot, position) in self.places():
            for head in range(self.kv_heads):
                keys[slot, head, position] = self._placed(qkv[row, self.heads + head], self.k_norm, row)
                values[slot, head, position] = qkv[row, self.heads + self.kv_heads + head]
        return keys, values

    def expected(self) -> tuple[Tensor, Tensor]:
        """(outputs, their bound) over the cache as it is, one head at a time."""
        keys, values = self.keys.double(), self.values.double()
        out = torch.empty(len(self.slots), self.heads, self.dim, dtype=torch.float64)
        bound = torch.empty_like(out)
        for row, (slot, position) in self.places():
            for head in range(self.heads):
                shared, seen = head * self.kv_heads // self.heads, slice(self.first(position), position + 1)
                query, k, v = self.query(row, head), keys[slot, shared, seen], values[slot, shared, seen]
                weights = (k @ query * self.scale).softmax(0)
                sizes = (k.abs() @ query.abs()).max() * self.scale
                out[row, head], bound[row, head] = weights @ v, SUM * (1 + sizes) * (weights @ v.abs())
        return out, bound + stored(out, self.dtype)


def assert_right(step: Step) -> None:
    keys, values = step.expected_cache()
    found = step.run()
    for ours, expected, error in ((step.keys, keys, 1e-5), (step.values, values, 0)):
        known = expected.isfinite()
        assert ours.isfinite().equal(known)
        assert_within(ours[known], expected[known], error + stored(expected[known], step.dtype))
    assert_within(found, *step.expected())


@pytest.mark.parametrize("norms", [False, True], ids=["", "q and k norms"])
@pytest.mark.parametrize("window", [0, 1, 6, 64, 100])
@pytest.mark.parametrize("dim", [8, 16, 20, 48, 64, 80, 128])
@each_dtype
def test_attention(dtype, dim, window, norms):
    heads, kv_heads = {16: (4, 4), 20: (6, 1), 64: (9, 3)}.get(dim, (4, 2))
    step = Step(dtype, heads, kv_heads, dim, window, norms, scale=dim**-0.5)
    for slot, position in zip(SLOTS, POSITIONS, strict=True):  # what may not be read
        for cached in (step.keys, step.values):
            cached[slot, :, position:] = torch.nan
            cached[slot, :, : step.first(position)] = torch.nan
    assert_right(step)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("threads", [1, 2])
@each_dtype
def test_attention_of_prompts_beside_slots(dtype, window, threads):
    """Tokens of one slot see each other's keys, whichever thread wrote them."""
    slots, positions = (0, 1) + (3,) * 70 + (2,) * 5, (7, 150, *range(70), *range(5))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_right(Step(dtype, 4, 2, 16, window, slots=slots, positions=positions))
    finally:
        torch.set_num_threads(before)


@each_dtype
def test_attention_writes_one_column_of_the_cache(dtype):
    step = Step(dtype, 4, 2, 16)
    before = step.keys.clone(), step.values.clone()
    step.run()
    wanted = sorted([slot, h, position] for slot, position in zip(SLOTS, POSITIONS, strict=True) for h in range(2))
    for old, new in zip(before, (step.keys, step.values), strict=True):
        assert (old != new).any(-1).nonzero().tolist() == wanted


@pytest.mark.parametrize("dim", [20, 64])
@each_dtype
def test_attention_of_a_row_depends_on_no_other_row_and_no_thread(dtype, dim):
    whole = Step(dtype, 6, 2, dim, norms=True).run()
    for row in range(len(POSITIONS)):
        assert Step(dtype, 6, 2, dim, norms=True).run(slice(row, row + 1)).equal(whole[row : row + 1])
    for threads in each_number_of_threads():
        assert Step(dtype, 6, 2, dim, norms=True).run().equal(whole), threads


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("column", [0, 5, 63, 64, 100, 129])
@each_dtype
def test_a_nan_in_the_cache_reaches_the_heads_that_read_it(dtype, column, what):
    step = Step(dtype, 4, 2, 16)
    row = POSITIONS.index(130)
    getattr(step, what)[SLOTS[row], 1, column, 3] = torch.nan
    out = step.run()
    poisoned = out[row, 2:] if what == "keys" else out[row, 2:, 3]
    assert poisoned.isnan().all()
    assert out.isnan().sum() == poisoned.numel()


@pytest.mark.parametrize(("place", "heads"), [(1, [1]), (4, [0, 1]), (7, [2, 3])], ids=["query", "key", "value"])
@each_dtype
def test_a_nan_in_the_new_token_reaches_its_heads(dtype, place, heads):
    step = Step(dtype, 4, 2, 16)
    step.qkv[3, place] = torch.nan
    assert step.run().isnan().any(-1).nonzero().tolist() == [[3, head] for head in heads]


@pytest.mark.parametrize("size", [1e3, 1e15])
@each_dtype
def test_large_scores_do_not_overflow(dtype, size):
    """The key of the largest score takes all."""
    step = Step(dtype, 2, 2, 16, scale=1.0)
    step.qkv *= size
    step.keys *= size
    out = step.run()
    for row, (slot, position) in step.places():
        for head in range(2):
            best = (step.keys.double()[slot, head, : position + 1] @ step.query(row, head)).argmax()
            value = step.values[slot, head, best].double()
            assert_within(out[row, head], value, (1e-6 + ROUNDING[dtype]) * value.abs() + 1e-6)


# ---------------------------------------------------------------- sampling


def sample_both(monkeypatch, logits, uniforms, **params):
    """(tokens, logprobs) of the kernel, and of PyTorch."""
    given = logits, torch.tensor(uniforms, dtype=torch.float64), SamplingParams(1, **params)
    ours = sample_tokens(*given)
    with monkeypatch.context() as patch:
        patch.setattr(native, "load", lambda: None)
        return ours, sample_tokens(*given)


def random_uniforms(n: int) -> list[float]:
    some = torch.rand(n - 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return [0.0, 1e-300, 0.5, 0.999999999, ALMOST_ONE, *some.tolist()]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 97, 128, 4096, 50257])
def test_sampling(monkeypatch, size, temperature):
    uniforms = random_uniforms(20)
    logits = normal(20, size) * 3 + 20
    (tokens, logprobs), (theirs, their_logprobs) = sample_both(monkeypatch, logits, uniforms, temperature=temperature)
    every = (logits.double() / temperature).log_softmax(-1)
    assert_within(logprobs, every.gather(1, tokens[:, None])[:, 0], 1e-5)
    cdf = every.exp().cumsum(-1)
    slack = 1e-6  # of the sums, in float32
    for row, (u, token) in enumerate(zip(uniforms, tokens.tolist(), strict=True)):
        assert u < cdf[row, token] + slack
        assert token == 0 or cdf[row, token - 1] <= u + slack
        if token == theirs[row]:
            torch.testing.assert_close(logprobs[row], their_logprobs[row], atol=1e-5, rtol=0)
        else:  # on the edge of two tokens
            assert (cdf[row] - u).abs().min() < slack
    assert (tokens == theirs).sum() >= 18


@pytest.mark.parametrize("size", [2, 63, 64, 65, 200, 1000])
def test_a_logit_of_minus_infinity_is_never_sampled(monkeypatch, size):
    hidden = torch.rand(40, size, generator=torch.Generator().manual_seed(size)) < 0.7
    hidden[:10, : size // 2] = True  # whole blocks at the front
    hidden[10:20, size // 2 :] = True  # and at the end
    hidden[20:30] = True  # all but one
    hidden[torch.arange(40), (torch.arange(40) * 37) % size] = False
    logits = normal(40, size).masked_fill(hidden, -torch.inf)
    for u in (0.0, 1e-300, 0.3, 0.999999999, ALMOST_ONE):
        (tokens, logprobs), (theirs, _) = sample_both(monkeypatch, logits, [u] * 40)
        assert not hidden[torch.arange(40), tokens].any()
        assert logprobs.isfinite().all() and (logprobs < 1e-5).all()
        assert tokens.equal(theirs)


def test_sampling_a_row_does_not_depend_on_its_neighbours(monkeypatch):
    logits, uniforms = normal(20, 4096), random_uniforms(20)
    (tokens, logprobs), _ = sample_both(monkeypatch, logits, uniforms)
    for row in range(20):
        (token, logprob), _ = sample_both(monkeypatch, logits[row : row + 1], [uniforms[row]])
        assert token == tokens[row] and logprob.equal(logprobs[row : row + 1])


@pytest.mark.parametrize("places", [[0], [1], [63], [64], [99], [0, 99], list(range(100))], ids=str)
def test_a_nan_among_the_logits_is_a_nan_log_prob_of_some_token(monkeypatch, places):
    logits = normal(5, 100)
    logits[:, places] = torch.nan
    for tokens, logprobs in sample_both(monkeypatch, logits, [0.0, 0.2, 0.5, 0.9, ALMOST_ONE]):
        assert logprobs.isnan().all()
        assert (tokens >= 0).all() and (tokens < 100).all()
