"""KL estimators as values, rewards and losses, checked on an exact categorical distribution; controllers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core import AdaptiveKL, FixedKL, kl_estimate, kl_loss, kl_shaped_rewards

NAN, INF = math.nan, math.inf
FAST = settings(max_examples=40, deadline=None)


@pytest.fixture
def policies():
    """(logits with gradient, log-probs of the reference): a categorical over five tokens, float64."""
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits.log_softmax(0)


def test_kl_estimates_by_hand():
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    # l = [0.5, -1]: k2 = l²/2 = [0.125, 0.5]; k3 = [e^-0.5 - 1 + 0.5, e - 1 - 1]
    assert kl_estimate(logprobs, ref_logprobs, "k1").tolist() == [[0.5, -1.0]]
    assert kl_estimate(logprobs, ref_logprobs, "k2").tolist() == [[0.125, 0.5]]
    assert kl_estimate(logprobs, ref_logprobs, "k3")[0].tolist() == pytest.approx(
        [math.exp(-0.5) - 0.5, math.e - 2], abs=1e-6
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_of_a_policy_with_itself_is_zero(kind):
    logprobs = torch.tensor([[-1.0, -0.1, -30.0]])
    assert kl_estimate(logprobs, logprobs, kind).eq(0).all()


@FAST
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=8))
def test_kl_estimates_equal_loops(pairs):
    logprobs, ref_logprobs = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    gaps = [p - q for p, q in pairs]
    for kind, expected in {
        "k1": gaps,
        "k2": [gap * gap / 2 for gap in gaps],
        "k3": [math.exp(-gap) - 1 + gap for gap in gaps],
    }.items():
        assert kl_estimate(logprobs, ref_logprobs, kind)[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_k1_and_k3_are_unbiased_as_values_and_k2_is_not(policies):
    logits, ref_logprobs = policies
    logprobs = logits.detach().log_softmax(0)
    probs = logprobs.exp()
    exact = (probs * (logprobs - ref_logprobs)).sum()
    expected = {kind: (probs * kl_estimate(logprobs, ref_logprobs, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], exact)
    torch.testing.assert_close(expected["k3"], exact)
    assert abs(expected["k2"] - exact) > 1e-3
    assert kl_estimate(logprobs, ref_logprobs, "k1").min() < 0
    assert kl_estimate(logprobs, ref_logprobs, "k3").min() >= 0


@pytest.mark.parametrize(
    ("kind", "direction"),
    [("k1", "nowhere"), ("k2", "KL(pi||ref)"), ("k3", "KL(ref||pi)"), ("k3_corrected", "KL(pi||ref)")],
)
def test_where_each_kl_loss_points_in_expectation(policies, kind, direction):
    logits, ref_logprobs = policies
    logprobs = logits.log_softmax(0)
    probs, ref_probs = logprobs.exp(), ref_logprobs.exp()
    objective = {
        "nowhere": logits.sum() * 0,
        "KL(pi||ref)": (probs * (logprobs - ref_logprobs)).sum(),
        "KL(ref||pi)": (ref_probs * (ref_logprobs - logprobs)).sum(),
    }[direction]
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    # Each token weighted by its chance of being sampled; sampling itself has no gradient.
    expected_loss = (probs.detach() * kl_loss(logprobs, ref_logprobs, kind)).sum()
    (grad,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(grad, exact)


def test_the_two_directions_differ_on_this_example_and_the_default_is_the_right_one(policies):
    logits, ref_logprobs = policies
    logprobs = logits.log_softmax(0)

    def expected_gradient(**options):
        loss = (logprobs.exp().detach() * kl_loss(logprobs, ref_logprobs, **options)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    default, plain_k3 = expected_gradient(), expected_gradient(kind="k3")
    torch.testing.assert_close(default, expected_gradient(kind="k3_corrected"))
    assert (default - plain_k3).abs().max() > 1e-2


def test_corrected_k3_is_k3_in_value():
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    torch.testing.assert_close(
        kl_loss(logprobs, ref_logprobs, "k3_corrected"), kl_estimate(logprobs, ref_logprobs, "k3")
    )


def test_corrected_k3_is_k3_times_the_live_ratio():
    logprobs = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    log_ratio = logprobs - ref_logprobs
    literal = (logprobs - logprobs.detach()).exp() * ((-log_ratio).exp() - 1 + log_ratio)
    (expected,) = torch.autograd.grad(literal.sum(), logprobs)
    (grad,) = torch.autograd.grad(kl_loss(logprobs, ref_logprobs, "k3_corrected").sum(), logprobs)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradients(kind):
    logprobs = torch.tensor([[-1.0, -0.3, -4.0]], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -0.2, -4.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, q: kl_estimate(p, q, kind), (logprobs, ref_logprobs))
    assert torch.autograd.gradcheck(lambda p: kl_loss(p, ref_logprobs, kind), logprobs)
    assert not kl_loss(logprobs.detach(), ref_logprobs, kind).requires_grad


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_corrected"])
def test_garbage_behind_the_mask_reaches_no_kl_gradient(kind):
    logprobs = torch.tensor([[-1.0, NAN, -1.0, -1e9, -INF]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -1.0, NAN, 0.0, -INF]])
    mask = torch.tensor([[True, False, False, False, False]])
    loss = torch.where(mask, kl_loss(logprobs, ref_logprobs, kind), 0).sum()
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite()
    assert grad[0, 0] != 0
    assert grad[0, 1:].tolist() == [0.0] * 4


def test_unknown_kinds_and_shapes_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_estimate(x, x, "k3_corrected")
    with pytest.raises(ValueError, match="'k3_corrected'"):
        kl_loss(x, x, "k4")
    with pytest.raises(ValueError, match="kl_estimate: shapes differ"):
        kl_estimate(x, torch.zeros(1, 3), "k1")
    with pytest.raises(ValueError, match="shapes differ"):
        kl_loss(x, torch.zeros(1, 3), "k3_corrected")


def test_kl_shaped_rewards_by_hand():
    scores = torch.tensor([1.0, -2.0, 5.0])
    kl = torch.tensor([[NAN, 0.5, 1.0, NAN], [2.0, INF, -1.0, 4.0], [NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    # 0.1 nat price; the score on the last action, not on the last column and not one past it:
    # row 0: -0.05, -0.1 + 1; row 1, two turns: -0.2, -, 0.1, -0.4 - 2; row 2 has no action
    expected = [[0, -0.05, 0.9, 0], [-0.2, 0, 0.1, -2.4], [0, 0, 0, 0]]
    torch.testing.assert_close(kl_shaped_rewards(scores, kl, mask, 0.1), torch.tensor(expected))


@FAST
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0.0, 0.05, 1.0]))
def test_kl_shaped_rewards_equal_a_loop(rows, columns, seed, kl_coef):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=generator, dtype=torch.float64)
    kl = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    expected = torch.zeros_like(kl)
    for b in range(rows):
        actions = [t for t in range(columns) if mask[b, t]]
        for t in actions:
            expected[b, t] = -kl_coef * kl[b, t]
        if actions:
            expected[b, actions[-1]] += scores[b]
    rewards = kl_shaped_rewards(scores, kl.masked_fill(~mask, NAN), mask, kl_coef)
    torch.testing.assert_close(rewards, expected)


def test_kl_shaped_rewards_are_detached_and_check_their_shapes():
    kl, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    assert not kl_shaped_rewards(torch.ones(2), kl, mask, 0.1).requires_grad
    assert kl_shaped_rewards(torch.tensor([1, 2]), kl, mask, 0.0)[:, -1].tolist() == [1.0, 2.0]
    assert kl_shaped_rewards(torch.ones(2, dtype=torch.float64), kl, mask, 0.1).dtype == kl.dtype
    with pytest.raises(ValueError, match=r"scores \(2, 1\)"):
        kl_shaped_rewards(torch.ones(2, 1), kl, mask, 0.1)
    with pytest.raises(ValueError, match="kl_shaped_rewards: shapes differ"):
        kl_shaped_rewards(torch.ones(2), kl, mask[:, :2], 0.1)


@pytest.mark.parametrize(
    ("sequence_kl", "factor"),
    [
        (6.0, 1.0),  # on target: unchanged
        (6.6, 1.01),  # 10 % above: 1 + 0.1 * 64 / 640
        (5.4, 0.99),  # 10 % below
        (60.0, 1.02),  # far above: clipped at +0.2
        (0.0, 0.98),  # far below: clipped at -0.2
        (-3.0, 0.98),  # k1 may be negative
    ],
)
def test_adaptive_kl_by_hand(sequence_kl, factor):
    controller = AdaptiveKL(0.1, target=6.0, horizon=640)
    assert controller.update(torch.tensor(sequence_kl, dtype=torch.float64), 64) == controller.coef
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_kl_compounds_and_resumes():
    controller = AdaptiveKL(0.1, target=6.0, horizon=640)
    controller.update(60.0, 64)
    resumed = AdaptiveKL(0.5, target=6.0, horizon=640)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(60.0, 64) == controller.update(60.0, 64) == pytest.approx(0.1 * 1.02**2)


def test_adaptive_kl_refuses_what_would_break_it():
    for wrong in ({"coef": 0.0}, {"target": 0.0}, {"horizon": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            AdaptiveKL(**{"coef": 0.1, "target": 6.0, "horizon": 640, **wrong})
    controller = AdaptiveKL(0.1, target=6.0, horizon=10)
    for observed in (NAN, INF):
        with pytest.raises(ValueError, match="diverged"):
            controller.update(observed, 1)
    for n in (50, -1):
        with pytest.raises(ValueError, match="below 5"):
            controller.update(0.0, n)
    assert controller.coef == 0.1


def test_fixed_kl_stays():
    controller = FixedKL(0.05)
    assert controller.update(100.0, 64) == controller.coef == 0.05
    other = FixedKL(0.0)
    other.load_state_dict(controller.state_dict())
    assert other.coef == 0.05
