"""Pellucid's PPO in environments: one run is some iterations of a training that goes on, metrics written as in any run.

workload: iterations, and config, the sections of `pellucid gym`. Tokens are environment steps, as `gym_sb3.py` counts them.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import serve


@dataclass
class State:
    training: Any
    metrics: Any
    iterations: int


def prepare(spec: dict[str, Any]) -> State:
    from pellucid.config import GymConfig
    from pellucid.metrics import Metrics
    from pellucid.stages.gym import GymState

    workload = json.loads(Path(spec["workload"]).read_text())
    run = {"dir": tempfile.mkdtemp(prefix="gym-"), "threads": spec["threads"]}
    config = GymConfig.model_validate({**workload["config"], "run": run})
    return State(GymState(config), Metrics(config.run.dir, ()), workload["iterations"])


def measure(state: State) -> dict[str, Any]:
    from pellucid.stages.clock import Clock

    started = time.perf_counter()
    for _ in range(state.iterations):
        _, stats = state.training.iterate(Clock())
        state.metrics.log(state.training.step, stats)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": state.iterations * state.training.config.batch_size}


if __name__ == "__main__":
    serve(prepare, measure)
