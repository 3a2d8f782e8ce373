"""A trained reward model as a reward source: all tokens of all samples at once, one scalar each."""

from __future__ import annotations

import torch

from pellucid.models import ScalarModel
from pellucid.types import Sample, Score, collate


class ModelReward:
    """Scores whole sequences (prompt and response) with a scalar-head model, read at the last token."""

    def __init__(self, model: ScalarModel, batch_size: int, name: str = "reward_model") -> None:
        self.model, self.batch_size, self.name = model, batch_size, name

    @torch.inference_mode()
    def score(self, samples: list[Sample]) -> list[Score]:
        by_length = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
        values = [0.0] * len(samples)
        for start in range(0, len(samples), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            batch = collate([samples[i] for i in rows], pad_id=0).to(self.model.device)
            for i, value in zip(rows, self.model.scores(batch.input_ids, batch.attention_mask).tolist(), strict=True):
                values[i] = value
        return [Score(value, self.name) for value in values]
