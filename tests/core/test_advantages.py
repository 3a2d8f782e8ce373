"""Returns, GAE and group baselines: hand cases, loops written from the formulas, masks and episode ends."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core import (
    degenerate_groups,
    discounted_returns,
    dr_grpo,
    explained_variance,
    gae,
    grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)

NAN = math.nan
FAST = settings(max_examples=40, deadline=None)


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def flags(*numbers):
    return torch.tensor([numbers], dtype=torch.bool)


@st.composite
def rollouts(draw):
    """rewards, values, mask, ended, bootstrap_values of random ragged rollouts, and gamma, lam."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    rewards, values, bootstrap = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    ended = torch.rand(rows, columns, generator=generator) < 0.25
    gamma, lam = draw(st.sampled_from([0.0, 0.9, 1.0])), draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    return rewards, values, mask, ended, bootstrap, gamma, lam


def episodes_of(mask, ended):
    """Per episode of one row: the columns of its kept tokens, and the column whose bootstrap ends it."""
    found, current = [], []
    for t in range(len(mask)):
        if mask[t]:
            current.append(t)
        if ended[t] or t == len(mask) - 1:
            found.append((current, t))
            current = []
    return found


def brute_force_gae(rewards, values, mask, ended, bootstrap, gamma, lam):
    """advantage[i] = sum_k (gamma * lam)^k * delta[i+k] over the kept tokens of the token's own episode."""
    advantages = torch.zeros_like(values)
    for b in range(values.shape[0]):
        for tokens, last in episodes_of(mask[b].tolist(), ended[b].tolist()):
            v = [values[b, t].item() for t in tokens] + [bootstrap[b, last].item()]
            deltas = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(tokens)]
            for i, t in enumerate(tokens):
                advantages[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return advantages


def brute_force_returns(rewards, mask, ended, bootstrap, gamma):
    """return[i] = sum_k gamma^k * reward[i+k], with the bootstrap as the reward after the episode's last."""
    returns = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        for tokens, last in episodes_of(mask[b].tolist(), ended[b].tolist()):
            for i, t in enumerate(tokens):
                ahead = [rewards[b, u].item() for u in tokens[i:]] + [bootstrap[b, last].item()]
                returns[b, t] = sum(gamma**k * x for k, x in enumerate(ahead))
    return returns


def test_discounted_returns_by_hand():
    # the last episode is terminated: 1 + 0.5 * (2 + 0.5 * 4) = 3, 2 + 0.5 * 4 = 4, 4
    rewards, on, off = row(1, 2, 4), flags(1, 1, 1), flags(0, 0, 0)
    assert discounted_returns(rewards, on, flags(0, 0, 1), row(0, 0, 0), 0.5).tolist() == [[3, 4, 4]]
    # cut by the end of the rollout with V = 8 beyond it: 4 + 4 = 8, 2 + 4 = 6, 1 + 3 = 4
    assert discounted_returns(rewards, on, off, row(NAN, NAN, 8), 0.5).tolist() == [[4, 6, 8]]
    # the middle token is not ours: 1 + 0.5 * 4 = 3, skipped, 4
    assert discounted_returns(rewards, flags(1, 0, 1), off, row(0, 0, 0), 0.5).tolist() == [[3, 0, 4]]


def test_gae_by_hand():
    # gamma 0.5, lam 0.5, terminated at t=2:
    # delta = [1 + 0.5*2 - 1, 2 + 0.5*4 - 2, 4 + 0 - 4] = [1, 2, 0]
    # A[2] = 0; A[1] = 2 + 0.25 * 0 = 2; A[0] = 1 + 0.25 * 2 = 1.5; returns = A + V
    advantages, returns = gae(row(1, 2, 4), row(1, 2, 4), flags(1, 1, 1), flags(0, 0, 1), row(0, 0, 0), 0.5, 0.5)
    assert advantages.tolist() == [[1.5, 2, 0]]
    assert returns.tolist() == [[2.5, 4, 4]]


def test_gae_tells_truncation_from_termination():
    rewards, values, on = row(1, 1, 1), row(2, 2, 2), flags(1, 1, 1)
    # t=1 ends an episode in the middle; t=2 belongs to the next, cut by the rollout's end with V = 4 beyond.
    # terminated: delta[1] = 1 + 0 - 2 = -1.       truncated with V = 10: delta[1] = 1 + 10 - 2 = 9
    # A[0] = (1 + 2 - 2) + A[1];                   A[2] = 1 + 4 - 2 = 3 either way
    terminated, _ = gae(rewards, values, on, flags(0, 1, 0), row(NAN, 0, 4), 1.0, 1.0)
    truncated, _ = gae(rewards, values, on, flags(0, 1, 0), row(NAN, 10, 4), 1.0, 1.0)
    assert terminated.tolist() == [[0, -1, 3]]
    assert truncated.tolist() == [[10, 9, 3]]


def test_gae_skips_masked_tokens_as_if_they_were_not_there():
    gap = gae(
        row(1, NAN, NAN, 2, NAN),
        row(3, NAN, NAN, 1, NAN),
        flags(1, 0, 0, 1, 0),
        flags(0, 0, 0, 1, 0),
        row(NAN, NAN, NAN, 0, NAN),
        0.9,
        0.8,
    )
    dense = gae(row(1, 2), row(3, 1), flags(1, 1), flags(0, 1), row(0, 0), 0.9, 0.8)
    for with_gap, without in zip(gap, dense, strict=True):
        torch.testing.assert_close(with_gap[:, [0, 3]], without)
        assert with_gap[:, [1, 2, 4]].eq(0).all()


def test_gae_of_a_row_without_actions_is_zero():
    nothing = torch.full((1, 3), NAN)
    for output in gae(nothing, nothing, flags(0, 0, 0), flags(0, 0, 0), nothing, 0.9, 0.9):
        assert output.tolist() == [[0, 0, 0]]


@FAST
@given(rollouts())
def test_gae_and_returns_equal_loops(case):
    rewards, values, mask, ended, bootstrap, gamma, lam = case
    expected = brute_force_gae(rewards, values, mask, ended, bootstrap, gamma, lam)
    # Whatever stands behind the mask must not show.
    dirty_rewards, dirty_values = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN)
    advantages, returns = gae(dirty_rewards, dirty_values, mask, ended, bootstrap, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0))
    torch.testing.assert_close(
        discounted_returns(dirty_rewards, mask, ended, bootstrap, gamma),
        brute_force_returns(rewards, mask, ended, bootstrap, gamma),
    )


@FAST
@given(rollouts())
def test_gae_with_lam_one_is_returns_minus_values_and_with_lam_zero_one_step_td(case):
    rewards, values, mask, ended, bootstrap, gamma, _ = case
    monte_carlo, _ = gae(rewards, values, mask, ended, bootstrap, gamma, 1.0)
    returns = discounted_returns(rewards, mask, ended, bootstrap, gamma)
    torch.testing.assert_close(monte_carlo, torch.where(mask, returns - values, 0))

    one_step, _ = gae(rewards, values, mask, ended, bootstrap, gamma, 0.0)
    for b in range(values.shape[0]):
        for tokens, last in episodes_of(mask[b].tolist(), ended[b].tolist()):
            for i, t in enumerate(tokens):
                beyond = bootstrap[b, last] if t == tokens[-1] else values[b, tokens[i + 1]]
                torch.testing.assert_close(one_step[b, t], rewards[b, t] + gamma * beyond - values[b, t])


def test_advantages_record_no_gradient_and_change_no_input():
    values = torch.ones(1, 3, requires_grad=True)
    rewards = torch.ones(1, 3)
    advantages, returns = gae(rewards, values, flags(1, 1, 0), flags(0, 1, 0), torch.zeros(1, 3), 1.0, 1.0)
    assert not advantages.requires_grad and not returns.requires_grad
    assert rewards.tolist() == [[1, 1, 1]] and values.tolist() == [[1, 1, 1]]


def test_shape_mistakes_are_named():
    x, on = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gae: .*values \(2, 4\)"):
        gae(x, torch.zeros(2, 4), on, on, x, 1.0, 1.0)
    with pytest.raises(ValueError, match="discounted_returns"):
        discounted_returns(x, on, on, torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="rloo"):
        rloo(torch.zeros(3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(B,\)"):
        grpo(x, torch.zeros(2, 3, dtype=torch.long), 1e-4)


def test_explained_variance_by_hand():
    on = flags(1, 1, 1, 1, 0)
    returns = row(1, 2, 3, 4, NAN)  # variance 1.25
    assert explained_variance(row(1, 2, 3, 4, NAN), returns, on).item() == 1
    assert explained_variance(row(11, 12, 13, 14, NAN), returns, on).item() == 1  # right up to a constant
    assert explained_variance(row(7, 7, 7, 7, NAN), returns, on).item() == 0
    # errors [0, 0, 0, 2]: mean 0.5, variance 0.75; 1 - 0.75 / 1.25 = 0.4
    assert explained_variance(row(1, 2, 3, 2, NAN), returns, on).item() == pytest.approx(0.4)


def test_explained_variance_of_constant_returns_is_defined():
    on, returns = flags(1, 1, 0), row(3, 3, NAN)
    assert explained_variance(row(5, 5, NAN), returns, on).item() == 1
    assert explained_variance(row(3, 4, NAN), returns, on).item() == 0
    with pytest.raises(ValueError, match="nothing to average"):
        explained_variance(returns, returns, flags(0, 0, 0))


# Two groups, interleaved, with ids that are neither contiguous nor sorted: 7 -> [1, 3, 5], -2 -> [4, 4]
SCORES = torch.tensor([1.0, 4.0, 3.0, 4.0, 5.0], dtype=torch.float64)
GROUP_IDS = torch.tensor([7, -2, 7, -2, 7])


def test_group_advantages_by_hand():
    # 7: the others of 1 average 4, of 3 average 3, of 5 average 2
    assert rloo(SCORES, GROUP_IDS).tolist() == [-3, 0, 0, 0, 3]
    # 7: mean 3, sample variance (4 + 0 + 4) / 2 = 4, std 2; eps 0.5: -2 / 2.5
    torch.testing.assert_close(grpo(SCORES, GROUP_IDS, 0.5), row(-0.8, 0, 0, 0, 0.8)[0])
    assert dr_grpo(SCORES, GROUP_IDS).tolist() == [-2, 0, 0, 0, 2]
    # [-2, 0, 0, 0, 2]: mean 0, biased variance 8 / 5
    expected = row(-2, 0, 0, 0, 2)[0] / 1.6**0.5
    torch.testing.assert_close(reinforce_pp_baseline(SCORES, GROUP_IDS), expected)
    assert degenerate_groups(SCORES, GROUP_IDS) == 1


@FAST
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(-3, 3)), min_size=1, max_size=12))
def test_group_advantages_equal_loops(samples):
    samples = [*samples, *((s + 0.5, g) for s, g in samples)]  # every group has at least two
    groups: dict[int, list[float]] = {}
    for score, group in samples:
        groups.setdefault(group, []).append(score)
    scores = torch.tensor([s for s, _ in samples], dtype=torch.float64)
    ids = torch.tensor([g for _, g in samples])

    mean = {g: statistics.fmean(s) for g, s in groups.items()}
    leave_one_out = [s - (sum(groups[g]) - s) / (len(groups[g]) - 1) for s, g in samples]
    centred = [s - mean[g] for s, g in samples]
    standardised = [(s - mean[g]) / (statistics.stdev(groups[g]) + 1e-4) for s, g in samples]
    scale = math.sqrt(statistics.pvariance(centred) + 1e-8)
    whitened = [(c - statistics.fmean(centred)) / scale for c in centred]
    for actual, expected in (
        (rloo(scores, ids), leave_one_out),
        (dr_grpo(scores, ids), centred),
        (grpo(scores, ids, 1e-4), standardised),
        (reinforce_pp_baseline(scores, ids), whitened),
    ):
        assert actual.tolist() == pytest.approx(expected, abs=1e-9)
    assert degenerate_groups(scores, ids) == sum(len(set(s)) == 1 for s in groups.values())


@pytest.mark.parametrize("score", [0.1, 1e-8, 1234.567, -7.3])
def test_a_group_of_equal_scores_has_advantage_exactly_zero(score):
    scores = torch.full((7,), score)
    ids = torch.tensor([3, 3, 3, 9, 9, 9, 9])
    for advantages in (
        rloo(scores, ids),
        grpo(scores, ids, 1e-8),
        grpo(scores, ids, 0.0),
        dr_grpo(scores, ids),
        reinforce_pp_baseline(scores, ids),
    ):
        assert advantages.tolist() == [0.0] * 7
    assert degenerate_groups(scores, ids) == 2


def test_groups_of_one():
    scores, ids = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="at least 2 samples"):
        rloo(scores, ids)
    assert grpo(scores, ids, 1e-4)[0].item() == 0
    assert dr_grpo(scores, ids).tolist() == [0, -2, 2]
    assert degenerate_groups(scores, ids) == 1


def test_whole_number_scores_are_taken_as_numbers():
    assert dr_grpo(torch.tensor([0, 1]), torch.tensor([4, 4])).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_score_that_is_no_number_is_refused(bad):
    scores, ids = torch.tensor([1.0, bad]), torch.tensor([0, 0])
    for function in (rloo, dr_grpo, reinforce_pp_baseline, degenerate_groups, lambda s, g: grpo(s, g, 1e-4)):
        with pytest.raises(ValueError, match="nan or inf"):
            function(scores, ids)


def test_reinforce_pp_by_hand():
    # gamma 0.5: returns 2 + 0.5 * 4 = 4 and 4 in the first row, 1 in the second; mean 3, variance 2
    rewards = torch.tensor([[2.0, NAN, 4.0], [1.0, NAN, NAN]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    expected = torch.tensor([[1.0, 0.0, 1.0], [-2.0, 0.0, 0.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(reinforce_pp(rewards, mask, 0.5), expected)
    with pytest.raises(ValueError, match="nothing to average"):
        reinforce_pp(rewards, torch.zeros_like(mask), 0.5)


@FAST
@given(rollouts())
def test_reinforce_pp_equals_a_loop(case):
    rewards, _, mask, _, _, gamma, _ = case
    mask[0, 0] = True
    never, zero = torch.zeros_like(mask), torch.zeros_like(rewards)
    kept = brute_force_returns(rewards, mask, never, zero, gamma)[mask].tolist()
    scale = math.sqrt(statistics.pvariance(kept) + 1e-8)
    expected = [(k - statistics.fmean(kept)) / scale for k in kept]
    actual = reinforce_pp(rewards.masked_fill(~mask, NAN), mask, gamma)
    assert actual[mask].tolist() == pytest.approx(expected, abs=1e-9)
    assert actual[~mask].eq(0).all()
