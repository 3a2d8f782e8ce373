"""The embedded engine: samples in this process from a Hugging Face causal LM that may be training here.

    queue -> Slots (slots.py) -> one forward (embedded_models.py, embedded_llama.py) -> sample_tokens (sampling.py)
             ^                     over the slot cache (embedded_cache.py)                |
             +---------------- finished rows are freed and refilled at once <-------------+

A step's forward takes one token for every active slot and, in the same pass, the whole prompts of the requests that have
just been given a slot. Left out on purpose: paged memory, prefixes shared by different prompts. A training step asks for a
known set of sequences of a known greatest length, so one preallocated row per slot is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import Packed, Precision, Serving
from pellucid.rollout.embedded_cache import KeysValues, SlotCache
from pellucid.rollout.embedded_checks import check_architecture, check_memory, check_prompts
from pellucid.rollout.embedded_graphs import GraphedModel
from pellucid.rollout.embedded_models import ServedModel, measure_layers, serve
from pellucid.rollout.engine import Progress, check_request
from pellucid.rollout.sampling import sample_tokens
from pellucid.rollout.slots import Active, Moves, Slots
from pellucid.types import Prompt, Sample, SamplingParams

PROMPT_TOKENS = 2048
"""Prompt tokens in one step. Bounds its memory; below some hundreds it costs speed."""


class SharedWeights:
    """An engine's half that holds the model and a version of its weights."""

    def __init__(self, model: PreTrainedModel, version: int) -> None:
        self.model, self.version = model, version

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


class EmbeddedEngine(SharedWeights):
    """A RolloutEngine over a model that lives here, and may be training here.

    Each call of generate samples from the model's weights as they are then. num_slots sequences are in flight at once;
    max_length limits prompt + response, in tokens, as the context does.

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
        super().__init__(model, version)
        self.num_slots = num_slots
        self.max_length = max_length
        with serving(model):
            self._served = serve(model, precision)
            self._layers = measure_layers(model, self._served.dtype)

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
        num_slots, length = self._size(prompts, params)
        with serving(self.model):
            cache = self._cache(num_slots, length)
            self._served.refresh(cache.length)
            try:
                finished = self._run(prompts, params, num_slots, cache, progress)
            finally:
                self._served.release()
        return sorted(finished, key=lambda sample: (sample.group_id, sample.sample_index))

    def check(self, prompts: list[Prompt], params: SamplingParams) -> None:
        """See RolloutEngine.check: the memory for the cache is asked for, too, and not taken."""
        check_request(prompts, params)
        if prompts:
            check_memory(self._layers, *self._size(prompts, params), self.model.device)

    def _size(self, prompts: list[Prompt], params: SamplingParams) -> tuple[int, int]:
        """Slots, and tokens of each, that these need. Raises DataError for a prompt that cannot be served."""
        length = check_prompts(prompts, params, self.model, self.max_length)
        return min(self.num_slots, len(prompts) * params.samples_per_prompt), length

    @property
    def graphs(self) -> str | None:
        """For people: what has come of CUDA graphs so far. None where the model is not on a GPU."""
        return self._served.status if isinstance(self._served, GraphedModel) else None

    def _cache(self, num_slots: int, length: int) -> SlotCache:
        """For so many slots and tokens, or more where graphs keep one."""
        layers, device = self._layers, self.model.device
        if isinstance(self._served, GraphedModel):
            return self._served.cache(layers, num_slots, length, device)
        check_memory(layers, num_slots, length, device)
        return SlotCache(layers, num_slots, length, device, cleared=not self._served.any_rows)

    def _run(
        self, prompts: list[Prompt], params: SamplingParams, num_slots: int, cache: SlotCache, progress: Progress | None
    ) -> list[Sample]:
        """The samples, as they finish."""
        run = _Run(self._served, cache, Slots(prompts, params, num_slots, self.model.device), self.version)
        finished: list[Sample] = []
        while len(finished) < run.slots.total:
            done = run.step()
            finished += done
            if done and progress is not None:
                progress(len(finished), run.slots.total)
        return finished


class _Kept(NamedTuple):
    """A prompt that has been through the model, kept until the last sample of its group has a slot."""

    keys_values: KeysValues
    logits: Tensor  # (V,), of the token after the prompt


class _Run:
    """One call of generate: the model, the cache and the slots, and the step that moves them on."""

    def __init__(self, served: ServedModel, cache: SlotCache, slots: Slots, version: int) -> None:
        self.served, self.cache, self.slots, self.version = served, cache, slots, version
        self.kept: dict[int, _Kept] = {}

    def step(self) -> list[Sample]:
        """One forward, and a token for every active slot, those just filled included. Returns what has finished."""
        slots = self.slots
        moves = Moves([], []) if self.served.any_rows else slots.compact()
        active = slots.next_inputs()
        if moves.sources:
            self.cache.move(moves.sources, moves.targets, active.length)
        groups = slots.admit(self.kept, PROMPT_TOKENS)
        fresh = {group: rows[0] for group, rows in groups.items() if group not in self.kept}
        logits = self._forward(active, fresh) if fresh or len(active.tokens) else self._nothing()
        if groups:
            logits = self._spread(logits, groups, fresh)
        added = torch.tensor([row for new in groups.values() for row in new], dtype=torch.int64, device=logits.device)
        rows = torch.cat([active.rows, added]) if groups else active.rows
        tokens, logprobs = sample_tokens(logits, slots.next_uniforms(rows), slots.params)
        return [slots.retire(row, self.version) for row in slots.append(rows, tokens, logprobs)]

    def _forward(self, active: Active, fresh: dict[int, int]) -> Tensor:
        """fresh: group -> the row that its prompt goes to. Returns logits (n + len(fresh), V)."""
        n, device = len(active.tokens), active.tokens.device
        prompts = [self.slots.prompt(row).input_ids for row in fresh.values()]
        tokens, positions, rows = active.tokens, active.positions, active.rows
        if prompts:
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            tokens = torch.cat([tokens, torch.tensor(list(chain(*prompts))).to(device)])
            positions = torch.cat([positions, (torch.arange(len(starts)) - starts).to(device)])
            rows = torch.cat([rows, torch.tensor(list(fresh.values())).repeat_interleave(lengths).to(device)])
        self.cache.aim.rows, self.cache.aim.positions = rows, positions
        layout = Serving(
            positions=active.positions,
            length=active.length,
            ragged=active.ragged,
            prompts=Packed(tuple(len(prompt) for prompt in prompts)),
            cached=self.cache.views(n, active.length),
        )
        return self.served.logits(tokens, positions, layout, self.cache)

    def _nothing(self) -> Tensor:
        """The logits of a step in which no token goes through the model: every new row has its prompt's from before."""
        return next(iter(self.kept.values())).logits[None][:0]

    def _spread(self, logits: Tensor, groups: dict[int, list[int]], fresh: dict[int, int]) -> Tensor:
        """Give every row of a group its prompt's keys and values, and its logits: (n + P, V) -> (active rows, V)."""
        n = len(logits) - len(fresh)
        after = dict(zip(fresh, logits[n:], strict=True)) | {group: kept.logits for group, kept in self.kept.items()}
        waiting = self.slots.waiting[0].group_id if self.slots.waiting else None
        for group, rows in groups.items():
            length = len(self.slots.prompt(rows[0]).input_ids)
            if group in self.kept:
                self.cache.fill(rows, self.kept[group].keys_values)
            elif rows[1:]:
                self.cache.move(rows[:1] * len(rows[1:]), rows[1:], length)
            # Groups are admitted in order, so only the one at the head of the queue can still need its prompt.
            if group == waiting and group not in self.kept:
                self.kept = {group: _Kept(self.cache.read(rows[0], length), after[group].clone())}
        if waiting not in self.kept:
            self.kept = {}
        admitted = [after[group] for group, rows in groups.items() for _ in rows]
        return torch.cat([logits[:n], torch.stack(admitted)])


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, no dropout; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
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
