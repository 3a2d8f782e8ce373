"""The policy as the embedded engine runs it: tokens and the slot cache in, logits of the next tokens out.

`TransformersModel` serves any model through its own forward; `embedded_llama.py` serves one family faster. Both take a
whole step at once: a token for each active slot, and the prompts that were admitted.
"""

from __future__ import annotations

import copy
import inspect
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from pellucid.errors import ConfigError
from pellucid.models import Packed, Precision, Serving, adopt, forward
from pellucid.rollout.embedded_cache import LayerShape, SlotCache

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def serving_dtype(model: PreTrainedModel, precision: Precision) -> torch.dtype:
    """What precision asks for, but never more digits than the weights have."""
    return DTYPES[precision] if model.dtype == torch.float32 else model.dtype


AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of a logit, relative to the largest logit, at which two forwards are the same function."""


class ServedModel(Protocol):
    """The policy as the engine runs it."""

    dtype: torch.dtype
    """Of the keys and values that it writes."""
    any_rows: bool
    """Whether active slots may be any rows of the cache; otherwise they must be rows 0..n-1."""

    def refresh(self, length: int) -> None:
        """Take over the weights as they are now, for sequences of up to `length` tokens. Called before every rollout."""
        ...

    def release(self) -> None:
        """Let go of what `refresh` copied. Called after every rollout: training needs the memory."""
        ...

    def logits(self, tokens: Tensor, positions: Tensor, layout: Serving, cache: SlotCache) -> Tensor:
        """tokens, positions: (N,); the cache is aimed at them. Returns the logits after each slot's token, then after each
        prompt: (n + P, V)."""
        ...


class TransformersModel:
    """Any model whose attention goes through the transformers interface. In float32 it is the trainer's own module; in
    lower precision a copy, for autocast would round every weight again in every step."""

    any_rows = False

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        adopt(model)
        self.dtype = serving_dtype(model, precision)
        self._source = model
        self._model = model if self.dtype == model.dtype else _rounded(model, self.dtype)

    def refresh(self, length: int) -> None:
        if self._model is not self._source:
            for own, theirs in zip(self._model.state_dict().values(), self._source.state_dict().values(), strict=True):
                own.copy_(theirs)

    def release(self) -> None:
        """Nothing: in float32 there is no copy, and in lower precision the copy is the module that runs."""

    def reads(self) -> list[Tensor]:
        """See embedded_graphs.FixedModel."""
        return [*self._model.parameters(), *self._model.buffers()]

    def logits(self, tokens: Tensor, positions: Tensor, layout: Serving, cache: SlotCache) -> Tensor:
        keep = layout.last_tokens()
        out = forward(
            self._model,
            tokens[None],
            positions[None],
            layout,
            use_cache=True,
            logits_to_keep=keep,
            **_as_argument(self._model, cache),
        )
        return out.logits[0]


def _as_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """transformers 5.24 renamed the argument, architecture by architecture."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with weights in dtype. Buffers stay: a rounded rotary frequency is radians off at far positions."""
    low = copy.deepcopy(model).eval()
    for parameter in low.parameters():
        parameter.data = parameter.data.to(dtype)
    return low


def serve(model: PreTrainedModel, precision: Precision) -> ServedModel:
    """The fastest way to run this model that gives transformers' logits. Raises ConfigError if there is none."""
    from pellucid.rollout.embedded_graphs import graphed
    from pellucid.rollout.embedded_llama import LlamaModel
    from pellucid.rollout.embedded_native import NativeLlamaModel

    # In float32 whatever the precision: rounding would hide a layer that adds little.
    if NativeLlamaModel.serves(model, precision) and _agree(NativeLlamaModel(model, "float32"), model):
        return NativeLlamaModel(model, precision)
    if LlamaModel.serves(model) and _agree(LlamaModel(model, "float32"), model):
        return graphed(LlamaModel(model, precision), model.device)
    if not _agree(TransformersModel(model, "float32"), model):
        raise ConfigError(
            f"rollout: {type(model).__name__} gives other logits from the slot cache than from a plain forward, so the "
            "embedded engine cannot serve it. Set rollout.engine = 'generate'."
        )
    return graphed(TransformersModel(model, precision), model.device)


def _agree(served: ServedModel, model: PreTrainedModel) -> bool:
    """Two prompts prefilled, one of them while the other decodes, against plain forwards of the same sequences."""
    vocabulary, device = model.get_input_embeddings().num_embeddings, model.device
    first, second = ([(start + 7 * i) % vocabulary for i in range(n)] for start, n in ((1, 5), (3, 3)))
    cache = SlotCache(measure_layers(model, served.dtype), 2, 8, device)
    served.refresh(8)
    gaps = []
    for slot_token, prompt, row in ((None, first[:4], 0), (first[4], second, 1)):
        old = [] if slot_token is None else [slot_token]
        tokens = torch.tensor(old + prompt, device=device)
        positions = torch.tensor([4] * len(old) + list(range(len(prompt))), device=device)
        cache.aim.rows = torch.tensor([0] * len(old) + [row] * len(prompt), device=device)
        cache.aim.positions = positions
        layout = Serving(positions[: len(old)], 5, False, Packed((len(prompt),)), cache.views(len(old), 5))
        found = served.logits(tokens, positions, layout, cache)
        for logits, ids in zip(found, ([first] if old else []) + [prompt], strict=True):
            expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
            gaps.append(((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item())
    served.release()
    return max(gaps) <= AGREEMENT[served.dtype]


def measure_layers(model: PreTrainedModel, dtype: torch.dtype) -> list[LayerShape]:
    """What each layer caches, found by running one token: exact for every attention variant, as no config is.

    Raises ConfigError if some layer keeps no keys and values.
    """
    cache = DynamicCache()
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model(input_ids=token, use_cache=True, **_as_argument(model, cache))
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    kept = [layer for layer in cache.layers if isinstance(layer.keys, Tensor) and layer.keys.numel()]
    if len(kept) != expected:
        raise ConfigError(
            f"rollout: {expected - len(kept)} of the {expected} layers of {type(model).__name__} keep no keys and values "
            "of their own, which the embedded engine needs. Set rollout.engine = 'generate'."
        )
    return [LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], dtype) for layer in kept]
