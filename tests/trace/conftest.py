"""Tiny recorded runs, each with the very batches that the recorder was given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from tiny_runs import ppo_config, save_models

from pellucid.config import PPOConfig
from pellucid.metrics import Reporter
from pellucid.stages.run import train_ppo
from pellucid.trace.record import Recorder
from pellucid.types import Batch, Sample


@dataclass
class Run:
    """taken: step -> (batch, samples), as they came to the recorder."""

    config: PPOConfig
    taken: dict[int, tuple[Batch, list[Sample]]] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        return self.config.run.dir

    def frame(self, step: int) -> pd.DataFrame:
        return pd.read_parquet(self.dir / "rollouts" / f"step-{step:06d}.parquet")

    def manifest(self, step: int) -> dict[str, Any]:
        return json.loads((self.dir / "manifests" / f"step-{step:06d}.json").read_text())

    def tensors(self, step: int) -> dict[str, dict[str, Any]]:
        return {tensor["name"]: tensor for tensor in self.manifest(step)["tensors"]}

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """With so many stop tokens that responses end early and differ in length."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    path = folder / "actor" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(20, 70))}))
    return folder


@pytest.fixture(scope="session")
def record_run(models, tmp_path_factory) -> Callable[..., Run]:
    """record_run(models=…, reward=…, **overrides of tiny_runs.ppo_config) -> Run."""
    home, numbers, actor = tmp_path_factory.mktemp("runs"), itertools.count(), models
    original = Recorder.record

    def record(models: Path = actor, reward: Any = None, **overrides: Any) -> Run:
        run = Run(ppo_config(models, home / f"run-{next(numbers)}", **overrides))

        def spy(self: Recorder, step: int, batch: Batch, samples: list[Sample], *rest: Any) -> None:
            run.taken[step] = (batch, samples)
            original(self, step, batch, samples, *rest)

        with patch.object(Recorder, "record", spy):
            train_ppo(run.config, reward=reward, reporter=Reporter(quiet=True))
        return run

    return record
