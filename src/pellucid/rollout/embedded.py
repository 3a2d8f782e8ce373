"""The embedded engine: samples in this process from a Hugging Face causal LM, sharing its weights.

    queue -> Slots (slots.py) -> prefill | decode (embedded_cache.py) -> sample_tokens (sampling.py)
             ^                                                                   |
             +------------ finished rows are freed and refilled at once <--------+

Left out on purpose: paged memory, chunked prefill, prefixes shared by different prompts. A training step asks
for a known set of sequences of a known greatest length, so one preallocated row per slot is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import Precision
from pellucid.rollout.embedded_cache import KeysValues, SlotCache, attention_bias, measure_layers
from pellucid.rollout.embedded_checks import check_architecture, check_memory, check_prompts
from pellucid.rollout.engine import Progress, check_request
from pellucid.rollout.sampling import sample_tokens
from pellucid.rollout.slots import Slots
from pellucid.types import Prompt, Sample, SamplingParams

PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, in one prefill. Bounds its memory; below some hundreds it costs speed."""


class EmbeddedEngine:
    """A RolloutEngine over a model that lives here, and may be training here.

    The weights are the model's own: a change of them in place is a change of the next sample. num_slots
    sequences are in flight at once; max_length limits prompt + response, in tokens, as the context does.

    Raises ConfigError if num_slots is below 1 or the architecture cannot be served right.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_length: int | None = None,
        version: int = 0,
        precision: Precision = "float32",
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"rollout: num_slots is {num_slots}; it must be at least 1.")
        check_architecture(model)
        self.model = model
        self.num_slots = num_slots
        self.max_length = max_length
        self.version = version
        self.precision: Precision = precision
        with _serving(model, precision):
            self._layers = measure_layers(model)

    def generate(
        self, prompts: list[Prompt], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[Sample]:
        """See RolloutEngine.generate. Two prompts of one id in a call get the same samples.

        Raises DataError for a prompt that is empty, too long or of an unknown token, ConfigError for params
        out of range or a cache that would not fit into memory, IntegrityError for logits that are not finite.
        """
        check_request(prompts, params)
        if not prompts:
            return []
        length = check_prompts(prompts, params, self.model, self.max_length)
        num_slots = min(self.num_slots, len(prompts) * params.samples_per_prompt)
        check_memory(self._layers, num_slots, length, self.model.device)
        with _serving(self.model, self.precision):
            cache = SlotCache(self._layers, num_slots, length, self.model.device)
            run = _Run(self.model, cache, Slots(prompts, params, num_slots, self.model.device), self.version)
            finished: list[Sample] = []
            while len(finished) < run.slots.total:
                done = run.step()
                finished += done
                if done and progress is not None:
                    progress(len(finished), run.slots.total)
        return sorted(finished, key=lambda sample: (sample.group_id, sample.sample_index))

    def load_weights(self, source: nn.Module | Mapping[str, Tensor] | str | Path | None, version: int) -> None:
        """Take over weights, in place, and call them `version`.

        source: None or the engine's own model (nothing to copy: the weights are shared), another model, a
        state dict, or a directory of safetensors files. Raises CheckpointError if it does not fit, and then
        nothing has changed.
        """
        if source is not None and source is not self.model:
            where = str(source) if isinstance(source, (str, Path)) else "the given model"
            if isinstance(source, (str, Path)):
                weights = _read_safetensors(source)
            else:
                weights = source.state_dict() if isinstance(source, nn.Module) else source
            own = self.model.state_dict()
            _check_weights(weights, own, where)
            with torch.no_grad():
                for name, value in weights.items():
                    own[name].copy_(value)
        self.version = version


class _Prefilled(NamedTuple):
    """A prompt that has been through the model, kept until the last sample of its group has a slot."""

    keys_values: KeysValues
    logits: Tensor  # (V,), of the token after the prompt


class _Run:
    """One call of generate: the model, the cache and the slots, and the step that moves them on."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, slots: Slots, version: int) -> None:
        self.model, self.cache, self.slots, self.version = model, cache, slots, version
        self.attention = model.config.get_text_config(decoder=True)._attn_implementation
        self.prefilled: dict[int, _Prefilled] = {}

    def step(self) -> list[Sample]:
        """At most one forward: waiting prompts into free slots, else one more token for every active slot."""
        rows, logits = self.prefill() if self.slots.can_admit else self.decode()
        tokens, logprobs = sample_tokens(logits, self.slots.next_uniforms(rows), self.slots.params)
        finished = self.slots.append(rows, tokens, logprobs)
        return [self.slots.retire(row, self.version) for row in finished]

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Admit requests: each prompt runs once; its keys and values are copied to every slot of its group.

        Returns the rows (n,) and the logits after their prompts (n, V).
        """
        admitted = self.slots.admit(self.prefilled, PREFILL_TOKENS)
        fresh = {request.group_id: request.prompt for request in admitted.values()}
        fresh = {group_id: prompt for group_id, prompt in fresh.items() if group_id not in self.prefilled}
        if fresh:
            self.prefilled.update(zip(fresh, self._run_prompts(list(fresh.values())), strict=True))
        groups: dict[int, list[int]] = {}
        for row, request in admitted.items():
            groups.setdefault(request.group_id, []).append(row)
        for group_id, rows in groups.items():
            self.cache.fill(rows, self.prefilled[group_id].keys_values)
        logits = torch.stack([self.prefilled[request.group_id].logits for request in admitted.values()])
        # Groups are admitted in order, so only the one at the head of the queue can still need its prompt.
        head = self.slots.waiting[0].group_id if self.slots.waiting else None
        self.prefilled = {group_id: kept for group_id, kept in self.prefilled.items() if group_id == head}
        return torch.tensor(list(admitted), device=logits.device), logits

    def decode(self) -> tuple[Tensor, Tensor]:
        """The rows (n,) of all active slots and the logits of their next tokens (n, V)."""
        sources, targets = self.slots.compact()
        tokens, positions, length = self.slots.next_inputs()
        if sources:
            self.cache.move(sources, targets, length)
        device = tokens.device
        rows = torch.arange(len(tokens), device=device)
        self.cache.aim(rows, positions, length)
        visible = torch.arange(length, device=device) <= positions[:, None]
        return rows, self._forward(tokens[:, None], visible[:, None], positions[:, None], self.cache)

    def _run_prompts(self, prompts: list[Prompt]) -> list[_Prefilled]:
        """One forward over P prompts, left-padded so that the last column is the last token of each."""
        device = self.model.device
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        columns = torch.arange(int(lengths.max()))
        before = (len(columns) - lengths)[:, None]  # (P, 1) columns of padding
        padded = [[0] * (len(columns) - len(p.input_ids)) + p.input_ids for p in prompts]
        # A padding query sees itself, because a softmax over nothing is NaN; nobody else sees it.
        itself = columns[:, None] == columns
        visible = (columns[:, None] >= columns) & (columns >= before)[:, None] | itself
        cache = DynamicCache()
        logits = self._forward(
            torch.tensor(padded, device=device),
            visible.to(device),
            (columns - before).clamp(min=0).to(device),
            cache,
        )
        return [
            _Prefilled([(layer.keys[i, :, start:], layer.values[i, :, start:]) for layer in cache.layers], logits[i])
            for i, start in enumerate(before.flatten().tolist())
        ]

    def _forward(self, input_ids: Tensor, visible: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """input_ids, position_ids: (n, T). visible: (n, T, keys) bool. Returns the last logits (n, V)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_bias(visible, self.attention, self.model.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]


@contextmanager
def _serving(model: PreTrainedModel, precision: Precision) -> Iterator[None]:
    """No gradients, no dropout; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        for module in training:
            module.training = True


def _read_safetensors(directory: str | Path) -> dict[str, Tensor]:
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"rollout: no *.safetensors file in {directory}; save the model there first.")
    return {name: value for file in files for name, value in load_file(file).items()}


def _check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError unless weights cover own. A tied tensor may come under any one of its names."""
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name, value in own.items() if name not in weights and value.data_ptr() not in given]
    unknown = [name for name in weights if name not in own]
    reshaped = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    for problem, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped)):
        if names:
            raise CheckpointError(
                f"rollout: {where} does not fit the model: {len(names)} tensors are {problem}, the first is "
                f"{names[0]}. Is it another model's checkpoint?"
            )
