"""The engine of last resort: transformers' own `generate`, for models that the embedded engine cannot serve.

Requests run in batches that end with their longest response, and keys and values are copied in every step; but whatever
transformers can generate from, this can, and with the same seeds and log-probs as the other engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pellucid.models import Precision, autocast
from pellucid.rollout.embedded import SharedWeights, serving
from pellucid.rollout.embedded_checks import check_prompts
from pellucid.rollout.engine import Progress, check_request
from pellucid.rollout.sampling import request_uniforms, sample_tokens
from pellucid.rollout.slots import Request, requests_of
from pellucid.types import Prompt, Sample, SamplingParams


class GenerateEngine(SharedWeights):
    """A RolloutEngine over `model.generate`, batch_size requests at a time, left-padded."""

    def __init__(
        self, model: PreTrainedModel, *, batch_size: int, version: int = 0, precision: Precision = "float32"
    ) -> None:
        super().__init__(model, version)
        self.batch_size, self.precision = batch_size, precision

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        """See RolloutEngine.check."""
        check_request(prompts, params)
        if prompts:
            check_prompts(prompts, params, self.model, None)

    def generate(
        self, prompts: list[Prompt], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[Sample]:
        """See RolloutEngine.generate. Raises what EmbeddedEngine.generate does, for the same reasons."""
        self.check(prompts, params)
        if not prompts:
            return []
        requests, samples = requests_of(prompts, params), list[Sample]()
        with serving(self.model), autocast(self.model.device, self.precision), _no_habits(self.model):
            for start in range(0, len(requests), self.batch_size):
                samples += self._batch(requests[start : start + self.batch_size], params)
                if progress is not None:
                    progress(len(samples), len(requests))
        return samples

    def _batch(self, requests: list[Request], params: SamplingParams) -> list[Sample]:
        rows = [request.prompt.input_ids for request in requests]
        longest, device = max(map(len, rows)), self.model.device
        choice = _Choice(requests, params, device)
        self.model.generate(
            input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device),
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.stop_token_ids) or None,
            logits_processor=LogitsProcessorList([choice]),
        )
        tokens, logprobs = torch.stack(choice.tokens, 1).tolist(), torch.stack(choice.logprobs, 1).tolist()
        samples = []
        for request, ids, values in zip(requests, tokens, logprobs, strict=True):
            stops = (i + 1 for i, token in enumerate(ids) if token in params.stop_token_ids)
            count = next(stops, len(ids))
            samples.append(request.sample(ids[:count], values[:count], params, self.version))
        return samples


class _Choice(LogitsProcessor):
    """Draws the tokens itself, from each request's own randomness, and leaves `generate` nothing else to pick."""

    def __init__(self, requests: list[Request], params: SamplingParams, device: torch.device) -> None:
        self.params = params
        drawn = [request_uniforms(params, request.prompt.id, request.sample_index) for request in requests]
        self.uniforms = torch.stack(drawn).to(device)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = sample_tokens(scores, self.uniforms[:, len(self.tokens)], self.params)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@contextmanager
def _no_habits(model: nn.Module) -> Iterator[None]:
    """Without the generation settings that came with the checkpoint (penalties, forced tokens): they are not the policy."""
    kept, model.generation_config = model.generation_config, GenerationConfig(do_sample=False, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = kept
