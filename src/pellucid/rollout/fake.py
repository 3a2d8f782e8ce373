"""A scripted engine: tests of everything above it need neither a model nor randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.rollout.engine import Progress, check_request
from pellucid.types import Prompt, Sample, SamplingParams


@dataclass(frozen=True)
class Response:
    """What the engine is to answer: ids (R,), and their log-probs (R,) in nats, 0.0 each when not given."""

    ids: Sequence[int]
    logprobs: Sequence[float] | None = None


Script = Sequence[Response | Sequence[int]] | Callable[[Prompt, int], Response | Sequence[int]]
"""Responses in the order of the samples, from the start in every call and around again when they run out; or
a function of (prompt, sample_index)."""


class FakeEngine:
    """Answers from a script, cut as a real engine would: after the first stop token, and at max_new_tokens.

    calls: (prompts, params) of each generate. loads: (source, version) of each load_weights.
    """

    def __init__(self, script: Script, *, version: int = 0) -> None:
        self.script = script
        self.version = version
        self.calls: list[tuple[list[Prompt], SamplingParams]] = []
        self.loads: list[tuple[Any, int]] = []

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        check_request(prompts, params)

    def generate(
        self, prompts: list[Prompt], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[Sample]:
        self.check(prompts, params)
        self.calls.append((prompts, params))
        samples: list[Sample] = []
        total = len(prompts) * params.samples_per_prompt
        for group_id, prompt in enumerate(prompts):
            for sample_index in range(params.samples_per_prompt):
                samples.append(self._sample(prompt, group_id, sample_index, len(samples), params))
                if progress is not None:
                    progress(len(samples), total)
        return samples

    def load_weights(self, source: Any, version: int) -> None:
        self.loads.append((source, version))
        self.version = version

    def _sample(self, prompt: Prompt, group_id: int, sample_index: int, n: int, params: SamplingParams) -> Sample:
        scripted = self.script(prompt, sample_index) if callable(self.script) else self.script[n % len(self.script)]
        response = scripted if isinstance(scripted, Response) else Response(scripted)
        ids = list(response.ids)[: params.max_new_tokens]
        stop = next((i for i, token in enumerate(ids) if token in params.stop_token_ids), None)
        ids = ids if stop is None else ids[: stop + 1]
        logprobs = [0.0] * len(ids) if response.logprobs is None else list(response.logprobs)[: len(ids)]
        before = len(prompt.input_ids)
        return Sample(
            prompt=prompt,
            group_id=group_id,
            sample_index=sample_index,
            input_ids=[*prompt.input_ids, *ids],
            action_mask=[False] * before + [True] * len(ids),
            rollout_logprobs=[0.0] * before + logprobs,
            stop_reason="length" if stop is None else "stop",
            policy_version=self.version,
        )
