"""From rewards to advantages: discounted returns, GAE, and baselines from a group of samples.

Axes: B sequences (or environments), T tokens (or steps); P prompts with G samples each, B = P * G. Column t
describes token t: `rewards[:, t]` was earned by it, `values[:, t]` is the value of the state before it.
Advantages are targets, not something to differentiate: no function here records a gradient.
"""

import torch
from torch import Tensor

from pellucid.core.masked import masked_mean, masked_whiten, require_same_shape


@torch.no_grad()
def discounted_returns(rewards: Tensor, mask: Tensor, ended: Tensor, bootstrap_values: Tensor, gamma: float) -> Tensor:
    """Sum of discounted rewards from each token to the end of its episode.

    return[t] = rewards[t] + gamma * return[t+1]; past an episode's end (`ended[t]`) and past the last column,
    `bootstrap_values[t]` stands for what would follow: 0 if terminated, V(final observation) if truncated.
    A token outside the mask is skipped: it neither adds a reward nor discounts.   [Sutton & Barto, eq. 3.8]

    rewards, mask, ended, bootstrap_values: (B,T). Returns (B,T), in reward units, 0 where masked out.
    """
    require_same_shape("discounted_returns", rewards=rewards, mask=mask, ended=ended, bootstrap_values=bootstrap_values)
    keep, stop = mask.bool(), ended.bool()
    returns = torch.zeros_like(rewards)
    following = bootstrap_values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(stop[:, t], bootstrap_values[:, t], following)
        following = torch.where(keep[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = torch.where(keep[:, t], following, 0)
    return returns


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    ended: Tensor,
    bootstrap_values: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, one recursion for environments and for tokens.

    delta[t]     = rewards[t] + gamma * V[t+1] - values[t]
    advantage[t] = delta[t] + gamma * lam * advantage[t+1]                      [Schulman et al. 2016, eq. 16]

    At an episode's end V[t+1] is `bootstrap_values[t]` (0 if terminated, V(final observation) if truncated)
    and advantage[t+1] is 0. A token outside the mask is skipped: the one before it looks straight at the one
    after it, so tokens the policy did not choose neither decay nor reset anything.

    rewards, values, mask, ended, bootstrap_values: (B,T). Returns (advantages, returns), each (B,T), in
    reward units and 0 where masked out; returns = advantages + values, the critic's target, before any
    whitening.
    """
    require_same_shape("gae", rewards=rewards, values=values, mask=mask, ended=ended, bootstrap_values=bootstrap_values)
    keep, stop = mask.bool(), ended.bool()
    next_value = bootstrap_values[:, -1]
    advantage, found = torch.zeros_like(next_value), []
    by_step = zip(*(x.unbind(1) for x in (rewards, values, keep, stop, bootstrap_values)), strict=True)
    for reward, value, kept, stops, bootstrap in reversed(list(by_step)):
        next_value = torch.where(stops, bootstrap, next_value)
        advantage = torch.where(stops, 0, advantage)
        delta = reward + gamma * next_value - value
        advantage = torch.where(kept, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(kept, value, next_value)
        found.append(advantage)
    advantages = torch.where(keep, torch.stack(found[::-1], 1), 0)
    return advantages, torch.where(keep, advantages + values, 0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic predicts: 1 - Var(returns - values) / Var(returns).

    1 is a perfect critic (up to a constant), 0 is no better than a constant, negative is worse. Where all
    returns are equal there is no spread to explain: then 1 if the critic is right up to a constant, else 0.

    values, returns, mask: (B,T). Returns a scalar. Raises ValueError on an empty mask.
    """
    require_same_shape("explained_variance", values=values, returns=returns, mask=mask)
    spread = _variance(returns, mask)
    unexplained = _variance(returns - values, mask)
    if float(spread) == 0:
        return (unexplained == 0).to(values.dtype)
    return 1 - unexplained / spread


@torch.no_grad()
def rloo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """REINFORCE leave-one-out: each score minus the mean of the *other* scores of its group.

    advantage_i = s_i - mean_{j != i} s_j = G / (G - 1) * (s_i - mean(s))               [Ahmadian et al. 2024]

    scores: (B,), in reward units; group_ids: (B,) integers, any values in any order. Returns (B,), in reward
    units. Raises ValueError for a group of one sample, which has no others, and for a score that is not
    finite.
    """
    deviation, index, sizes = _group_deviation("rloo", scores, group_ids)
    if bool((sizes < 2).any()):
        raise ValueError("rloo: every group needs at least 2 samples; a group of 1 has no others to compare with")
    return deviation * (sizes / (sizes - 1))[index]


@torch.no_grad()
def grpo(scores: Tensor, group_ids: Tensor, eps: float) -> Tensor:
    """Group-relative advantage: the score, standardised within its group.

    advantage_i = (s_i - mean(s)) / (std(s) + eps)                  [DeepSeekMath, Shao et al. 2024, § 4.1.2]

    std is the sample standard deviation (divides by G - 1): the paper says only "std", and this is what TRL
    and verl compute. A group whose scores are all equal has the advantage exactly 0, and so has a group of
    one; see `degenerate_groups`.

    scores: (B,); group_ids: (B,) integers, any values in any order; eps: in reward units. Returns (B,),
    dimensionless. Raises ValueError for a score that is not finite.
    """
    deviation, index, sizes = _group_deviation("grpo", scores, group_ids)
    squares = deviation.new_zeros(sizes.shape).index_add(0, index, deviation.square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    # Written as where, so that an all-equal group is 0 and not 0/0 when eps is 0.
    return torch.where(deviation == 0, 0, deviation / (std[index] + eps))


@torch.no_grad()
def dr_grpo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Group-relative advantage without the division by std, which favours questions too easy or too hard.

    advantage_i = s_i - mean(s)                                                              [Liu et al. 2025]

    scores: (B,), in reward units; group_ids: (B,) integers, any values in any order. Returns (B,), in reward
    units. A group of one has advantage 0. Raises ValueError for a score that is not finite.
    """
    return _group_deviation("dr_grpo", scores, group_ids)[0]


@torch.no_grad()
def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """REINFORCE++: discounted returns of the (KL-shaped) token rewards, whitened over the whole batch.

    advantage[t] = whiten(sum_{k >= t} gamma^(k-t) * rewards[k])                              [Hu et al. 2025]

    One episode per row, terminated at its last masked-in token. rewards, mask: (B,T), of the whole batch.
    Returns (B,T), dimensionless, 0 where masked out. Raises ValueError on an empty mask.
    """
    require_same_shape("reinforce_pp", rewards=rewards, mask=mask)
    never, nothing = torch.zeros_like(mask), torch.zeros_like(rewards)
    return masked_whiten(discounted_returns(rewards, mask, never, nothing, gamma), mask)


@torch.no_grad()
def reinforce_pp_baseline(scores: Tensor, group_ids: Tensor) -> Tensor:
    """REINFORCE++ with a group baseline: centred within the group, then whitened over the whole batch.

    advantage = whiten(s_i - mean(s of i's group)), over the B samples                        [Hu et al. 2025]

    Unlike GRPO, one scale serves all groups, so a group whose scores barely differ is not blown up to unit
    variance. scores: (B,); group_ids: (B,) integers, any values in any order. Returns (B,), dimensionless. A
    group of one has advantage 0. Raises ValueError for a score that is not finite.
    """
    deviation, _, _ = _group_deviation("reinforce_pp_baseline", scores, group_ids)
    return masked_whiten(deviation, torch.ones_like(deviation, dtype=torch.bool))


@torch.no_grad()
def degenerate_groups(scores: Tensor, group_ids: Tensor) -> int:
    """Number of groups whose scores are all equal, groups of one included: their samples teach nothing.

    They have advantage 0 under every group baseline, yet their tokens still count in a loss's denominator:
    report it.

    scores: (B,); group_ids: (B,) integers, any values in any order.
    """
    _require_groups("degenerate_groups", scores, group_ids)
    ids, index = torch.unique(group_ids, return_inverse=True)
    lowest = _group_extreme(scores, index, len(ids), "amin")
    return int((lowest == _group_extreme(scores, index, len(ids), "amax")).sum())


def _group_deviation(caller: str, scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score minus group mean (B,), each sample's group as an index (B,), and the size of each group."""
    _require_groups(caller, scores, group_ids)
    scores = scores if scores.is_floating_point() else scores.float()
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    # Measured from the group's lowest score, equal scores are exactly 0, and so is their advantage: a mean
    # that is off by one rounding, divided by a std that is too, would come out as a real-looking advantage.
    above_lowest = scores - _group_extreme(scores, index, len(sizes), "amin")[index]
    mean = above_lowest.new_zeros(sizes.shape).index_add(0, index, above_lowest) / sizes
    return above_lowest - mean[index], index, sizes.to(scores.dtype)


def _group_extreme(scores: Tensor, index: Tensor, num_groups: int, which: str) -> Tensor:
    return scores.new_zeros(num_groups).scatter_reduce(0, index, scores, which, include_self=False)


def _require_groups(caller: str, scores: Tensor, group_ids: Tensor) -> None:
    require_same_shape(caller, scores=scores, group_ids=group_ids)
    if scores.ndim != 1:
        raise ValueError(f"{caller}: scores must have shape (B,), got {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{caller}: a score is nan or inf, and would spoil the baseline of its whole group")


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
