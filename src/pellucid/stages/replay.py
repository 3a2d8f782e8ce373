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
from pellucid.errors import RecordError
from pellucid.metrics import Reporter
from pellucid.rollout import RolloutEngine
from pellucid.stages.clock import Clock
from pellucid.stages.state import PPOState, RewardFunction
from pellucid.trace import BY_NAME, manifest_path, open_rollout, read_manifest, recorded_steps, rollout_path
from pellucid.trace.record import digest, environment, flatten
from pellucid.types import Prompt, Sample, SamplingParams, collate


@dataclass(frozen=True)
class Replay:
    """start: the checkpoint's step that it began from, 0 for the initial models. agreed: what agrees bitwise, by name."""

    step: int
    start: int
    agreed: list[str]


def replay(run_dir: Path, step: int, reward: RewardFunction | None = None, reporter: Reporter | None = None) -> Replay:
    """Execute a recorded step again, and raise RecordError at the first tensor that differs from the record.

    It begins at the newest checkpoint before the step, or at the initial models, and executes the iterations in between.
    The engine samples again, to be compared; what follows is computed from the recorded rollout, if the record holds all of
    it. Nothing is written. reward: as given to `train_ppo`, if the run's reward came that way.
    """
    reporter = reporter or Reporter()
    manifest, recorded = _read(run_dir, step)
    config = _config(run_dir, manifest, reward, reporter)
    state = PPOState(config, reward, None, Reporter(quiet=True))
    checkpoint = newest_whole(run_dir, reporter.say, before=step)
    if checkpoint:
        begun, states = read_checkpoint(checkpoint)
        state.load_state_dict(states, begun)
    start = state.step
    place = f"the checkpoint after step {start}" if start else "the initial models"
    reporter.say(f"step {step}: from {place}, {step - start - 1} steps before it are executed again")
    while state.step < step - 1:
        state.iterate(Clock())

    engine = _Recorded(state.workers.engine, recorded)
    state.workers = replace(state.workers, engine=engine)
    batch, _, _ = state.iterate(Clock())
    values = flatten(batch) | flatten(collate(engine.sampled, pad_id=0))
    weights = {f"weights of the {entry['role']}": entry["hash"] for entry in state.workers.trained(step)}
    agreed = list(_compare(step, manifest, recorded, values, weights))
    reporter.say(f"step {step}: {len(agreed)} of {len(agreed)} hashes agree with the record")
    return Replay(step, start, agreed)


class _Recorded:
    """An engine that samples, and then hands out what was recorded in place of it."""

    def __init__(self, engine: RolloutEngine, recorded: dict[str, Any]) -> None:
        self.engine, self.recorded = engine, recorded
        self.sampled: list[Sample] = []

    @property
    def version(self) -> int:
        return self.engine.version

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        self.engine.check(prompts, params)

    def load_weights(self, source: Any, version: int) -> None:
        self.engine.load_weights(source, version)

    def generate(self, prompts: list[Prompt], params: SamplingParams, *, progress: Any = None) -> list[Sample]:
        self.sampled = self.engine.generate(prompts, params, progress=progress)
        if len(self.recorded["row"]) < len(self.sampled):
            return self.sampled
        return [self._sample(prompts, row) for row in range(len(self.sampled))]

    def _sample(self, prompts: list[Prompt], row: int) -> Sample:
        found = {name: column[row] for name, column in self.recorded.items()}
        prompt = prompts[found["group_ids"]]
        ids = found["input_ids"].tolist()
        if ids[: len(prompt.input_ids)] != prompt.input_ids:
            raise RecordError(
                f"input_ids: the prompt of sample {row} is not the one that was recorded; the data set, the tokenizer or "
                "the seed has changed, or the record has"
            )
        return Sample(
            prompt=prompt,
            group_id=int(found["group_ids"]),
            sample_index=int(found["sample_index"]),
            input_ids=ids,
            action_mask=found["action_mask"].tolist(),
            rollout_logprobs=found["rollout_logprobs"].tolist(),
            stop_reason=found["stop_reason"],
            policy_version=int(found["policy_version"]),
        )


def _read(run_dir: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, column name -> one value or one array a row) of a recorded step."""
    steps = recorded_steps(run_dir)
    if step not in steps:
        there = f"there are {steps[0]} to {steps[-1]} ({len(steps)} steps)" if steps else "there is none"
        raise RecordError(f"{run_dir}: step {step} was not recorded; {there}")
    manifest = read_manifest(manifest_path(run_dir, step))
    table = open_rollout(rollout_path(run_dir, step)).read()
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in BY_NAME and BY_NAME[name].per == "token":
            ends = column.offsets.to_numpy()
            columns[name] = np.split(column.values.to_numpy(zero_copy_only=False), ends[1:-1])
        else:
            columns[name] = column.to_pylist()
    return manifest, columns


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


def _compare(
    step: int, manifest: dict[str, Any], recorded: dict[str, Any], values: dict[str, Tensor], weights: dict[str, str]
) -> Iterator[str]:
    """The names of what agrees, in the order of production. Raises RecordError at the first that does not."""
    whole = manifest["recorded"] == manifest["samples"]
    for tensor in manifest["tensors"]:
        name, again = tensor["name"], values.get(tensor["name"])
        if again is None:
            raise RecordError(f"step {step}: {name} was recorded, and is not made by this run's config any more")
        kept = _kept(name, recorded, again.dtype) if whole and name in recorded else None
        if digest(again) != tensor["hash"] or (kept is not None and digest(kept) != tensor["hash"]):
            raise RecordError(
                f"step {step}: {name} is the first tensor that differs: {_where(tensor, again, kept, recorded)}"
            )
        yield name
    for entry in manifest["weights"]:
        name = f"weights of the {entry['role']}"
        if name in weights:
            if weights[name] != entry["hash"]:
                raise RecordError(f"step {step}: the {name} after the step differ, and every tensor before agrees")
            yield name


def _kept(name: str, recorded: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The recorded column as `flatten` would give it."""
    column = recorded[name]
    if BY_NAME[name].per == "token":
        return torch.from_numpy(np.concatenate(column)).to(dtype)
    return torch.tensor(
        [value for row in column for value in row] if BY_NAME[name].per == "alternative" else column
    ).to(dtype)


def _where(tensor: dict[str, Any], again: Tensor, kept: Tensor | None, recorded: dict[str, Any]) -> str:
    """What disagrees with what, and at which sample and token first."""
    if kept is None:
        return f"its hash was {tensor['hash']}, replayed it is {digest(again)}"
    if kept.shape != again.shape:
        return f"recorded are {tuple(kept.shape)} values, replayed {tuple(again.shape)}"
    bits = [values.contiguous().view(torch.uint8).reshape(len(values), -1) for values in (kept, again)]
    differing = (bits[0] != bits[1]).any(1).nonzero()
    if not len(differing):
        return "the recorded values are those replayed, but the manifest holds another hash: the manifest was changed"
    first = int(differing[0])
    ends = np.cumsum([len(row) for row in recorded["input_ids"]])
    row, column = first, None
    if BY_NAME[tensor["name"]].per != "sample":
        row = int(np.searchsorted(ends, first, side="right"))
        column = first - int(ends[row - 1] if row else 0)
    place = f"sample {row}" + ("" if column is None else f", token {column}")
    odd = (
        ": the recorded file was changed, its manifest agrees with the replay"
        if digest(again) == tensor["hash"]
        else ""
    )
    return f"at {place} recorded {_plain(kept[first])}, replayed {_plain(again[first])} ({len(differing)} differ){odd}"


def _plain(value: Tensor) -> str:
    return str(value.tolist())
