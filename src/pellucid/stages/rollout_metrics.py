"""Figures of one rollout, before anything is learned from it. Every name is explained in docs/metrics.md."""

from __future__ import annotations

from torch import Tensor

from pellucid.core import degenerate_groups, explained_variance, masked_mean
from pellucid.stages.checks import parity_gap
from pellucid.types import Batch, StepStats


def rollout_metrics(batch: Batch) -> StepStats:
    mask, scores = batch.action_mask, batch.get("scores")
    lengths = mask.sum(1).float()
    metrics = {
        "score/mean": scores.mean(),
        "score/std": scores.std(correction=0),
        "score/max": scores.max(),
        "kl/sequence": batch.get("kl").sum(1).mean(),
        "kl/token": masked_mean(batch.get("kl"), mask),
        "rollout/length": lengths.mean(),
        "rollout/tokens": lengths.sum(),
        "rollout/stopped": sum(r == "stop" for r in batch.stop_reason) / len(batch),
        "advantages/abs": masked_mean(batch.get("advantages").abs(), mask),
    }
    if batch.entropy is not None:  # the trainer made a pass of its own
        gap = parity_gap(batch, batch.get("old_logprobs"))
        metrics |= {
            "policy/entropy": masked_mean(batch.entropy, mask),
            "rollout/parity_max": gap.max(),
            "rollout/parity_p99": gap.sort().values[int(0.99 * (len(gap) - 1))],
            "rollout/parity_mean": gap.mean(),
        }
    if len(batch.group_ids.unique()) < len(batch):  # several samples of a prompt
        metrics["groups/degenerate"] = float(degenerate_groups(scores, batch.group_ids))
    if batch.old_values is not None:
        metrics |= {
            "critic/value": masked_mean(batch.old_values, mask),
            "critic/return": masked_mean(batch.get("returns"), mask),
            "critic/explained_variance": explained_variance(batch.old_values, batch.get("returns"), mask),
        }
    return {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}
