"""The two kinds of model: a causal LM that gives log-probs, and a scalar head that gives scores or values.

The shift happens here and nowhere else: column t of every result describes token t, and is read from the hidden state
at t - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import DataError, IntegrityError
from pellucid.models.attention import Packed, adopt, forward
from pellucid.models.fused import fuse
from pellucid.models.head import token_logprobs, top_tokens
from pellucid.models.precision import Precision, autocast
from pellucid.models.weights import Weight, kernel_dtype
from pellucid.types import Batch


class CausalLM:
    """A Hugging Face causal language model, trained and read through its hidden states.

    hf: the module itself; an embedded engine shares it. Weights stay float32; bfloat16 is autocast around them. packing
    lays sequences end to end; without it they are padded, which any model can and which costs the padding.
    """

    def __init__(self, hf: Any, precision: Precision = "float32", packing: bool = True) -> None:
        self.hf, self.precision, self.packing = hf, precision, packing
        self.head = hf.get_output_embeddings()
        self.softcap: float | None = getattr(hf.config, "final_logit_softcapping", None)
        _no_dropout(hf)
        if packing:
            adopt(hf)
        self._fused = fuse(hf, precision) if packing else None
        dtype = kernel_dtype(self.device, precision, self.head.weight)
        self._packed_head = None if dtype is None else Weight(dtype, self.head)
        self._check_head()

    @property
    def module(self) -> nn.Module:
        """What an optimizer trains."""
        return self.hf

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        temperature: float,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs, and the entropy if asked, of the tokens under mask.

        input_ids, attention_mask, mask: (B,T). Returns (B,T) float32 in nats, 0 outside mask and at a row's first token,
        which no token precedes. Both are differentiable.
        """
        mask = _with_predecessor(mask, attention_mask)
        with autocast(self.device, self.precision):
            hidden = _hidden_states(self, input_ids, attention_mask)
        before = _flat_index(attention_mask)[mask] - 1
        logprobs, entropies = token_logprobs(
            hidden[before],
            self.head.weight,
            self.head.bias,
            input_ids[mask],
            temperature,
            self.softcap,
            entropy,
            self._packed_head,
        )
        return _scatter(logprobs, mask), None if entropies is None else _scatter(entropies, mask)

    def logprobs_of(self, batch: Batch, temperature: float, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """`logprobs` of a batch's actions."""
        return self.logprobs(batch.input_ids, batch.attention_mask, batch.action_mask, temperature, entropy)

    @torch.no_grad()
    def top_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float, k: int
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens in place of each token under mask, and their log-probs, likeliest first.

        As `logprobs`. Returns (B,T,K) int64 and (B,T,K) float32, 0 outside mask.
        """
        mask = _with_predecessor(mask, attention_mask)
        with autocast(self.device, self.precision):
            hidden = _hidden_states(self, input_ids, attention_mask)
        before = _flat_index(attention_mask)[mask] - 1
        ids, logprobs = top_tokens(
            hidden[before], self.head.weight, self.head.bias, k, temperature, self.softcap, self._packed_head
        )
        places = mask[..., None].expand(*mask.shape, ids.shape[1])
        return _scatter(ids, places), _scatter(logprobs, places)

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head applied to hidden states must be the model's own logits (some architectures scale them)."""
        ids = torch.arange(4, device=self.device)[None] % self.head.weight.shape[0]
        ones = torch.ones_like(ids, dtype=torch.bool)
        ours, _ = self.logprobs(ids, ones, ones, temperature=1.0)
        with autocast(self.device, self.precision):
            logits = self.hf(input_ids=ids, use_cache=False).logits.float()
        theirs = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        gap = (ours[:, 1:] - theirs).abs().max().item()
        if not gap < (1e-3 if self.precision == "float32" else 0.1):
            raise IntegrityError(
                f"{type(self.hf).__name__}: the LM head on the last hidden state differs from the model's own logits "
                f"by {gap:.3g} nats; this architecture changes its logits in a way that is not supported"
            )


class ScalarModel:
    """A Hugging Face sequence classifier with one label, head `score`: a reward model or a critic.

    shift is config.score_shift: what plain transformers returns, minus shift, is what this class returns. Reward-model
    training sets it so that the reference's own samples score 0 on average.
    """

    def __init__(self, hf: Any, precision: Precision = "float32", packing: bool = True) -> None:
        self.hf, self.precision, self.packing = hf, precision, packing
        if not isinstance(getattr(hf, "score", None), nn.Linear) or hf.score.out_features != 1:
            raise DataError(f"{type(hf).__name__} has no linear head named 'score' with one output")
        _no_dropout(hf)
        if packing:
            adopt(hf)
        self._fused = fuse(hf, precision) if packing else None

    @property
    def module(self) -> nn.Module:
        """What an optimizer trains."""
        return self.hf

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def shift(self) -> float:
        return float(getattr(self.hf.config, "score_shift", 0.0))

    def set_shift(self, shift: float) -> None:
        self.hf.config.score_shift = shift

    def _head(self, hidden: Tensor) -> Tensor:
        return self.hf.score(hidden.float()).squeeze(-1) - self.shift

    def values(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Value of the state before each token under mask: (B,T) float32, 0 elsewhere. In reward units."""
        mask = _with_predecessor(mask, attention_mask)
        with autocast(self.device, self.precision):
            hidden = _hidden_states(self, input_ids, attention_mask)
        return _scatter(self._head(hidden[_flat_index(attention_mask)[mask] - 1]), mask)

    def values_of(self, batch: Batch) -> Tensor:
        """`values` of the states before a batch's actions."""
        return self.values(batch.input_ids, batch.attention_mask, batch.action_mask)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each whole sequence, (B,) float32, read at its last attended token (by mask, never by token id)."""
        with autocast(self.device, self.precision):
            hidden = _hidden_states(self, input_ids, attention_mask)
        last = _flat_index(attention_mask)[torch.arange(len(input_ids)), _last_column(attention_mask)]
        return self._head(hidden[last])


def _hidden_states(model: CausalLM | ScalarModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states of the real tokens, row by row: (N,H), N = attention_mask.sum()."""
    positions, base = (attention_mask.cumsum(1) - 1).clamp_min(0), model.hf.base_model
    if model.packing:
        lengths = tuple(attention_mask.sum(1).tolist())
        ids, places = input_ids[attention_mask], positions[attention_mask]
        if model._fused is not None:
            return model._fused(ids, places, lengths)
        return forward(base, ids[None], places[None], Packed(lengths), use_cache=False).last_hidden_state[0]
    out = base(input_ids=input_ids, position_ids=positions, attention_mask=attention_mask.long(), use_cache=False)
    return out.last_hidden_state[attention_mask]


def _with_predecessor(mask: Tensor, attention_mask: Tensor) -> Tensor:
    """mask without each row's first token, wherever padding puts it: nothing comes before it, so nothing predicts it."""
    return mask & attention_mask & (attention_mask.cumsum(1) > 1)


def _flat_index(attention_mask: Tensor) -> Tensor:
    """(B,T): the row of each real token in the (N,H) hidden states."""
    return (attention_mask.flatten().cumsum(0) - 1).view_as(attention_mask)


def _last_column(attention_mask: Tensor) -> Tensor:
    """(B,): the column of the last real token, on whichever side the padding is."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * attention_mask).argmax(1)


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def enable_gradient_checkpointing(hf: Any) -> None:
    """Recompute activations in backward. transformers does so in training mode only; there is no dropout to wake."""
    if hasattr(hf, "activation_checkpointing_enable"):  # transformers renamed it in 5.x, and warns of the old name
        hf.activation_checkpointing_enable({"use_reentrant": False})
    else:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.train()


def _no_dropout(hf: nn.Module) -> None:
    """Ratios compare two passes over the same tokens, so both must be deterministic."""
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # handed to functional.dropout or to attention
                setattr(module, name, 0.0)
    hf.eval()
