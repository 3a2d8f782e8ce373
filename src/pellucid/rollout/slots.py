"""Continuous batching without the model: which request sits in which slot, and what it has generated."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.errors import IntegrityError
from pellucid.rollout.sampling import request_uniforms
from pellucid.types import Prompt, Sample, SamplingParams


@dataclass(frozen=True)
class Request:
    """One sample to be drawn."""

    prompt: Prompt
    group_id: int
    sample_index: int


class Slots:
    """A queue of requests in front of N slots. Row i of every table belongs to the request in slot i.

    One row is one sequence in flight; a free row holds leftovers that nobody reads. The tables stay on the
    device; in a step that finishes no sequence the host waits for it once, in append.
    """

    def __init__(self, prompts: list[Prompt], params: SamplingParams, num_slots: int, device: torch.device) -> None:
        self.params = params
        self.device = device
        self.waiting = deque(
            Request(prompt, group_id, sample_index)
            for group_id, prompt in enumerate(prompts)
            for sample_index in range(params.samples_per_prompt)
        )
        self.total = len(self.waiting)
        num_slots = min(num_slots, self.total)
        self.running: list[Request | None] = [None] * num_slots
        table = (num_slots, params.max_new_tokens)
        self.uniforms = torch.zeros(table, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(table, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(table, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int64, device=device)  # tokens generated
        self.prompt_lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        # Every active slot grows by one token a decode step, so the host knows all lengths without asking the
        # device: length = _steps + _lead[row].
        self._steps = 0
        self._lead = [0] * num_slots

    @property
    def active(self) -> list[int]:
        """Occupied rows, ascending."""
        return [row for row, request in enumerate(self.running) if request is not None]

    @property
    def can_admit(self) -> bool:
        return bool(self.waiting) and None in self.running

    def admit(self, prefilled: Container[int], token_budget: int) -> dict[int, Request]:
        """Move requests from the queue into free rows, lowest first. Returns row -> request, in queue order.

        prefilled: groups whose prompt needs no forward. token_budget: at most this many prompt tokens,
        padding included, are new (one prompt always fits), which bounds the memory of a prefill.
        """
        free = [row for row, request in enumerate(self.running) if request is None]
        admitted: dict[int, Request] = {}
        fresh: set[int] = set()
        longest = 0
        for row in free[: len(self.waiting)]:
            request = self.waiting[0]
            if request.group_id not in prefilled and request.group_id not in fresh:
                longest = max(longest, len(request.prompt.input_ids))
                if fresh and longest * (len(fresh) + 1) > token_budget:
                    break
                fresh.add(request.group_id)
            admitted[row] = self.waiting.popleft()
            self.running[row] = request
            self._lead[row] = len(request.prompt.input_ids) + 1 - self._steps
        rows = list(admitted)
        lengths = [len(request.prompt.input_ids) for request in admitted.values()]
        uniforms = [request_uniforms(self.params, r.prompt.id, r.sample_index) for r in admitted.values()]
        self.uniforms[rows] = torch.stack(uniforms).to(self.device)
        self.prompt_lengths[rows] = torch.tensor(lengths, device=self.device)
        self.counts[rows] = 0
        return admitted

    def next_inputs(self) -> tuple[Tensor, Tensor, int]:
        """Of the active slots, which must be rows 0..n-1: last token (n,), its position (n,), longest length.

        Counts as a decode step: call it once for every append that follows.
        """
        n = len(self.active)
        length = self._steps + max(self._lead[:n])
        self._steps += 1
        counts = self.counts[:n]
        tokens = self.tokens[:n].gather(1, counts[:, None] - 1).squeeze(1)
        return tokens, self.prompt_lengths[:n] + counts - 1, length

    def next_uniforms(self, rows: Tensor) -> Tensor:
        """The uniform of each row's next token. rows: (n,). Returns (n,) float64."""
        return self.uniforms[rows, self.counts[rows]]

    def append(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> list[int]:
        """Record one sampled token per row; rows, tokens, logprobs: (n,). Returns the rows now finished."""
        counts = self.counts[rows]
        self.tokens[rows, counts] = tokens
        self.logprobs[rows, counts] = logprobs
        self.counts[rows] = counts + 1
        stopped = (tokens[:, None] == self._stop_ids).any(dim=1)
        return rows[stopped | (counts + 1 >= self.params.max_new_tokens)].tolist()

    def retire(self, row: int, version: int) -> Sample:
        """Free the row and return its sample. Raises IntegrityError if the model's logits were not finite."""
        request = self.running[row]
        assert request is not None
        self.running[row] = None
        count = int(self.counts[row])
        ids, logprobs = self.tokens[row, :count].tolist(), self.logprobs[row, :count].tolist()
        if not math.isfinite(math.fsum(logprobs)):
            raise IntegrityError(
                f"rollout: sample {request.sample_index} of prompt {request.prompt.id} has a log-prob that "
                f"is not finite (policy version {version}). The weights have diverged: lower the learning "
                "rate, and resume from an earlier checkpoint."
            )
        before = len(request.prompt.input_ids)
        return Sample(
            prompt=request.prompt,
            group_id=request.group_id,
            sample_index=request.sample_index,
            input_ids=[*request.prompt.input_ids, *ids],
            action_mask=[False] * before + [True] * count,
            rollout_logprobs=[0.0] * before + logprobs,
            stop_reason="stop" if ids[-1] in self.params.stop_token_ids else "length",
            policy_version=version,
        )

    def compact(self) -> tuple[list[int], list[int]]:
        """Move the highest active rows into the holes below, so that rows 0..n-1 are the active ones.

        Returns the moves as (sources, targets), for whoever keeps more per row.
        """
        active = self.active
        n = len(active)
        targets = [row for row in range(n) if self.running[row] is None]
        sources = [row for row in active if row >= n]
        if sources:
            for table in (self.uniforms, self.tokens, self.logprobs, self.counts, self.prompt_lengths):
                table[targets] = table[sources]
        for source, target in zip(sources, targets, strict=True):
            self.running[target], self.running[source] = self.running[source], None
            self._lead[target] = self._lead[source]
        return sources, targets
