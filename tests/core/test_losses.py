"""Losses: hand-checked branches, loops written from the formulas, gradients, and garbage behind the mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core import aggregate, bradley_terry, cispo, dpo, gspo, nll, ppo_clip, value_clip

NAN, INF = math.nan, math.inf
FAST = settings(max_examples=40, deadline=None)


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def gradient(loss, at):
    return torch.autograd.grad(loss.sum(), at, retain_graph=True)[0]


@st.composite
def updates(draw):
    """logprobs, old_logprobs, advantages, mask: (B,T) in float64, ratios between about 0.2 and 5."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    old_logprobs = -3 * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    logprobs = old_logprobs + 0.8 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return logprobs, old_logprobs, advantages, torch.rand(rows, columns, generator=generator) < 0.7


# clip_eps_low 0.2, clip_eps_high 0.3, dual_clip 3
PPO_BRANCHES = [
    # ratio, A, loss, clipped, gradient (d loss / d logprob = -ratio * A where not clipped)
    (1.0, 2.0, -2.0, False, -2.0),
    (1.1, 2.0, -2.2, False, -2.2),
    (2.0, 2.0, -2.6, True, 0.0),  # A > 0 above: max(-4, -1.3 * 2)
    (0.5, 2.0, -1.0, False, -1.0),  # A > 0 below: max(-1, -0.8 * 2): pulled back up
    (1.1, -2.0, 2.2, False, 2.2),
    (0.5, -2.0, 1.6, True, 0.0),  # A < 0 below: max(1, 0.8 * 2)
    (2.0, -2.0, 4.0, False, 4.0),  # A < 0 above: max(4, 1.3 * 2): pulled back down
    (5.0, -2.0, 10.0, False, 10.0),
    (5.0, 0.0, 0.0, False, 0.0),
]
DUAL_BRANCHES = [
    (2.0, -2.0, 4.0, False, 4.0),  # min(4, 3 * 2)
    (5.0, -2.0, 6.0, True, 0.0),  # min(10, 3 * 2)
    (5.0, 2.0, -2.6, True, 0.0),  # A > 0: only the ordinary clip
    (0.5, -2.0, 1.6, True, 0.0),
]


@pytest.mark.parametrize(("dual_clip", "branch"), [(None, b) for b in PPO_BRANCHES] + [(3.0, b) for b in DUAL_BRANCHES])
def test_ppo_clip_branches_by_hand(dual_clip, branch):
    ratio, advantage, expected, expected_clipped, slope = branch
    old_logprobs = row(-1.5)
    logprobs = (old_logprobs + math.log(ratio)).requires_grad_()
    loss, clipped = ppo_clip(logprobs, old_logprobs, row(advantage), 0.2, 0.3, dual_clip)
    assert loss.item() == pytest.approx(expected)
    assert clipped.item() is expected_clipped
    assert gradient(loss, logprobs).item() == pytest.approx(slope)


@FAST
@given(updates(), st.sampled_from([None, 1.5, 3.0]))
def test_ppo_clip_equals_a_loop(case, dual_clip):
    logprobs, old_logprobs, advantages, _ = case
    loss, clipped = ppo_clip(logprobs, old_logprobs, advantages, 0.1, 0.4, dual_clip)
    for b in range(loss.shape[0]):
        for t in range(loss.shape[1]):
            a = advantages[b, t].item()
            ratio = math.exp(logprobs[b, t].item() - old_logprobs[b, t].item())
            expected = max(-ratio * a, -min(max(ratio, 0.9), 1.4) * a)
            if dual_clip is not None and a < 0:
                expected = min(expected, -dual_clip * a)
            assert loss[b, t].item() == pytest.approx(expected, abs=1e-9)
            assert clipped[b, t].item() == (abs(expected + ratio * a) > 1e-9)


def test_ppo_clip_on_the_first_minibatch_is_minus_the_advantage_and_clips_nothing():
    logprobs, advantages = row(-0.1, -9.0, -50.0).float(), row(1.0, -3.0, 0.0).float()
    loss, clipped = ppo_clip(logprobs, logprobs, advantages, 0.0, 0.0)
    assert loss.tolist() == (-advantages).tolist()
    assert not clipped.any()


def test_a_clipped_token_with_an_overflowing_ratio_has_gradient_zero_not_nan():
    logprobs = torch.tensor([[0.0, 0.0]], requires_grad=True)  # exp(200) is inf in float32
    old_logprobs, advantages = torch.tensor([[-200.0, -200.0]]), torch.tensor([[1.0, -1.0]])
    loss, clipped = ppo_clip(logprobs, old_logprobs, advantages, 0.2, 0.2, dual_clip=3.0)
    assert loss[0].tolist() == pytest.approx([-1.2, 3.0])
    assert clipped.all()
    assert gradient(loss, logprobs).tolist() == [[0.0, 0.0]]


def test_ppo_clip_gradient():
    # Ratios 1, 1.1, 2, 0.5 with both signs: inside and on both sides of the clip, never at its edge.
    ratios = torch.tensor([1.0, 1.1, 2.0, 0.5, 1.05, 1.1, 2.0, 0.5, 5.0], dtype=torch.float64)
    advantages = row(2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0, -2.0)
    old_logprobs = torch.full((1, 9), -1.0, dtype=torch.float64)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    for dual_clip in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda p, dual_clip=dual_clip: ppo_clip(p, old_logprobs, advantages, 0.2, 0.3, dual_clip)[0],
            logprobs,
        )


def test_gspo_by_hand():
    # Row 0: log-ratios 0.1 and 0.3, one token masked out: s = exp(0.2) = 1.2214; A = 2.
    # Row 1: s = exp(-0.5) = 0.6065; A = 1: below the clip with A > 0, not clipped.
    old_logprobs = torch.tensor([[-1.0, NAN, -2.0], [-1.0, -1.0, NAN]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.1, 7.0, 0.3], [-0.2, -0.8, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    logprobs = (torch.nan_to_num(old_logprobs) + log_ratio).requires_grad_()
    advantages = torch.tensor([[2.0, NAN, 2.0], [1.0, 1.0, INF]], dtype=torch.float64)
    s0, s1 = math.exp(0.2), math.exp(-0.5)

    loss, clipped = gspo(logprobs, old_logprobs, advantages, mask, 0.1, 0.3)
    expected = torch.tensor([[-2 * s0, 0, -2 * s0], [-s1, -s1, 0]], dtype=torch.float64)
    torch.testing.assert_close(loss, expected)
    assert not clipped.any()
    # ratio[t] has the gradient of its own token alone: d loss[t] / d logprobs[t] = -s * A
    torch.testing.assert_close(gradient(loss, logprobs), expected)

    loss, clipped = gspo(logprobs, old_logprobs, advantages, mask, 0.1, 0.1)  # now s0 is above 1.1
    expected[0] = torch.tensor([-2.2, 0, -2.2])
    torch.testing.assert_close(loss, expected)
    assert clipped.tolist() == [[True, False, True], [False, False, False]]
    assert gradient(loss, logprobs)[0].tolist() == [0, 0, 0]


@FAST
@given(updates())
def test_gspo_equals_the_sequence_objective_in_value_and_gradient(case):
    logprobs, old_logprobs, advantages, mask = case
    mask[0, 0] = True
    advantages = advantages[:, :1].expand_as(logprobs)  # one advantage per sequence
    logprobs.requires_grad_()
    sequences = [b for b in range(mask.shape[0]) if mask[b].any()]
    objective = torch.zeros((), dtype=torch.float64)
    for b in sequences:
        s = (logprobs[b] - old_logprobs[b])[mask[b]].mean().exp()
        a = advantages[b, 0]
        objective = objective + torch.maximum(-s * a, -s.clamp(0.9, 1.2) * a) / len(sequences)

    loss, clipped = gspo(logprobs, old_logprobs, advantages, mask, 0.1, 0.2)
    total = aggregate(loss, mask, "sequence")
    torch.testing.assert_close(total, objective)
    torch.testing.assert_close(gradient(total, logprobs), gradient(objective, logprobs))
    assert gradient(loss, logprobs)[clipped].eq(0).all()
    assert loss[~mask].eq(0).all() and not clipped[~mask].any()


def test_gspo_resolves_its_tight_clip_range_in_float32():
    # The mean log-ratio is near 2.8e-4, the paper's clip 3e-4. Adding an unlikely token's logprob to it,
    # before subtracting it again, would round it to a multiple of 2^-18 = 4e-6.
    logprobs = torch.tensor([[-50.0, -0.01, -0.02, -0.03]])
    old_logprobs = (logprobs.double() - 2.8e-4).float()
    s = (logprobs - old_logprobs).double().mean().exp().item()
    loss, clipped = gspo(logprobs, old_logprobs, torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), 1, 1)
    assert loss[0].tolist() == pytest.approx([-s] * 4, abs=2e-7)
    assert not clipped.any()


def test_cispo_by_hand():
    # weights clipped to [0.8, 1.3]: ratios 1.1, 2, 0.5 -> 1.1, 1.3, 0.8; loss = -weight * A * logprob
    ratios, old_logprobs = row(1.1, 2.0, 0.5), row(-1.0, -1.0, -1.0)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    advantages = row(2.0, 2.0, -3.0)
    loss, clipped = cispo(logprobs, old_logprobs, advantages, 0.2, 0.3)
    slope = row(-2.2, -2.6, 2.4)
    torch.testing.assert_close(loss, slope * logprobs)
    torch.testing.assert_close(gradient(loss, logprobs), slope)  # a clipped token keeps its gradient
    assert clipped.tolist() == [[False, True, True]]


@FAST
@given(updates())
def test_cispo_equals_a_loop(case):
    logprobs, old_logprobs, advantages, _ = case
    loss, clipped = cispo(logprobs, old_logprobs, advantages, 1.0, 0.3)  # no lower bound
    for b in range(loss.shape[0]):
        for t in range(loss.shape[1]):
            ratio = math.exp(logprobs[b, t].item() - old_logprobs[b, t].item())
            expected = -min(ratio, 1.3) * advantages[b, t].item() * logprobs[b, t].item()
            assert loss[b, t].item() == pytest.approx(expected, abs=1e-9)
            assert clipped[b, t].item() == (ratio > 1.3)


def test_cispo_gradient_with_the_weight_held_constant():
    logprobs, old_logprobs, advantages = row(-1.0, -2.0, -0.5), row(-1.2, -3.0, -0.1), row(1.0, -2.0, 0.7)
    weight = (logprobs - old_logprobs).exp().clamp(0.8, 1.3)
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: -weight * advantages * p, logprobs)
    literal = gradient(-weight * advantages * logprobs, logprobs)
    torch.testing.assert_close(gradient(cispo(logprobs, old_logprobs, advantages, 0.2, 0.3)[0], logprobs), literal)


# value_clip_eps 0.5, old value 1
VALUE_BRANCHES = [
    # V, R, loss, clipped, gradient (V - R where not clipped)
    (1.2, 2.0, 0.32, False, -0.8),  # inside: 0.5 * 0.8²
    (3.0, 3.0, 1.125, True, 0.0),  # V moved past the clip towards R: max(0, 0.5 * (1.5 - 3)²)
    (3.0, 0.0, 4.5, False, 3.0),  # V moved past the clip away from R: max(0.5 * 9, 0.5 * 1.5²), pulled back
    (-1.0, -1.0, 1.125, True, 0.0),  # the same below: clip(V) = 0.5, 0.5 * (0.5 + 1)²
    (-1.0, 2.0, 4.5, False, -3.0),
    (1.0, 1.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("branch", VALUE_BRANCHES)
def test_value_clip_branches_by_hand(branch):
    value, target, expected, expected_clipped, slope = branch
    values = row(value).requires_grad_()
    loss, clipped = value_clip(values, row(1.0), row(target), 0.5)
    assert loss.item() == pytest.approx(expected)
    assert clipped.item() is expected_clipped
    assert gradient(loss, values).item() == pytest.approx(slope)


def test_value_clip_without_clipping_is_half_the_squared_error():
    values = row(3.0, -1.0).requires_grad_()
    loss, clipped = value_clip(values, row(1.0, 1.0), row(3.0, 1.0), None)
    assert loss.tolist() == [[0.0, 2.0]]
    assert not clipped.any()
    assert gradient(loss, values).tolist() == [[0.0, -2.0]]


@FAST
@given(updates(), st.sampled_from([None, 0.2, 5.0]))
def test_value_clip_equals_a_loop(case, eps):
    values, old_values, returns, _ = case
    loss, clipped = value_clip(values, old_values, returns, eps)
    for b in range(loss.shape[0]):
        for t in range(loss.shape[1]):
            v, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            plain = bound = (v - target) ** 2
            if eps is not None:
                bound = (min(max(v, old - eps), old + eps) - target) ** 2
            assert loss[b, t].item() == pytest.approx(0.5 * max(plain, bound), abs=1e-9)
            assert clipped[b, t].item() == (bound > plain + 1e-12)


def test_value_clip_gradient():
    values = row(1.2, 3.0, 3.0, -1.0, -1.0).requires_grad_()
    old_values, returns = torch.ones(1, 5, dtype=torch.float64), row(2.0, 3.3, 0.0, -1.2, 2.0)
    for eps in (0.5, None):
        assert torch.autograd.gradcheck(lambda v, eps=eps: value_clip(v, old_values, returns, eps)[0], values)


def test_nll_by_hand():
    logprobs = row(-0.5, -2.0).requires_grad_()
    assert nll(logprobs).tolist() == [[0.5, 2.0]]
    assert torch.autograd.gradcheck(nll, logprobs)


def test_bradley_terry_by_hand():
    chosen, rejected = row(0.0, 2.0, 0.0)[0], row(0.0, 0.0, 2.0)[0]
    # -log sigmoid of 0, 2, -2
    expected = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(expected)
    # a margin of 2 on each: -log sigmoid of -2, 0, -4
    expected = [math.log(1 + math.exp(2)), math.log(2), math.log(1 + math.exp(4))]
    margin = torch.full((3,), 2.0, dtype=torch.float64)
    assert bradley_terry(chosen, rejected, margin).tolist() == pytest.approx(expected)


def test_bradley_terry_gradient_and_far_tails():
    chosen, rejected = row(0.3, -2.0)[0].requires_grad_(), row(1.0, 0.5)[0].requires_grad_()
    margin = row(0.1, 0.2)[0]
    assert torch.autograd.gradcheck(bradley_terry, (chosen, rejected))
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margin), (chosen, rejected))
    assert bradley_terry(torch.tensor([-500.0, 500.0]), torch.zeros(2)).tolist() == [500.0, 0.0]


def test_dpo_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = row(-3.0), row(-4.0), row(-5.0), row(-3.0)
    inputs = [x[0] for x in (chosen, rejected, ref_chosen, ref_rejected)]
    # gap = (-3 + 5) - (-4 + 3) = 3; beta 0.5: -log sigmoid(1.5)
    up, down = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert dpo(*inputs, beta=0.5).item() == pytest.approx(up)
    assert dpo(*inputs, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.9 * up + 0.1 * down)
    # ipo: (3 - 1 / (2 * 0.5))² = 4
    assert dpo(*inputs, beta=0.5, kind="ipo").item() == pytest.approx(4.0)


@FAST
@given(st.lists(st.tuples(*[st.floats(-30, 0)] * 4), min_size=1, max_size=6), st.sampled_from([0.05, 0.5]))
def test_dpo_equals_a_loop(pairs, beta):
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(pairs, dtype=torch.float64).T
    gaps = [(c - rc) - (r - rr) for c, r, rc, rr in pairs]
    sigmoid = [math.log1p(math.exp(-beta * gap)) for gap in gaps]
    assert dpo(chosen, rejected, ref_chosen, ref_rejected, beta).tolist() == pytest.approx(sigmoid, abs=1e-9)
    ipo = dpo(chosen, rejected, ref_chosen, ref_rejected, beta, "ipo")
    assert ipo.tolist() == pytest.approx([(g - 0.5 / beta) ** 2 for g in gaps], abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"kind": "ipo"}])
def test_dpo_gradient(options):
    policy = row(-3.0, -1.0)[0].requires_grad_(), row(-4.0, -0.5)[0].requires_grad_()
    reference = row(-5.0, -1.0)[0], row(-3.0, -2.0)[0]
    assert torch.autograd.gradcheck(lambda c, r: dpo(c, r, *reference, beta=0.3, **options), policy)


def test_nothing_flows_into_what_is_taken_as_constant():
    live, constant = row(-1.0, -2.0).requires_grad_(), row(-1.3, -1.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = row(1.0, -1.0).requires_grad_()
    pair, frozen = live[0], constant[0]
    for loss in (
        ppo_clip(live, constant, advantages, 0.2, 0.2, 3.0)[0],
        gspo(live, constant, advantages, mask, 0.2, 0.2)[0],
        cispo(live, constant, advantages, 0.2, 0.2)[0],
        value_clip(live, constant, advantages, 0.2)[0],
        dpo(pair, pair * 2, frozen, frozen, 0.1),
    ):
        grads = torch.autograd.grad(loss.sum(), (live, constant, advantages), allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is None and grads[2] is None


GARBAGE_LOSSES = {
    "ppo_clip": lambda live, old, a, mask: ppo_clip(live, old, a, 0.2, 0.2)[0],
    "ppo_clip_dual": lambda live, old, a, mask: ppo_clip(live, old, a, 0.2, 0.2, 3.0)[0],
    "gspo": lambda live, old, a, mask: gspo(live, old, a, mask, 0.2, 0.2)[0],
    "cispo": lambda live, old, a, mask: cispo(live, old, a, 0.2, 0.2)[0],
    "value_clip": lambda live, old, a, mask: value_clip(live, old, a, 0.2)[0],
    "value_no_clip": lambda live, old, a, mask: value_clip(live, old, a, None)[0],
    "nll": lambda live, old, a, mask: nll(live),
}


@pytest.mark.parametrize("name", GARBAGE_LOSSES)
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_garbage_behind_the_mask_reaches_no_value_and_no_gradient(name, mode):
    clean_live, clean_old, clean_advantages = row(-1.0, -2.0), row(-1.1, -1.9), row(0.5, -1.0)
    # Behind the mask: nan in each input, an overflowing ratio, infinities of both signs.
    live = torch.cat([clean_live, row(NAN, -1.0, -1.0, 0.0, INF, -INF, 1e200)], 1).requires_grad_()
    old = torch.cat([clean_old, row(-1.0, NAN, -1.0, -1e9, -INF, -INF, -1.0)], 1)
    advantages = torch.cat([clean_advantages, row(1.0, 1.0, NAN, -1.0, INF, -INF, 1.0)], 1)
    mask = torch.arange(9)[None] < 2

    loss = aggregate(GARBAGE_LOSSES[name](live, old, advantages, mask), mask, mode)
    clean = clean_live.requires_grad_()
    clean_loss = GARBAGE_LOSSES[name](clean, clean_old, clean_advantages, mask[:, :2])
    clean_loss = aggregate(clean_loss, mask[:, :2], mode)
    torch.testing.assert_close(loss, clean_loss)
    grad = gradient(loss, live)
    torch.testing.assert_close(grad[:, :2], gradient(clean_loss, clean))
    assert grad[:, 2:].eq(0).all()


@pytest.mark.parametrize("name", GARBAGE_LOSSES)
def test_garbage_inside_the_mask_stays_loud(name):
    live = row(NAN, -1.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = aggregate(GARBAGE_LOSSES[name](live, row(-1.0, -1.0), row(1.0, 1.0), mask), mask, "token")
    assert loss.isnan()


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1], [3, 2, 1]])
def test_micro_batch_split_changes_no_gradient(mode, sizes):
    generator = torch.Generator().manual_seed(1)
    features, old_logprobs, advantages = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 0, 3, 5, 2])  # ragged, one row without any action token
    mask = torch.arange(7)[None] < lengths[:, None]
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    denominator = {"token": mask.sum(), "sequence": (lengths > 0).sum(), "constant": 42}[mode]

    def loss_of(rows, denominator):
        loss, _ = ppo_clip(weight * features[rows], old_logprobs[rows], advantages[rows], 0.2, 0.2)
        return aggregate(loss, mask[rows], mode, denominator)

    whole = gradient(loss_of(slice(None), None if mode != "constant" else 42), weight)
    parts = torch.arange(6).split(sizes)
    torch.testing.assert_close(sum(gradient(loss_of(rows, denominator), weight) for rows in parts), whole)


def test_wrong_settings_are_refused():
    x = torch.zeros(1, 2)
    for settings_, message in (
        ((-0.1, 0.2), "must not be negative"),
        ((0.2, -0.1), "must not be negative"),
        ((0.2, 0.2, 1.0), "must be above 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_clip(x, x, x, *settings_)
    with pytest.raises(ValueError, match="must not be negative"):
        cispo(x, x, x, -1.0, 0.2)
    with pytest.raises(ValueError, match="None for no clipping"):
        value_clip(x, x, x, 0.0)
    pair = [torch.zeros(2)] * 4
    with pytest.raises(ValueError, match="beta is 0"):
        dpo(*pair, beta=0.0)
    with pytest.raises(ValueError, match="'sigmoid' or 'ipo'"):
        dpo(*pair, beta=0.1, kind="hinge")
    with pytest.raises(ValueError, match="for kind 'sigmoid' only"):
        dpo(*pair, beta=0.1, kind="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"in \[0, 0.5\)"):
        dpo(*pair, beta=0.1, label_smoothing=0.5)


def test_shape_mistakes_are_named():
    x, other = torch.zeros(2, 3), torch.zeros(2, 1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for call, message in (
        (lambda: ppo_clip(x, x, other, 0.2, 0.2), r"ppo_clip: .*advantages \(2, 1\)"),
        (lambda: gspo(x, x, x, mask[:, :1], 0.2, 0.2), r"gspo: .*mask \(2, 1\)"),
        (lambda: cispo(x, other, x, 0.2, 0.2), r"cispo: .*old_logprobs \(2, 1\)"),
        (lambda: value_clip(x, x, other, None), r"value_clip: .*returns \(2, 1\)"),
        (lambda: bradley_terry(x[0], x[0, :1]), r"bradley_terry: .*rejected_scores \(1,\)"),
        (lambda: bradley_terry(x[0], x[0], x[0, :1]), r"bradley_terry: .*margin \(1,\)"),
        (lambda: dpo(x[0], x[0], x[0], x[0, :1], 0.1), r"dpo: .*ref_rejected_logprobs \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
