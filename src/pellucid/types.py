"""What flows through a run: Prompt -> Sample (ragged) -> Batch (padded).

Axes: P prompts, G samples per prompt, B = P * G, T padded tokens. Column t describes token t (docs/architecture.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

StopReason = Literal["stop", "length"]
StepStats = dict[str, float]
"""Metric name -> value, e.g. {"actor/clip_fraction": 0.04}. Every name is explained in docs/metrics.md."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the things it belongs to, such as (run seed, step): the same in every process and order."""
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Prompt:
    """One question to the policy.

    id: position in its data set, stable over epochs and runs. text: a string, or a list of chat messages.
    columns: the other fields of the row, handed to reward functions by name.
    """

    id: int
    input_ids: list[int]
    text: str | list[dict[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Seeds are per request, so a sample does not depend on its neighbours in the batch.

    temperature: 0 means greedy. top_p: 1 means off. top_k: 0 means off. stop_token_ids: a sampled one ends the
    response and is part of it. seed, step: with the prompt's id and the sample's index they make the request's seed.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    samples_per_prompt: int = 1
    seed: int = 0
    step: int = 0

    def request_seed(self, prompt_id: int, sample_index: int) -> int:
        """63-bit seed of one request."""
        return derive_seed(self.seed, self.step, prompt_id, sample_index)


@dataclass(frozen=True)
class Sample:
    """One sampled sequence, ragged, as an engine returns it.

    input_ids: prompt then response, (T_i,). action_mask, rollout_logprobs: (T_i,), column t describes token t; False
    and 0.0 on tokens that the policy did not sample. rollout_logprobs are float32 log-softmax(logits / temperature)
    before top-p and top-k. stop_reason: "stop" when a stop token was sampled (it is an action), "length" otherwise.
    """

    prompt: Prompt
    group_id: int
    sample_index: int
    input_ids: list[int]
    action_mask: list[bool]
    rollout_logprobs: list[float]
    stop_reason: StopReason
    policy_version: int

    @property
    def response_ids(self) -> list[int]:
        return self.input_ids[len(self.prompt.input_ids) :]


@dataclass(frozen=True)
class Score:
    """What one reward source says of one sample: a value, or None for "not applicable". Never 0 for a failure."""

    value: float | None
    source: str = ""


class _Rows:
    """What padded batches share: rows can be picked, and moved to a device. Fields are tensors or per-row tuples."""

    attention_mask: Tensor

    def select(self, rows: Tensor) -> Self:
        """The given rows (n,), cut to their longest sequence."""
        width = self.attention_mask.shape[1]
        length = int(self.attention_mask[rows].sum(1).max()) if width > 1 else width

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                picked = value.index_select(0, rows)
                return picked if value.dim() == 1 or length == width else picked[:, :length]
            return tuple(value[i] for i in rows.tolist()) if isinstance(value, tuple) and value else value

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var]

    def to(self, device: torch.device | str) -> Self:
        if self.attention_mask.device == torch.device(device):
            return self
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{k: v.to(device) for k, v in held.items() if isinstance(v, Tensor)})  # type: ignore[type-var]


@dataclass(frozen=True)
class SupervisedBatch(_Rows):
    """Right-padded tensors of B supervised sequences; loss_mask marks the tokens that are learned."""

    input_ids: Tensor  # (B,T) int64
    attention_mask: Tensor  # (B,T) bool
    loss_mask: Tensor  # (B,T) bool


@dataclass(frozen=True)
class Batch(_Rows):
    """Right-padded tensors of B sequences. A field is None until the stage that makes it; nothing is edited in place."""

    input_ids: Tensor  # (B,T) int64
    attention_mask: Tensor  # (B,T) bool
    position_ids: Tensor  # (B,T) int64
    response_mask: Tensor  # (B,T) bool
    action_mask: Tensor  # (B,T) bool
    rollout_logprobs: Tensor  # (B,T) float32
    ended: Tensor  # (B,T) bool
    bootstrap_values: Tensor  # (B,T) float32
    group_ids: Tensor  # (B,) int64
    policy_version: Tensor  # (B,) int64
    stop_reason: tuple[StopReason, ...]  # (B,), or empty where rows are environments
    scores: Tensor | None = None  # (B,)
    old_logprobs: Tensor | None = None  # (B,T)
    entropy: Tensor | None = None  # (B,T) nats
    ref_logprobs: Tensor | None = None  # (B,T)
    old_values: Tensor | None = None  # (B,T)
    kl: Tensor | None = None  # (B,T) k1 against the reference
    rewards: Tensor | None = None  # (B,T)
    advantages: Tensor | None = None  # (B,T)
    returns: Tensor | None = None  # (B,T)
    top_ids: Tensor | None = None  # (B,T,K) the likeliest tokens before the updates, where they are recorded
    top_logprobs: Tensor | None = None  # (B,T,K)
    observations: Tensor | None = None  # (B,T,O) float32, where rows are environments: what action t answers to
    # What follows is of the last epoch's pass over each sample, before the optimizer step that it led to.
    logprobs: Tensor | None = None  # (B,T)
    log_ratio: Tensor | None = None  # (B,T)
    ratio: Tensor | None = None  # (B,T)
    clipped: Tensor | None = None  # (B,T) bool
    logprob_grads: Tensor | None = None  # (B,T) d actor loss / d logprobs, without ptx
    values: Tensor | None = None  # (B,T)
    value_clipped: Tensor | None = None  # (B,T) bool
    value_grads: Tensor | None = None  # (B,T) d value loss / d values
    minibatch: Tensor | None = None  # (B,) which optimizer step of the epoch, from 0
    actor_denominator: Tensor | None = None  # (B,) what that step's loss was divided by
    critic_denominator: Tensor | None = None  # (B,)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def having(self, **made: Tensor) -> Batch:
        """A new batch with the fields that a stage made. A field is made once: making it again is a ValueError."""
        again = [name for name in made if getattr(self, name) is not None]
        if again:
            raise ValueError(f"batch already has {', '.join(again)}")
        return replace(self, **made)

    def get(self, name: str) -> Tensor:
        """The field, or a ValueError that names the missing one."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"batch has no {name} yet")
        return value


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Sample -> Batch: right-padded to the longest sequence. Masks come from the samples, never from comparing ids.

    The episode ends on the last action. A response cut by length is treated as terminated: its value beyond is 0.
    """
    if not samples:
        raise ValueError("collate needs at least one sample")
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    prompt_lengths = torch.tensor([len(s.prompt.input_ids) for s in samples])
    columns = torch.arange(int(lengths.max())).expand(len(samples), -1)
    attention_mask = columns < lengths[:, None]
    action_mask = pad([s.action_mask for s in samples], False, torch.bool)
    last_action = (columns * action_mask).max(dim=1).values
    return Batch(
        input_ids=pad([s.input_ids for s in samples], pad_id, torch.int64),
        attention_mask=attention_mask,
        position_ids=columns * attention_mask,
        response_mask=attention_mask & (columns >= prompt_lengths[:, None]),
        action_mask=action_mask,
        rollout_logprobs=pad([s.rollout_logprobs for s in samples], 0.0, torch.float32),
        ended=(columns == last_action[:, None]) & action_mask,
        bootstrap_values=torch.zeros(columns.shape),
        group_ids=torch.tensor([s.group_id for s in samples]),
        policy_version=torch.tensor([s.policy_version for s in samples]),
        stop_reason=tuple(s.stop_reason for s in samples),
    )


def transitions(batch: Batch) -> Batch:
    """Every action as a row of its own, (B,T) -> (num_action_tokens, 1), row by row; a field of the row goes to each of
    its actions. For policies that answer to an observation alone: their minibatches are drawn from steps."""
    taken = batch.action_mask

    def rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[:, None].expand(taken.shape)[taken] if value.dim() == 1 else value[taken][:, None]

    return replace(batch, **{f.name: rows(getattr(batch, f.name)) for f in fields(batch)})


def pad(rows: list[Any], value: Any, dtype: torch.dtype) -> Tensor:
    """Ragged lists -> (B, longest), right-padded with value."""
    out = torch.full((len(rows), max(len(r) for r in rows)), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


def collate_supervised(rows: list[list[int]], loss_masks: list[list[bool]], pad_id: int) -> SupervisedBatch:
    """Token ids and loss masks, one pair of lists a sequence -> SupervisedBatch."""
    lengths = torch.tensor([len(row) for row in rows])
    return SupervisedBatch(
        input_ids=pad(rows, pad_id, torch.int64),
        attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        loss_mask=pad(loss_masks, False, torch.bool),
    )
