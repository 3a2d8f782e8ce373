"""A recorded step, executed again and compared with the record, tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.checkpoint import newest_whole, read_checkpoint
from pellucid.config import PPOConfig, load_config
from pellucid.errors import IntegrityError, RecordError
from pellucid.metrics import Reporter
from pellucid.rollout import RolloutEngine
from pellucid.stages.clock import Clock
from pellucid.stages.state import PPOState, RewardFunction
from pellucid.trace import BY_NAME, manifest_path, read_manifest, read_rollout, recorded_steps, rollout_path
from pellucid.trace.record import digest, environment, flatten
from pellucid.types import Batch, Prompt, Sample, SamplingParams, collate


@dataclass(frozen=True)
class Replay:
    """start: the checkpoint's step that it began from, 0 for the initial models. agreed: what agrees bitwise, by name."""

    step: int
    start: int
    agreed: list[str]


def replay(run_dir: Path, step: int, reward: RewardFunction | None = None, reporter: Reporter | None = None) -> Replay:
    """Execute a recorded step again, and raise RecordError at the first tensor that differs from the record.

    It begins at the newest checkpoint before the step, or at the initial models, and executes the iterations in between.
    What the engine samples is compared before anything is computed from it, so what follows is computed from the recorded
    rollout. Nothing is written. reward: as given to `train_ppo`, if the run's reward came that way.
    """
    reporter = reporter or Reporter()
    record = _read(run_dir, step)
    state = PPOState(_config(run_dir, record.manifest, reward, reporter), reward, None, Reporter(quiet=True))
    checkpoint = newest_whole(run_dir, reporter.say, before=step)
    if checkpoint:
        begun, states = read_checkpoint(checkpoint)
        state.load_state_dict(states, begun)
    start = state.step
    place = f"the checkpoint after step {start}" if start else "the initial models"
    reporter.say(f"step {step}: from {place}, {step - start - 1} steps before it are executed again")
    while state.step < step - 1:
        _iterate(state)
    state.workers = replace(state.workers, engine=_Watched(state.workers.engine, record))
    batch = _iterate(state)
    agreed = [*record.agreeing(batch), *record.agreeing_weights(state.workers.trained(step))]
    missing = [t["name"] for t in record.manifest["tensors"] if t["name"] not in agreed]
    if missing:
        raise RecordError(f"step {step}: {missing[0]} was recorded, and this run's config does not make it any more")
    reporter.say(f"step {step}: {len(agreed)} of {len(agreed)} hashes agree with the record")
    return Replay(step, start, agreed)


def _iterate(state: PPOState) -> Batch:
    try:
        return state.iterate(Clock())[0]
    except IntegrityError as error:
        raise RecordError(
            "a check that the run passed fails when it is executed again, so the config, the data, the models or the code "
            f"changed: {error}"
        ) from error


class _Watched:
    """The run's engine; what it samples is compared with the record before anyone else sees it."""

    def __init__(self, engine: RolloutEngine, record: _Record) -> None:
        self.engine, self.record = engine, record

    @property
    def version(self) -> int:
        return self.engine.version

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        self.engine.check(prompts, params)

    def load_weights(self, source: Any, version: int) -> None:
        self.engine.load_weights(source, version)

    def generate(self, prompts: list[Prompt], params: SamplingParams, *, progress: Any = None) -> list[Sample]:
        samples = self.engine.generate(prompts, params, progress=progress)
        list(self.record.agreeing(collate(samples, pad_id=0)))
        return samples


@dataclass(frozen=True)
class _Record:
    """A recorded step. columns: name -> one value a row, or one array a row."""

    step: int
    manifest: dict[str, Any]
    columns: dict[str, Any]

    def agreeing(self, batch: Batch) -> Iterator[str]:
        """The tensors of a batch, as far as it has come, that agree with the record, in the order of production.

        Raises RecordError at the first that does not. The manifest's hash is of the whole batch; where the file holds some of
        its rows, these are compared with theirs.
        """
        rows = torch.tensor(self.columns["row"])
        values = flatten(batch)
        whole = len(rows) == len(batch)
        there = values if whole else flatten(batch.select(rows[rows < len(batch)]))
        for tensor in self.manifest["tensors"]:
            name = tensor["name"]
            if name not in values:
                continue
            kept = self._kept(name, values[name].dtype)
            if digest(values[name]) != tensor["hash"] or (kept is not None and digest(kept) != digest(there[name])):
                where = self._where(tensor, values[name], kept, there[name])
                raise RecordError(f"step {self.step}: {name} is the first tensor that differs: {where}")
            yield name

    def agreeing_weights(self, weights: list[dict[str, Any]]) -> Iterator[str]:
        recorded = {entry["role"]: entry["hash"] for entry in self.manifest["weights"]}
        for entry in weights:
            name = f"weights of the {entry['role']}"
            if recorded.get(entry["role"]) != entry["hash"]:
                raise RecordError(f"step {self.step}: the {name} after the step differ, and every tensor before agrees")
            yield name

    def _kept(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The recorded column as `flatten` would give it; None where the file does not have it."""
        column, per = self.columns.get(name), BY_NAME[name].per
        if column is None:
            return None
        if per == "token":
            return torch.from_numpy(np.concatenate(column)).to(dtype)
        return torch.tensor([value for row in column for value in row] if per == "alternative" else column).to(dtype)

    def _where(self, tensor: dict[str, Any], again: Tensor, kept: Tensor | None, there: Tensor) -> str:
        """What disagrees with what, and at which sample and token first."""
        if kept is None:
            return f"its hash was {tensor['hash']}, replayed it is {digest(again)}"
        if kept.shape != there.shape:
            return f"recorded are {len(kept)} values, replayed {len(there)}; is the data set the one of the run?"
        bits = [values.contiguous().view(torch.uint8).reshape(len(values), -1) for values in (kept, there)]
        differing = (bits[0] != bits[1]).any(1).nonzero()
        if not len(differing):
            if len(self.columns["row"]) < self.manifest["samples"]:
                return "the recorded samples agree, and the hash of the whole batch does not"
            return (
                "the recorded values are those replayed, but the manifest holds another hash: the manifest was changed"
            )
        first = int(differing[0])
        changed = digest(again) == tensor["hash"]
        odd = ": the recorded file was changed, its manifest agrees with the replay" if changed else ""
        values = f"recorded {kept[first].tolist()}, replayed {there[first].tolist()} ({len(differing)} differ)"
        return f"at {self._place(tensor['name'], first)} {values}{odd}"

    def _place(self, name: str, index: int) -> str:
        """The sample, and the token, of an index into a flattened column."""
        if BY_NAME[name].per == "sample":
            return f"sample {self.columns['row'][index]}"
        ends = np.cumsum([len(row) for row in self.columns["input_ids"]])
        row = int(np.searchsorted(ends, index, side="right"))
        return f"sample {self.columns['row'][row]}, token {index - int(ends[row - 1] if row else 0)}"


def _read(run_dir: Path, step: int) -> _Record:
    steps = recorded_steps(run_dir)
    if step not in steps:
        there = f"there are {steps[0]} to {steps[-1]} ({len(steps)} steps)" if steps else "there is none"
        raise RecordError(f"{run_dir}: step {step} was not recorded; {there}")
    manifest, table = read_manifest(manifest_path(run_dir, step)), read_rollout(rollout_path(run_dir, step))
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in BY_NAME and BY_NAME[name].per == "token":
            ends = column.offsets.to_numpy()
            columns[name] = np.split(column.values.to_numpy(zero_copy_only=False), ends[1:-1])
        else:
            columns[name] = column.to_pylist()
    return _Record(step, manifest, columns)


def _config(run_dir: Path, manifest: dict[str, Any], reward: RewardFunction | None, reporter: Reporter) -> PPOConfig:
    config = load_config(PPOConfig, run_dir / "config.toml", [])
    if config.models.reward is None and config.reward.function is None and reward is None:
        raise RecordError(
            f"{run_dir}: its reward was a Python function given to train_ppo; replay it from Python, with "
            "pellucid.replay(run_dir, step, reward=…)"
        )
    then = manifest["environment"]
    for name, now in environment(then["device"]).items():
        if name != "threads" and then[name] != now:
            reporter.say(f"recorded with {name} {then[name]}, replayed with {now}: the last bits may differ")
    precision = next(entry["precision"] for entry in manifest["weights"] if entry["role"] == "actor")
    same = {"threads": then["threads"], "device": then["device"], "precision": precision}
    return config.model_copy(update={"run": config.run.model_copy(update=same)})
