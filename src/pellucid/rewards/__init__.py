"""Reward sources: whatever gives a sample its score. Each takes samples and returns one Score for each, in order."""

from __future__ import annotations

from typing import Protocol

from pellucid.rewards.function import FunctionReward, load_function
from pellucid.rewards.model import ModelReward
from pellucid.types import Sample, Score

__all__ = ["FunctionReward", "ModelReward", "RewardSource", "load_function"]


class RewardSource(Protocol):
    name: str

    def score(self, samples: list[Sample]) -> list[Score]: ...
