"""sample_tokens: the right distribution, the right support, the right log-prob."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pellucid.rollout.sampling import request_uniforms, sample_tokens
from pellucid.types import SamplingParams

ALMOST_ONE = 1 - 2**-53
"""The largest value of torch.rand in float64."""


def sample(logits: torch.Tensor, uniforms: list[float], **params: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of logits (V,) against many uniforms."""
    rows = logits.expand(len(uniforms), -1)
    return sample_tokens(rows, torch.tensor(uniforms, dtype=torch.float64), SamplingParams(1, **params))


def test_inverts_the_cdf():
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    tokens, logprobs = sample(logits, [0.0, 0.49, 0.51, 0.69, 0.71, ALMOST_ONE])
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(logprobs, logits[tokens])


@given(
    st.lists(st.floats(-200, 200), min_size=1, max_size=40),
    st.sampled_from([0.0, 1e-300, 0.3, 0.999999999, ALMOST_ONE]),
    st.sampled_from([1.0, 0.7, 3.0]),
    st.sampled_from([1.0, 0.9, 0.1, 1e-9]),
    st.sampled_from([0, 1, 3, 1000]),
)
@settings(max_examples=300, deadline=None)
def test_a_token_of_probability_zero_is_never_sampled(logits, u, temperature, top_p, top_k):
    row = torch.tensor([*logits, -torch.inf])  # the last one is the likeliest victim of rounding
    token, logprob = sample(row, [u], temperature=temperature, top_p=top_p, top_k=top_k)
    probs = (row / temperature).softmax(-1)
    assert probs[token] > 0
    assert torch.isfinite(logprob)
    if top_k:
        assert (probs > probs[token]).sum() < top_k


def test_logprobs_are_those_before_truncation():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = torch.linspace(0, 0.999, 100).tolist()
    for truncation in ({"top_k": 4}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.8}, {}):
        tokens, logprobs = sample(logits, uniforms, temperature=0.6, **truncation)
        torch.testing.assert_close(logprobs, (logits / 0.6).log_softmax(-1)[tokens])


def test_greedy_takes_the_argmax_with_logprobs_of_temperature_one():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(logits, torch.zeros(6, dtype=torch.float64), SamplingParams(1, temperature=0))
    assert tokens.equal(logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_bfloat16_logits_give_float32_logprobs():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = sample(logits, [0.5])
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1)[tokens])


@pytest.mark.parametrize(
    ("truncation", "support"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {3}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.71}, {0, 1, 3}),
        ({"top_k": 3, "top_p": 0.81}, {1, 3}),  # of 0.4, 0.3 and 0.15 the first two hold 0.82
        ({"top_k": 3, "top_p": 0.83}, {0, 1, 3}),
    ],
)
def test_truncation_restricts_the_support(truncation, support):
    logits = torch.tensor([0.15, 0.3, 0.1, 0.4, 0.05]).log()
    tokens, _ = sample(logits, torch.linspace(0, 0.9999, 2000).tolist(), **truncation)
    assert set(tokens.tolist()) == support


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_tokens_follow_the_truncated_softmax(truncation):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    probs = (logits / 0.8).softmax(-1).double()
    if truncation:
        order = probs.argsort(descending=True)
        kept = truncation.get("top_k") or int((probs[order].cumsum(0) < truncation["top_p"]).sum()) + 1
        probs = torch.zeros(20, dtype=torch.float64).index_copy(0, order[:kept], probs[order[:kept]])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, _ = sample(logits, uniforms.tolist(), temperature=0.8, **truncation)
    counts = tokens.bincount(minlength=20)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] / probs.sum() * counts.sum()
    assert chisquare(counts[probs > 0].numpy(), expected.numpy()).pvalue > 1e-3


def test_uniforms_belong_to_the_request():
    params = SamplingParams(8, seed=1, step=2)
    first = request_uniforms(params, 3, 4)
    assert first.shape == (8,)
    assert first.dtype == torch.float64
    assert first.equal(request_uniforms(params, 3, 4))
    for other in (
        request_uniforms(params, 4, 3),
        request_uniforms(params, 3, 5),
        request_uniforms(SamplingParams(8, seed=1, step=3), 3, 4),
        request_uniforms(SamplingParams(8, seed=2, step=2), 3, 4),
    ):
        assert not first.equal(other)
