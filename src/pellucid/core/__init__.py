"""The mathematics: pure torch functions, no I/O, no models; the only state is that of the KL controllers."""

from pellucid.core.advantages import (
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
from pellucid.core.kl import AdaptiveKL, FixedKL, kl_estimate, kl_loss, kl_shaped_rewards
from pellucid.core.losses import bradley_terry, cispo, dpo, gspo, nll, ppo_clip, value_clip
from pellucid.core.masked import aggregate, masked_mean, masked_whiten

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "aggregate",
    "bradley_terry",
    "cispo",
    "degenerate_groups",
    "discounted_returns",
    "dpo",
    "dr_grpo",
    "explained_variance",
    "gae",
    "grpo",
    "gspo",
    "kl_estimate",
    "kl_loss",
    "kl_shaped_rewards",
    "masked_mean",
    "masked_whiten",
    "nll",
    "ppo_clip",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
    "value_clip",
]
