"""The seam between training and sampling: what every rollout engine promises, and a suite checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from pellucid.errors import ConfigError, DataError
from pellucid.types import Prompt, Sample, SamplingParams

Progress = Callable[[int, int], None]
"""Called with (samples finished so far, samples in all)."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Turns prompts into samples under a policy whose weights have a version."""

    @property
    def version(self) -> int:
        """Version of the weights that the next `generate` samples from. It is stamped on every sample."""
        ...

    def generate(
        self, prompts: list[Prompt], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[Sample]:
        """P prompts -> P * G samples, ordered by prompt, then sample_index; group_id is the prompt's index.

        A sample depends on its prompt, the weights and its request seed alone, not on its neighbours in the
        call. Raises DataError for a prompt and ConfigError for params that cannot be served, before sampling.
        """
        ...

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        """Raises what `generate` of these would raise before sampling, and does nothing else."""
        ...

    def load_weights(self, source: Any, version: int) -> None:
        """Sample from these weights from now on, as `version`. What source may be is the engine's to say."""
        ...


def check_request(prompts: list[Prompt], params: SamplingParams) -> None:
    """What no engine can serve: a ConfigError for a value of params, a DataError for an empty prompt."""
    rules = {
        "max_new_tokens": (params.max_new_tokens >= 1, "at least 1"),
        "samples_per_prompt": (params.samples_per_prompt >= 1, "at least 1"),
        "temperature": (params.temperature >= 0, "0 (greedy) or more"),
        "top_p": (0 < params.top_p <= 1, "above 0 and at most 1 (off)"),
        "top_k": (params.top_k >= 0, "0 (off) or more"),
    }
    for name, (holds, allowed) in rules.items():
        if not holds:
            raise ConfigError(f"sampling: {name} is {getattr(params, name)}; it must be {allowed}.")
    for prompt in prompts:
        if not prompt.input_ids:
            raise DataError(f"prompt {prompt.id} has no tokens: drop the row, or give it at least a BOS token.")
