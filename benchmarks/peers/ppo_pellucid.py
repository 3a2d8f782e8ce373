"""Pellucid as a contestant: one run is one call of `stages.ppo.iterate`, with PPO's four models or a group's baseline.

options: algo, the hyper-parameters (`benchmarks/training.py`); reward_model, critic: folders; reward = "alternating" instead
of a reward model; config: {section: {key: value}} of Pellucid's own settings; record: whether the iteration ends with its
record, into a temporary folder; its size is then in "recorded_bytes". The phases of each run are in "phases", and how far the
sampler's log-probs are from the trainer's, in nats, in "parity": in float32 only after the first iteration.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid_setup import ppo_config
from worker import serve


class Alternating:
    """A reward that costs nothing and leaves no group with equal scores: 0, 1, 0, 1, ..."""

    name = "alternating"

    def score(self, samples: list[Any]) -> list[Any]:
        from pellucid.types import Score

        return [Score(float(i % 2), self.name) for i in range(len(samples))]


@dataclass
class State:
    """The workers of one run, and how many iterations they have made."""

    config: Any
    workers: Any
    kl: Any
    stop_token_ids: tuple[int, ...]
    prompts: list[Any] = field(default_factory=list)
    step: int = 0
    recorder: Any = None


def prepare(spec: dict[str, Any]) -> State:
    workload = json.loads(Path(spec["workload"]).read_text())
    reward = Alternating() if spec["options"].get("reward") == "alternating" else None
    state = make_state(spec, workload, reward)
    state.prompts = to_prompts(workload["prompts"])
    if spec["options"].get("record"):
        state.recorder = make_recorder(state, spec["model"])
    return state


def make_recorder(state: State, model: str) -> Any:
    from pellucid.data import load_tokenizer, token_bytes
    from pellucid.trace.record import Recorder, Vocabulary

    folder = Path(tempfile.mkdtemp(prefix="recorded-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = load_tokenizer(model)
    vocabulary = Vocabulary(token_bytes(tokenizer), frozenset(tokenizer.all_special_ids))
    return Recorder(folder, state.config, vocabulary, state.workers.actor.model.device)


def make_state(spec: dict[str, Any], workload: dict[str, Any], reward: Any, seed: int = 0) -> State:
    """reward: a reward source, or None for options["reward_model"]."""
    from pellucid.core import FixedKL
    from pellucid.execution.local import build_workers

    config = ppo_config(spec, workload, seed)
    updates_per_iteration = config.algo.num_epochs * -(-config.batch_size // config.algo.minibatch_size)
    workers = build_workers(config, reward, pad_id=0, total_updates=updates_per_iteration)
    return State(config, workers, FixedKL(config.algo.kl_coef), tuple(workload["stop_token_ids"]))


def to_prompts(rows: list[list[int]], first_id: int = 0) -> list[Any]:
    from pellucid.types import Prompt

    return [Prompt(id=first_id + i, input_ids=ids, text="") for i, ids in enumerate(rows)]


def iteration(state: State, prompts: list[Any]) -> dict[str, Any]:
    """One iteration, timed from the prompts to the synchronised weights."""
    from pellucid.stages.clock import Clock
    from pellucid.stages.ppo import iterate, sampling_params

    state.step += 1
    clock = Clock()
    params = sampling_params(state.config, state.step, state.stop_token_ids)
    start = time.perf_counter()
    batch, samples, stats = iterate(state.step, prompts, params, state.workers, state.kl, state.config, clock=clock)
    if state.recorder:
        weights = state.workers.trained(state.step)
        clock("record", state.recorder.record, state.step, batch, samples, stats, weights)
    seconds = time.perf_counter() - start
    lengths = [len(sample.response_ids) for sample in samples]
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "response_lengths": lengths,
        "score": stats["score/mean"],
        "phases": _group(clock.metrics(), "time/"),
        "parity": _group(stats, "rollout/parity_"),
    } | ({"recorded_bytes": recorded_bytes(state)} if state.recorder else {})


def recorded_bytes(state: State) -> int:
    """What this step's record takes on disk."""
    from pellucid.trace import manifest_path, rollout_path

    folder = state.recorder.run_dir
    return sum(path(folder, state.step).stat().st_size for path in (rollout_path, manifest_path))


def _group(stats: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in stats.items() if name.startswith(prefix)}


def measure(state: State) -> dict[str, Any]:
    return iteration(state, state.prompts)


if __name__ == "__main__":
    serve(prepare, measure)
