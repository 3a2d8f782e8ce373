"""The task of the learning benchmark, for both systems: sample even token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def even_share(response: list[int]) -> float:
    """Share of the response's tokens whose id is even."""
    return sum(token % 2 == 0 for token in response) / len(response)


def even_module(prompt_length: int) -> Any:
    """The same as a reward module as TRL wants it: score(model(ids).hidden_states[-1]) is (B,T,1), and column t the share
    in the response up to token t."""
    import torch
    from torch import nn
    from transformers.utils import ModelOutput

    class Backbone(nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> ModelOutput:
            even = (input_ids % 2 == 0).float()
            even[:, :prompt_length] = 0
            tokens = torch.arange(1 - prompt_length, input_ids.shape[1] - prompt_length + 1).clamp(min=1)
            return ModelOutput(hidden_states=((even.cumsum(1) / tokens)[..., None],))

    class EvenShare(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model, self.score = Backbone(), nn.Identity()

    return EvenShare()


@dataclass
class State:
    """A contestant on the task: each run takes the next seed."""

    spec: dict[str, Any]
    workload: dict[str, Any]
    seeds: Iterator[dict[str, Any]]

    def next_task(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the spec of this seed's models, {"seed", "actor", "critic", "batches"}); batches: prompts of each iteration."""
        task = next(self.seeds)
        options = {**self.spec["options"], "critic": task["critic"]}
        return {**self.spec, "model": task["actor"], "options": options}, task


def prepare(spec: dict[str, Any]) -> State:
    import torch

    torch.set_num_threads(spec["threads"])
    workload = json.loads(Path(spec["workload"]).read_text())
    return State(spec, workload, iter(workload["seeds"]))
