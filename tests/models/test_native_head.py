"""The LM head over kernels: log-probs, entropies and their gradients, against float64 and each row alone."""

from __future__ import annotations

import pytest
import torch
from native_kernels import (
    ROUNDING,
    assert_within,
    each_dtype,
    each_number_of_threads,
    linear,
    needs_kernels,
    normal,
    stored,
    watched,
)

from pellucid.models import head, token_logprobs
from pellucid.models.native import ops
from pellucid.models.weights import Weight

pytestmark = needs_kernels

VOCABULARIES = [1, 2, 7, 15, 16, 17, 33, 97, 1023, 1024, 1025, 5000]
"""Around the lanes of a vector and the block that is summed in float32."""
TEMPERATURES = [1.0, 0.7, 2.5]
ROWS = 7


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    yield from watched(monkeypatch)


def some_targets(size: int, rows: int = ROWS) -> torch.Tensor:
    """The first and the last token among them."""
    return (torch.arange(rows) * 389 - 1) % size


def softmax(logits: torch.Tensor, targets: torch.Tensor, temperature: float):
    """(log-norms, log-probs of targets, entropies) of float64 logits, differentiable."""
    scaled = logits / temperature
    every = scaled.log_softmax(-1)
    terms = every.exp() * every.clamp(min=-1e300)  # 0 * -inf is no entropy
    return scaled.logsumexp(-1), every.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_head(size, temperature):
    for spread, offset in ((1, 0), (3, 20), (3, -20), (40, 1000)):
        logits, targets = normal(ROWS, size) * spread + offset, some_targets(size)
        found = ops.head(logits, temperature, targets, with_entropy=True)
        bound = 5e-7 * (1 + (logits.double() / temperature).abs().amax(1))
        for ours, expected in zip(found, softmax(logits.double(), targets, temperature), strict=True):
            assert_within(ours, expected, bound)


@pytest.mark.parametrize("size", [97, 1025])
def test_a_row_of_the_head_depends_on_no_other_row_no_thread_and_not_on_the_entropy(size):
    logits, targets = normal(40, size), some_targets(size, 40)
    whole = ops.head(logits, 0.7, targets, with_entropy=True)
    for row in range(0, 40, 13):
        alone = slice(row, row + 1)
        for one, every in zip(ops.head(logits[alone], 0.7, targets[alone], True), whole, strict=True):
            assert one.equal(every[alone])
    *without, none = ops.head(logits, 0.7, targets, with_entropy=False)
    assert none is None and all(one.equal(other) for one, other in zip(without, whole[:2], strict=True))
    for threads in each_number_of_threads():
        for one, every in zip(ops.head(logits, 0.7, targets, True), whole, strict=True):
            assert one.equal(every), threads


@pytest.mark.parametrize("size", [2, 16, 33, 2000])
def test_logits_of_minus_infinity_have_no_probability_and_no_entropy(size):
    hidden = torch.rand(ROWS, size, generator=torch.Generator().manual_seed(0)) < 0.7
    hidden[0], hidden[1, : size // 2] = True, True  # all but the target, and a whole half
    targets = some_targets(size)
    hidden[torch.arange(ROWS), targets] = False
    logits = normal(ROWS, size).masked_fill(hidden, -torch.inf)
    found = ops.head(logits, 0.7, targets, with_entropy=True)
    for ours, expected in zip(found, softmax(logits.double(), targets, 0.7), strict=True):
        assert_within(ours, expected, 5e-6)
    assert abs(found[1][0]) < 1e-6 and abs(found[2][0]) < 1e-6, "it is certain"
    logits[2, targets[2]] = -torch.inf
    if logits[2].isfinite().any():
        assert ops.head(logits, 0.7, targets, True)[1][2] == -torch.inf


@pytest.mark.parametrize("place", [0, 15, 16, 32, 1024, 1099])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_nan_or_infinite_makes_its_row_nan(wrong, place):
    logits, targets = normal(3, 1100), some_targets(1100, 3)
    logits[1, place] = wrong
    for number, found in enumerate(ops.head(logits, 1.0, targets, with_entropy=True)):
        assert found.isfinite().tolist() == [True, False, True]
        assert found[1].isnan() or number == 0, "a log-norm may be infinite"


def test_a_row_of_minus_infinity_alone_is_nan():
    logprobs = ops.head(torch.full((1, 40), -torch.inf), 1.0, torch.zeros(1, dtype=torch.int64), True)[1:]
    assert all(x.isnan().all() for x in logprobs)


# ---------------------------------------------------------------- backward


def gradient(logits, targets, temperature, dlogprobs, dentropies):
    """Of the logits by autograd in float64; what the forward pass keeps; and the error that float32 may add."""
    leaf = logits.double().requires_grad_()
    log_norms, logprobs, entropies = softmax(leaf, targets, temperature)
    loss = (logprobs * dlogprobs).sum() + (0 if dentropies is None else (entropies * dentropies).sum())
    (expected,) = torch.autograd.grad(loss, leaf)
    every = (leaf.detach() / temperature).log_softmax(-1).clamp(min=-1e30)
    sizes = torch.nn.functional.one_hot(targets, logits.shape[1]) + every.exp()
    sizes = sizes * dlogprobs.double().abs()[:, None]
    if dentropies is not None:
        sizes += every.exp() * (1 + every.abs() + entropies[:, None]) * dentropies.double().abs()[:, None]
    error = 1e-6 * (1 + log_norms.abs())[:, None] * sizes / temperature
    return expected, (log_norms.detach().float(), entropies.detach().float()), error


@pytest.mark.parametrize("with_entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", VOCABULARIES)
@each_dtype
def test_head_backward(dtype, size, temperature, with_entropy):
    targets, dlogprobs, dentropies = some_targets(size), normal(ROWS, seed=1), normal(ROWS, seed=2)
    dlogprobs[3] = dentropies[4] = 0
    for spread, offset in ((1, 0), (4, 20)):
        logits = normal(ROWS, size) * spread + offset
        given = dentropies if with_entropy else None
        expected, (log_norms, entropies), error = gradient(logits, targets, temperature, dlogprobs, given)
        found = ops.head_backward(logits, temperature, targets, log_norms, entropies, dlogprobs, given, dtype)
        assert_within(found, expected, error + stored(expected, dtype))


@each_dtype
def test_a_row_of_the_heads_gradient_depends_on_no_other_row_and_no_thread(dtype):
    logits, targets, dlogprobs, dentropies = normal(40, 97), some_targets(97, 40), normal(40), normal(40, seed=1)
    log_norms, _, entropies = ops.head(logits, 0.7, targets, True)
    rows = (logits, targets, log_norms, entropies, dlogprobs, dentropies)

    def back(*rows: torch.Tensor) -> torch.Tensor:
        return ops.head_backward(rows[0], 0.7, *rows[1:], dtype)

    whole = back(*rows)
    for row in range(0, 40, 13):
        assert back(*(x[row : row + 1] for x in rows)).equal(whole[row : row + 1])
    for threads in each_number_of_threads():
        assert back(*rows).equal(whole), threads


@each_dtype
def test_logits_of_minus_infinity_have_no_gradient(dtype):
    hidden = torch.rand(ROWS, 50, generator=torch.Generator().manual_seed(0)) < 0.7
    targets, dlogprobs, dentropies = some_targets(50), normal(ROWS), normal(ROWS, seed=1)
    hidden[torch.arange(ROWS), targets] = False
    logits = normal(ROWS, 50, seed=2).masked_fill(hidden, -torch.inf)
    log_norms, _, entropies = ops.head(logits, 1.0, targets, True)
    found = ops.head_backward(logits, 1.0, targets, log_norms, entropies, dlogprobs, dentropies, dtype)
    assert found.isfinite().all() and not found[hidden].any()
    assert (found.double().sum(1).abs() < (1e-5 if dtype == torch.float32 else 0.05)).all(), "they only move mass"


@pytest.mark.parametrize("place", [0, 15, 16, 32, 96])
@each_dtype
def test_a_nan_logit_shows_in_the_gradient_of_its_row(dtype, place):
    logits, targets = normal(3, 97), some_targets(97, 3)
    logits[1, place] = torch.nan
    log_norms, _, entropies = ops.head(logits, 1.0, targets, True)
    for dentropies in (None, torch.ones(3)):
        found = ops.head_backward(logits, 1.0, targets, log_norms, entropies, torch.ones(3), dentropies, dtype)
        assert found.isnan().all(1).tolist() == [False, True, False]
    upstream = torch.tensor([1.0, torch.nan, 1.0])
    log_norms, _, entropies = ops.head(normal(3, 97), 1.0, targets, True)
    for given in ((upstream, None), (torch.ones(3), upstream)):
        found = ops.head_backward(normal(3, 97), 1.0, targets, log_norms, entropies, *given, dtype)
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert found[::2].isfinite().all()


# ---------------------------------------------------------------- the whole head

TOKENS, HIDDEN, VOCABULARY = 23, 8, 98


def head_inputs(dtype: torch.dtype):
    """(hidden, weight, packed weight, targets). Rounded already, so that the kernels' rounding of them adds no error."""
    hidden, weight = (normal(n, HIDDEN, seed=n).to(dtype).float() for n in (TOKENS, VOCABULARY))
    head = linear(weight)
    return hidden.requires_grad_(), head.weight, Weight(dtype, head), some_targets(VOCABULARY, TOKENS)


def whole_logits(hidden, weight, targets, temperature):
    return softmax(hidden.double() @ weight.double().T, targets, temperature)[1:]


def assert_head(dtype, ours, theirs, leaves, upstream) -> None:
    """The outputs, and the gradients from `upstream`, one weight for each output and token (0 for an unused output)."""
    for found, expected in zip(ours, theirs, strict=True):
        assert_within(found.detach(), expected.detach(), 2e-5)
    grads = [torch.autograd.grad((torch.stack(out) * upstream).sum(), leaves) for out in (ours, theirs)]
    for found, expected in zip(*grads, strict=True):
        # In bfloat16 each logit's gradient is rounded once, before it is multiplied and summed.
        assert_within(found, expected, (1e-5 + ROUNDING[dtype]) * expected.abs().max() + 1e-5)


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 1 << 21], ids=["one token", "5 tokens", "all"])
@each_dtype
def test_head_over_kernels_is_log_softmax_of_the_whole_logits(monkeypatch, dtype, chunk):
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    hidden, weight, packed, targets = head_inputs(dtype)
    for upstream in (normal(2, TOKENS), normal(2, TOKENS) * torch.tensor([[1], [0]])):
        ours = token_logprobs(hidden, weight, None, targets, 0.7, entropy=True, packed=packed)
        theirs = whole_logits(hidden, weight, targets, 0.7)
        assert "NativeHead" in type(ours[0].grad_fn).__name__
        assert_head(dtype, ours, theirs, (hidden, weight), upstream)


@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
@each_dtype
def test_either_output_of_the_head_over_kernels_can_be_differentiated_alone(dtype, which):
    hidden, weight, packed, targets = head_inputs(dtype)
    ours = token_logprobs(hidden, weight, None, targets, 1.3, entropy=True, packed=packed)[which]
    theirs = whole_logits(hidden, weight, targets, 1.3)[which]
    grads = [torch.autograd.grad(out.sum(), (hidden, weight)) for out in (ours, theirs)]
    for found, expected in zip(*grads, strict=True):
        assert_within(found, expected, (1e-5 + ROUNDING[dtype]) * expected.abs().max() + 1e-5)


@each_dtype
def test_without_the_entropy_the_head_gives_the_same_log_probs(dtype):
    hidden, weight, packed, targets = head_inputs(dtype)
    logprobs, none = token_logprobs(hidden, weight, None, targets, 1.0, packed=packed)
    assert none is None
    assert logprobs.equal(token_logprobs(hidden, weight, None, targets, 1.0, entropy=True, packed=packed)[0])


@each_dtype
def test_head_over_kernels_with_no_tokens_under_the_mask(dtype):
    hidden, weight, packed, targets = head_inputs(dtype)
    logprobs, entropies = token_logprobs(hidden[:0], weight, None, targets[:0], 1.0, entropy=True, packed=packed)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("what", ["bias", "softcap"])
def test_a_bias_or_a_softcap_is_left_to_pytorch(what):
    hidden, weight, packed, targets = head_inputs(torch.float32)
    bias, softcap = (normal(VOCABULARY), None) if what == "bias" else (None, 3.0)
    logprobs, _ = token_logprobs(hidden, weight, bias, targets, 1.0, softcap, packed=packed)
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
