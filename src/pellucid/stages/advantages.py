"""From rewards to advantages: one function per `algo.advantage`, over the functions of `core`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pellucid.config import AlgoConfig
from pellucid.core import (
    dr_grpo,
    gae,
    grpo,
    masked_whiten,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)
from pellucid.types import Batch

Made = dict[str, Tensor]
"""{"advantages": (B,T)}, and "returns": (B,T) where there is a critic to fit."""


def _gae(batch: Batch, algo: AlgoConfig) -> Made:
    mask = batch.action_mask
    advantages, returns = gae(
        batch.get("rewards"),
        batch.get("old_values"),
        mask,
        batch.ended,
        batch.bootstrap_values,
        algo.gamma,
        algo.gae_lambda,
    )
    return {
        "advantages": masked_whiten(advantages, mask) if algo.whiten_advantages else advantages,
        "returns": returns,
    }


def _reinforce_pp(batch: Batch, algo: AlgoConfig) -> Made:
    return {"advantages": reinforce_pp(batch.get("rewards"), batch.action_mask, algo.gamma)}


def _per_sample(
    estimate: Callable[[Tensor, Tensor, AlgoConfig], Tensor],
) -> Callable[[Batch, AlgoConfig], Made]:
    """A group baseline: every action of a sample gets the sample's advantage. The sample's score is the sum of its
    rewards, so a KL penalty in the reward is compared within the group too."""

    def advantages(batch: Batch, algo: AlgoConfig) -> Made:
        per_sample = estimate(batch.get("rewards").sum(1), batch.group_ids, algo)
        return {"advantages": per_sample[:, None] * batch.action_mask}

    return advantages


ADVANTAGES: dict[str, Callable[[Batch, AlgoConfig], Made]] = {
    "gae": _gae,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _per_sample(lambda scores, groups, _: reinforce_pp_baseline(scores, groups)),
    "rloo": _per_sample(lambda scores, groups, _: rloo(scores, groups)),
    "grpo": _per_sample(lambda scores, groups, algo: grpo(scores, groups, algo.grpo_eps)),
    "dr_grpo": _per_sample(lambda scores, groups, _: dr_grpo(scores, groups)),
}
