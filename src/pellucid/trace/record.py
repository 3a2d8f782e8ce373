"""The recorder: a step's batch into a Parquet file and a manifest. Nothing in training reads them back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pellucid.config import PPOConfig
from pellucid.core import discounted_returns
from pellucid.files import atomic_file, atomic_write, writing
from pellucid.trace.read import manifest_path, recorded_steps, rollout_path
from pellucid.trace.schema import BY_NAME, COLUMNS, PRODUCERS, ROWS_PER_GROUP, SCHEMA_VERSION, Column
from pellucid.trace.spans import Span, SpanFile
from pellucid.types import Batch, Sample, StepStats

BINS = 48
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": False,
    "use_dictionary": [f"{c.name}.list.element" for c in COLUMNS if c.per == "token" and c.dtype != "float32"],
}
"""Log-probs do not repeat, so a dictionary of them is work for nothing; masks and ids do."""
FROZEN = ("ref_logprobs", "score")
"""Phases whose weights are version 0 for ever."""


class Vocabulary(NamedTuple):
    """What each token id stands for. pieces: bytes by id, not always UTF-8 by themselves. special: control tokens."""

    pieces: list[bytes]
    special: frozenset[int]

    def text(self, ids: list[int]) -> str:
        """The ids as text, control tokens left out; marks stand for bytes that are no UTF-8, and ids of no token."""
        known = len(self.pieces)  # a model's vocabulary may be larger, and its tail be sampled
        shown = (self.pieces[i] if i < known else b"\xff" for i in ids if i not in self.special)
        return b"".join(shown).decode(errors="replace")


class Recorder:
    """Writes rollouts/, manifests/, spans.json and vocabulary.parquet into a run directory."""

    def __init__(
        self,
        run_dir: Path,
        config: PPOConfig,
        vocabulary: Vocabulary,
        device: torch.device,
        after_step: int = 0,
    ) -> None:
        """device: where the actor is. after_step: a resumed run's last step; what was recorded beyond
        it is removed."""
        self.run_dir, self.config, self.vocabulary = run_dir, config, vocabulary
        self.origin = {"pellucid": importlib.metadata.version("pellucid"), "environment": environment(device.type)}
        self.spans = SpanFile(run_dir / "spans.json", after_step)
        with writing(run_dir):
            for folder in ("rollouts", "manifests"):
                (run_dir / folder).mkdir(exist_ok=True)
        self._forget([step for step in recorded_steps(run_dir) if step > after_step])
        ids = np.arange(len(vocabulary.pieces))
        special = np.isin(ids, np.array(list(vocabulary.special), dtype=np.int64))
        table = pa.table({"id": ids, "bytes": pa.array(vocabulary.pieces, pa.binary()), "special": special})
        with atomic_file(run_dir / "vocabulary.parquet") as scratch:
            pq.write_table(table, scratch)

    def due(self, step: int) -> bool:
        """Whether the step is recorded: every trace.every-th, and the first and last."""
        return step % self.config.trace.every == 0 or step in (1, self.config.total_steps)

    def record(self, step: int, batch: Batch, samples: list[Sample], stats: StepStats, weights: list[dict]) -> None:
        """Write the step. weights: what the manifest says of each role's weights after the step."""
        kept = torch.nonzero(batch.group_ids < self._groups(samples))[:, 0]
        values = flatten(batch)
        manifest = describe(step, batch, values, self.config, stats) | self.origin | {"recorded": len(kept)}
        if len(kept) < len(batch):
            part = batch.select(kept)
            table = self._table(manifest, part, flatten(part), [samples[i] for i in kept.tolist()], kept)
        else:
            table = self._table(manifest, batch, values, samples, kept)
        # The manifest first: a step is known by its Parquet file, and then has both.
        text = json.dumps(
            manifest | {"weights": weights, "metrics": finite(stats)}
        )  # indented it takes five times as long
        atomic_write(manifest_path(self.run_dir, step), text + "\n")
        with atomic_file(rollout_path(self.run_dir, step)) as scratch:
            pq.write_table(table, scratch, row_group_size=ROWS_PER_GROUP, **PARQUET)
        if self.config.trace.keep:
            self._forget(recorded_steps(self.run_dir)[: -self.config.trace.keep])

    def _groups(self, samples: list[Sample]) -> int:
        """How many of the step's groups are recorded: whole ones, as many as trace.samples has room for, at least one."""
        limit, size = self.config.trace.samples, self.config.rollout.samples_per_prompt
        return max(limit // size, 1) if limit else len(samples)

    def _forget(self, steps: list[int]) -> None:
        for step in steps:
            # The manifest first: a step is known by its Parquet file, and what is known is removed the next time.
            for path in (manifest_path(self.run_dir, step), rollout_path(self.run_dir, step)):
                path.unlink(missing_ok=True)

    def _table(
        self, manifest: dict[str, Any], batch: Batch, values: dict[str, Tensor], samples: list[Sample], rows: Tensor
    ) -> pa.Table:
        """batch, values, samples: what is recorded, in the order of rows, their places in the step's whole batch."""
        text = self.vocabulary.text
        constants = ("schema_version", "step", "num_action_tokens")
        plain: dict[str, Any] = {name: np.full(len(samples), manifest[name]) for name in constants} | {
            "row": rows.numpy(),
            "prompt_id": [s.prompt.id for s in samples],
            "sample_index": [s.sample_index for s in samples],
            "stop_reason": [s.stop_reason for s in samples],
            "prompt": [text(s.prompt.input_ids) for s in samples],
            "response": [text(s.response_ids) for s in samples],
        }
        plain |= {name: value.numpy() for name, value in (summaries(batch) | values).items()}
        offsets = pa.array(np.concatenate([[0], batch.attention_mask.sum(1).cumsum(0).numpy()]), pa.int32())
        columns = {c.name: _arrow(c, plain[c.name], offsets) for c in COLUMNS if c.name in plain}
        fields = [pa.field(name, a.type, metadata=_field_metadata(BY_NAME[name])) for name, a in columns.items()]
        metadata = {"pellucid.schema_version": str(SCHEMA_VERSION), "pellucid.version": manifest["pellucid"]}
        return pa.table(list(columns.values()), schema=pa.schema(fields, metadata=metadata))


def environment(device: str) -> dict[str, Any]:
    """What the last bits of a number depend on beside the code."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"device": device, "torch": torch.__version__, "cpu": cpu, "threads": torch.get_num_threads()}


def describe(step: int, batch: Batch, values: dict[str, Tensor], config: PPOConfig, stats: StepStats) -> dict[str, Any]:
    """The manifest of a step, but for its weights and metrics: the algorithm's constants and every tensor's origin.

    values: flatten(batch)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "samples": len(batch),
        "num_action_tokens": int(batch.action_mask.sum()),
        "width": batch.input_ids.shape[1],
        "algorithm": algorithm(config, stats["kl/coef"]),
        "whitening": whitening(batch, config),
        "tensors": [_tensor(BY_NAME[name], step, batch, values[name], config) for name in values],
    }


def flatten(batch: Batch) -> dict[str, Tensor]:
    """The tensors of the batch that are columns, in the order of production and without padding, row after row: (N,) for a
    value a token, (N,K) for alternatives, (B,) for a value a sample."""
    order, mask = list(PRODUCERS), batch.attention_mask
    there = [c for c in COLUMNS if c.phase and getattr(batch, c.name) is not None]
    there.sort(key=lambda column: order.index(_origin(column, batch)))
    return {c.name: batch.get(c.name) if c.per == "sample" else batch.get(c.name)[mask] for c in there}


def digest(values: Tensor) -> str:
    """BLAKE2b-128 of the values, little-endian in their own type, one byte a boolean. 32 hexadecimal digits."""
    data = values.numpy()
    return hashlib.blake2b(data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes(), digest_size=16).hexdigest()


def summaries(batch: Batch) -> dict[str, Tensor]:
    """Per-sample figures that a table of samples sorts by, (B,) each."""
    mask = batch.action_mask
    length = mask.sum(1)
    sums = {
        "kl_sequence": batch.kl,
        "reward_sum": batch.rewards,
        "advantage_mean": batch.advantages,
        "entropy_mean": batch.entropy,
        "clipped_share": batch.clipped,
    }
    found = {name: (value * mask).sum(1).float() for name, value in sums.items() if value is not None}
    means = {
        name: found[name] / length for name in ("advantage_mean", "entropy_mean", "clipped_share") if name in found
    }
    return {"length": length} | found | means


def algorithm(config: PPOConfig, kl_coef: float) -> dict[str, Any]:
    """Every constant that the arithmetic of a token needs."""
    keys = (
        "advantage", "policy_loss", "clip_eps_low", "clip_eps_high", "dual_clip", "value_clip_eps", "kl_in", "kl_loss",
        "gamma", "gae_lambda", "whiten_advantages", "aggregate", "num_epochs", "minibatch_size", "grpo_eps", "ptx_coef",
    )  # fmt: skip
    rollout = config.rollout.model_dump(include={"temperature", "max_new_tokens", "missing_eos_penalty"})
    of_reward = {"reward_clip": config.reward.clip, "kl_coef": kl_coef}
    return config.algo.model_dump(include=set(keys)) | rollout | of_reward


def whitening(batch: Batch, config: PPOConfig) -> dict[str, float] | None:
    """Mean and biased variance of what was whitened into advantages, or None where nothing was."""
    algo, mask = config.algo, batch.action_mask
    if algo.advantage == "gae" and algo.whiten_advantages:
        raw = (batch.get("returns").double() - batch.get("old_values"))[mask]
    elif algo.advantage == "reinforce_pp":
        never, nothing = torch.zeros_like(mask), torch.zeros_like(batch.get("rewards"))
        raw = discounted_returns(batch.get("rewards"), mask, never, nothing, algo.gamma)[mask].double()
    elif algo.advantage == "reinforce_pp_baseline":
        sums = batch.get("rewards").double().sum(1)
        _, index, counts = batch.group_ids.unique(return_inverse=True, return_counts=True)
        means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, sums) / counts
        raw = sums - means[index]
    else:
        return None
    return {"mean": raw.mean().item(), "variance": raw.var(correction=0).item()}


def finite(stats: StepStats) -> dict[str, float | None]:
    """JSON has no NaN: null says that the metric was not defined."""
    return {name: value if np.isfinite(value) else None for name, value in stats.items()}


def step_spans(phases: list[tuple[str, float, float]], batch: Batch | None = None, epochs: int = 1) -> list[Span]:
    """Spans of phases (name, start, seconds), with the tokens that each went over where a batch tells."""
    if batch is None:
        return [Span(*phase) for phase in phases]
    all_at_once = int(batch.attention_mask.sum())
    tokens = {"generate": int(batch.action_mask.sum()), "update_critic": all_at_once * epochs}
    tokens["update_actor"] = tokens["update_critic"]
    passes = ("score", "old_logprobs", "alternatives", "ref_logprobs", "values")
    tokens |= dict.fromkeys(passes, all_at_once)
    return [Span(name, start, seconds, tokens.get(name)) for name, start, seconds in phases]


def _origin(column: Column, batch: Batch) -> str:
    """The phase that made it in this very batch."""
    of_engine = batch.old_logprobs is batch.rollout_logprobs
    if column.name == "old_logprobs" and of_engine:
        return "generate"
    return "update_actor" if column.name == "entropy" and of_engine else column.phase


def _tensor(column: Column, step: int, batch: Batch, values: Tensor, config: PPOConfig) -> dict[str, Any]:
    value, phase = batch.get(column.name), _origin(column, batch)
    version = int(batch.policy_version.min()) if phase == "generate" else 0 if phase in FROZEN else step - 1
    epoch = {"epoch": config.algo.num_epochs if column.name != "entropy" else 1} if phase.startswith("update") else {}
    return {
        "name": column.name,
        "producer": f"{PRODUCERS[phase]}/0",
        "phase": phase,
        "weight_version": version,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "bytes": value.numel() * value.element_size(),
        "hash": digest(values),
    } | epoch | _figures(column, value if column.per == "sample" else value[batch.action_mask])  # fmt: skip


def _figures(column: Column, values: Tensor) -> dict[str, Any]:
    """Mean, std, range and histogram over the action tokens (or the samples)."""
    if values.dtype in (torch.int32, torch.int64) or not values.numel():
        return {}
    wide = values.double()
    if values.dtype == torch.bool:
        return {"mean": wide.mean().item(), "count": values.numel()}
    low, high = values.min().item(), values.max().item()
    if not np.isfinite([low, high]).all():
        return {"count": values.numel()}
    # In float64: in float32 a narrow range has no room for that many edges.
    beside = max(0.5, 1e-6 * abs(low))
    counts, edges = np.histogram(wide.numpy(), BINS, (low, high) if high > low else (low - beside, low + beside))
    return {
        "mean": wide.mean().item(), "std": wide.std(correction=0).item(), "min": low, "max": high, "count": values.numel(),
        "histogram": {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()},
    }  # fmt: skip


def _arrow(column: Column, values: Any, offsets: pa.Array) -> pa.Array:
    kind = getattr(pa, {"bool": "bool_"}.get(column.dtype, column.dtype))()
    if column.per == "alternative":
        size = values.shape[1]
        inner = pa.array(np.arange(len(values) + 1) * size, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1), kind)))
    array = pa.array(values, kind)
    return pa.ListArray.from_arrays(offsets, array) if column.per == "token" else array


def _field_metadata(column: Column) -> dict[str, str]:
    return {"meaning": column.meaning} | ({"unit": column.unit} if column.unit else {})
