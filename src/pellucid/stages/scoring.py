"""From samples to the (B,) scores that are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.config import PPOConfig
from pellucid.errors import RewardError
from pellucid.rewards import RewardSource
from pellucid.types import Sample


def score_samples(samples: list[Sample], reward: RewardSource, config: PPOConfig) -> Tensor:
    """(B,) float32: the source's value, less missing_eos_penalty where the response was cut by length, then clipped.

    Raises RewardError for a sample that the source calls not applicable: with one source there is no score to give.
    """
    scores = raw_scores(samples, reward)
    penalty = config.rollout.missing_eos_penalty
    scores = scores - penalty * torch.tensor([s.stop_reason == "length" for s in samples])
    return scores if config.reward.clip is None else scores.clamp(-config.reward.clip, config.reward.clip)


def raw_scores(samples: list[Sample], reward: RewardSource) -> Tensor:
    """(B,) float32, as the source gives them."""
    values: list[float] = []
    for sample, score in zip(samples, reward.score(samples), strict=True):
        if score.value is None:
            raise RewardError(
                f"{reward.name} has no score for prompt {sample.prompt.id}, sample {sample.sample_index} "
                "(it returned None, not applicable), and there is no other source"
            )
        values.append(score.value)
    return torch.tensor(values)
