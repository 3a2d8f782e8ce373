"""The kernels of native.c against float64, a brute-force loop, and each row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pellucid.rollout import native
from pellucid.rollout.sampling import sample_tokens
from pellucid.types import SamplingParams

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no kernels here: {native.why_not()}")

SIZES = [(1, 1), (5, 3), (16, 8), (17, 33), (32, 7), (61, 130)]
"""(outputs, depth) of a product: smaller than a panel of columns, exactly one, and no multiple of it."""

ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 19, 69, 70, 119, 120, 121, 250]
"""On both sides of each tile and of the band of rows that goes over the panels at once."""

ALMOST_ONE = 1 - 2**-53
UNTOUCHED = 77.0


@pytest.fixture
def kernels():
    return native.load()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def multiplied(kernels, x, weight, bias, onto=None):
    """x . weight^T + bias by the kernel, added to `onto` if given. Checks that nothing is written behind the result."""
    (m, depth), n, columns = x.shape, len(weight), kernels.panel_columns()
    packed = torch.zeros(-(-n // columns), depth, columns)
    for row, values in enumerate(weight):
        packed[row // columns, :, row % columns] = values
    buffer = torch.full((m * n + 64,), UNTOUCHED)
    out = buffer[: m * n].view(m, n)
    if onto is not None:
        out.copy_(onto)
    kernels.product(m, n, depth, address(x), address(packed), address(bias), address(out), onto is not None)
    assert (buffer[m * n :] == UNTOUCHED).all()
    return out


def each_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "depth"), SIZES)
def test_product(kernels, outputs, depth, biased):
    weight, bias = normal(outputs, depth, seed=1), normal(outputs, seed=2) if biased else None
    onto = normal(250, outputs, seed=3)
    for m in [*range(1, 71), *ROWS[-4:]]:
        x = normal(m, depth, seed=m)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(multiplied(kernels, x, weight, bias).double(), expected, atol=3e-5, rtol=1e-5)
        added = multiplied(kernels, x, weight, bias, onto[:m]).double()
        torch.testing.assert_close(added, expected + onto[:m].double(), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "depth"), SIZES)
def test_a_row_of_a_product_depends_on_no_other_row_and_no_thread(kernels, outputs, depth, biased):
    x, weight = normal(250, depth), normal(outputs, depth, seed=1)
    bias, onto = normal(outputs, seed=2) if biased else None, normal(250, outputs, seed=3)
    for start in (None, onto):
        whole = multiplied(kernels, x, weight, bias, start)
        for m in ROWS:
            some = None if start is None else start[-m:]
            assert multiplied(kernels, x[-m:], weight, bias, some).equal(whole[-m:]), m
        for threads in each_number_of_threads():
            assert multiplied(kernels, x, weight, bias, start).equal(whole), threads


# ---------------------------------------------------------------- norms and the gate


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31, 33, 129])
def test_rms_norm(kernels, width):
    x, weight = normal(9, width) * torch.logspace(-3, 3, 9)[:, None], normal(width, seed=1)
    x[4] = 0
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = torch.empty_like(x)
    kernels.rms_norm(9, width, address(x), address(weight), 1e-5, address(out))
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    alone = x[5:6].clone()
    kernels.rms_norm(1, width, address(alone), address(weight), 1e-5, address(alone))
    assert alone.equal(out[5:6]), "alone and in place"


def gated(kernels, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    both, out = torch.cat([gate, up], dim=1), torch.empty_like(gate)
    kernels.gated(len(gate), gate.shape[1], address(both), address(out))
    return out


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 33, 129])
def test_gate(kernels, width):
    gate, up = normal(9, width) * 5, normal(9, width, seed=1)
    out = gated(kernels, gate, up)
    torch.testing.assert_close(out.double(), F.silu(gate.double()) * up.double(), atol=1e-6, rtol=1e-6)
    assert gated(kernels, gate[3:4], up[3:4]).equal(out[3:4])


@pytest.mark.parametrize("width", [1, 16], ids=["one by one", "vectors"])
@pytest.mark.parametrize("gate", [0.0, -0.0, 1e-42, -1e-42, 86.9, -86.9, 88.0, -88.0, 200.0, -200.0, 3e38, -3e38])
def test_extreme_gates(kernels, gate, width):
    out = gated(kernels, torch.full((1, width), gate), torch.full((1, width), 2.0 if abs(gate) < 1e38 else 1.0))
    expected = F.silu(torch.tensor(gate, dtype=torch.float64)).item() * (2.0 if abs(gate) < 1e38 else 1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), torch.full_like(out, expected).double(), atol=1e-35, rtol=1e-6)


def test_a_gate_or_its_partner_that_is_nan_stays_nan(kernels):
    gate, up = normal(2, 33), normal(2, 33)
    gate[0, 5] = gate[0, 32] = up[1, 6] = torch.nan
    expected = gate.isnan() | up.isnan()
    assert gated(kernels, gate, up).isnan().equal(expected)


def test_the_exponential_is_exact_to_a_few_units(kernels):
    """silu(-x) = -x e^-x / (1 + e^-x), which for large x is the exponential itself."""
    x = torch.linspace(1, 87, 16 * 4001)[None]
    out = gated(kernels, -x, torch.ones_like(x))
    torch.testing.assert_close(out.double(), F.silu(-x.double()), atol=0, rtol=6e-7)


# ---------------------------------------------------------------- attention

LENGTH, POSITIONS = 200, (0, 1, 62, 63, 64, 65, 130, 199)
"""A token at position p sees p + 1 keys: on both sides of the blocks of 64."""

SLOTS = (4, 2, 0, 7, 1, 8, 3, 6)
"""Of these tokens. Slot 5 takes no part."""


class Step:
    """The inputs of one call of `attend`."""

    eps = 1e-5

    def __init__(
        self, heads: int, kv_heads: int, dim: int, window: int = 0, norms: bool = False, scale: float = 0.3,
        slots: tuple[int, ...] = SLOTS, positions: tuple[int, ...] = POSITIONS,
    ):  # fmt: skip
        n = len(slots)
        self.heads, self.kv_heads, self.dim, self.window, self.scale = heads, kv_heads, dim, window, scale
        self.slots, self.positions = torch.tensor(slots), torch.tensor(positions)
        self.qkv = normal(n, heads + 2 * kv_heads, dim)
        angles = normal(n, dim // 2, seed=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.q_norm, self.k_norm = (normal(dim, seed=2), normal(dim, seed=3)) if norms else (None, None)
        self.keys, self.values = (normal(9, kv_heads, LENGTH, dim, seed=seed) for seed in (4, 5))

    def first(self, position: int) -> int:
        """The first column that a token at this position sees."""
        return max(0, position + 1 - self.window) if self.window else 0

    def run(self, kernels, rows: slice = slice(None)) -> torch.Tensor:
        """(n, heads, dim). Writes the new keys and values into self.keys and self.values."""
        n = len(self.positions[rows])
        buffer = torch.full((n * self.heads * self.dim + 64,), UNTOUCHED)
        qkv, cos, sin = self.qkv[rows].clone(), self.cos[rows], self.sin[rows]
        kernels.attend(
            n, self.heads, self.kv_heads, self.dim, LENGTH, address(qkv), address(cos), address(sin),
            address(self.q_norm), address(self.k_norm), self.eps, address(self.keys), address(self.values),
            address(self.slots[rows]), address(self.positions[rows]), self.window, self.scale, address(buffer),
        )  # fmt: skip
        assert (buffer[-64:] == UNTOUCHED).all()
        return buffer[:-64].view(n, self.heads, self.dim)

    def _placed(self, x: torch.Tensor, weight: torch.Tensor | None, row: int) -> torch.Tensor:
        """A query or key (dim,), normed and rotated, in float64."""
        if weight is not None:
            x = x / (x.square().mean() + self.eps).sqrt() * weight.double()
        half = self.dim // 2
        first, second, cos, sin = x[:half], x[half:], self.cos[row].double(), self.sin[row].double()
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def query(self, row: int, head: int) -> torch.Tensor:
        return self._placed(self.qkv[row, head].double(), self.q_norm, row)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the output, the cache's keys and values afterwards), in float64 and one head at a time."""
        qkv, keys, values = self.qkv.double(), self.keys.double(), self.values.double()
        places = list(enumerate(zip(self.slots.tolist(), self.positions.tolist(), strict=True)))
        for row, (slot, position) in places:
            for head in range(self.kv_heads):
                keys[slot, head, position] = self._placed(qkv[row, self.heads + head], self.k_norm, row)
                values[slot, head, position] = qkv[row, self.heads + self.kv_heads + head]
        out = torch.empty(len(places), self.heads, self.dim, dtype=torch.float64)
        for row, (slot, position) in places:
            for head in range(self.heads):
                shared, seen = head * self.kv_heads // self.heads, slice(self.first(position), position + 1)
                weights = (keys[slot, shared, seen] @ self.query(row, head) * self.scale).softmax(0)
                out[row, head] = weights @ values[slot, shared, seen]
        return out, keys, values


def assert_right(step: Step, kernels) -> None:
    out, keys, values = step.expected()
    torch.testing.assert_close(step.run(kernels).double(), out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(step.keys.double(), keys, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(step.values.double(), values, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("norms", [False, True], ids=["", "q and k norms"])
@pytest.mark.parametrize("window", [0, 1, 6, 64, 100])
@pytest.mark.parametrize("dim", [8, 16, 20, 48, 64, 80, 128])
def test_attention(kernels, dim, window, norms):
    heads, kv_heads = {16: (4, 4), 20: (6, 1), 64: (9, 3)}.get(dim, (4, 2))
    step = Step(heads, kv_heads, dim, window, norms, scale=dim**-0.5)
    for slot, position in zip(SLOTS, POSITIONS, strict=True):  # what may not be read
        for cached in (step.keys, step.values):
            cached[slot, :, position:] = torch.nan
            cached[slot, :, : step.first(position)] = torch.nan
    assert_right(step, kernels)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_prompts_beside_slots(kernels, window, threads):
    """Tokens of one slot see each other's keys, whichever thread wrote them."""
    slots, positions = (0, 1) + (3,) * 70 + (2,) * 5, (7, 150, *range(70), *range(5))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_right(Step(4, 2, 16, window, slots=slots, positions=positions), kernels)
    finally:
        torch.set_num_threads(before)


def test_attention_writes_one_column_of_the_cache(kernels):
    step = Step(4, 2, 16)
    before = step.keys.clone(), step.values.clone()
    step.run(kernels)
    wanted = sorted([slot, h, position] for slot, position in zip(SLOTS, POSITIONS, strict=True) for h in range(2))
    for old, new in zip(before, (step.keys, step.values), strict=True):
        assert (old != new).any(-1).nonzero().tolist() == wanted


@pytest.mark.parametrize("dim", [20, 64])
def test_attention_of_a_row_depends_on_no_other_row_and_no_thread(kernels, dim):
    whole = Step(6, 2, dim, norms=True).run(kernels)
    for row in range(len(POSITIONS)):
        assert Step(6, 2, dim, norms=True).run(kernels, slice(row, row + 1)).equal(whole[row : row + 1])
    for threads in each_number_of_threads():
        assert Step(6, 2, dim, norms=True).run(kernels).equal(whole), threads


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("column", [0, 5, 63, 64, 100, 129])
def test_a_nan_in_the_cache_reaches_the_heads_that_read_it(kernels, column, what):
    step = Step(4, 2, 16)
    row = POSITIONS.index(130)
    getattr(step, what)[SLOTS[row], 1, column, 3] = torch.nan
    out = step.run(kernels)
    poisoned = out[row, 2:] if what == "keys" else out[row, 2:, 3]
    assert poisoned.isnan().all()
    assert out.isnan().sum() == poisoned.numel()


@pytest.mark.parametrize(("place", "heads"), [(1, [1]), (4, [0, 1]), (7, [2, 3])], ids=["query", "key", "value"])
def test_a_nan_in_the_new_token_reaches_its_heads(kernels, place, heads):
    step = Step(4, 2, 16)
    step.qkv[3, place] = torch.nan
    assert step.run(kernels).isnan().any(-1).nonzero().tolist() == [[3, head] for head in heads]


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_large_scores_do_not_overflow(kernels, size):
    """The key of the largest score takes all."""
    step = Step(2, 2, 16, scale=1.0)
    step.qkv *= size
    step.keys *= size
    _, keys, values = step.expected()
    out = step.run(kernels).double()
    for row, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
        for head in range(2):
            best = (keys[slot, head, : position + 1] @ step.query(row, head)).argmax()
            torch.testing.assert_close(out[row, head], values[slot, head, best], atol=1e-6, rtol=1e-6)


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
    torch.testing.assert_close(logprobs.double(), every.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
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
