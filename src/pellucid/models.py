"""The two kinds of model: a causal LM that gives log-probs, and a scalar head that gives scores or values.

The shift happens here and nowhere else: column t of every result describes token t, and is read from the hidden state
at t - 1. Logits of shape (B,T,V) never exist: the LM head runs on chunks of tokens, again in the backward pass.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellucid.errors import DataError, IntegrityError

Precision = Literal["float32", "bfloat16"]
CHUNK_ELEMENTS = 1 << 21
"""Logits alive at once in the LM head: 8 MiB in float32, whatever the number of tokens."""
CHUNK_ROWS = 128
"""But never fewer tokens than this at once, or a large vocabulary's matrix products become thin and slow."""


class CausalLM:
    """A Hugging Face causal language model, trained and read through its hidden states.

    hf: the module itself; an embedded engine shares it. Weights stay float32; bfloat16 is autocast around them.
    """

    def __init__(self, hf: Any, precision: Precision = "float32", packing: bool = False) -> None:
        self.hf, self.precision, self.packing = hf, precision, packing
        self.head = hf.get_output_embeddings()
        self.softcap: float | None = getattr(hf.config, "final_logit_softcapping", None)
        _no_dropout(hf)
        self._check_head()

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
        with _autocast(self.device, self.precision):
            hidden = _hidden_states(self.hf, input_ids, attention_mask, self.packing)
        before = _flat_index(attention_mask)[mask] - 1
        logprobs, entropies = token_logprobs(
            hidden[before],
            self.head.weight,
            self.head.bias,
            input_ids[mask],
            temperature,
            self.softcap,
            entropy,
        )
        return _scatter(logprobs, mask), None if entropies is None else _scatter(entropies, mask)

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head applied to hidden states must be the model's own logits (some architectures scale them)."""
        ids = torch.arange(4, device=self.device)[None] % self.head.weight.shape[0]
        ones = torch.ones_like(ids, dtype=torch.bool)
        ours, _ = self.logprobs(ids, ones, ones, temperature=1.0)
        with _autocast(self.device, self.precision):
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

    def __init__(self, hf: Any, precision: Precision = "float32", packing: bool = False) -> None:
        self.hf, self.precision, self.packing = hf, precision, packing
        if not isinstance(getattr(hf, "score", None), nn.Linear) or hf.score.out_features != 1:
            raise DataError(f"{type(hf).__name__} has no linear head named 'score' with one output")
        _no_dropout(hf)

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
        with _autocast(self.device, self.precision):
            hidden = _hidden_states(self.hf.base_model, input_ids, attention_mask, self.packing)
        return _scatter(self._head(hidden[_flat_index(attention_mask)[mask] - 1]), mask)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each whole sequence, (B,) float32, read at its last attended token (by mask, never by token id)."""
        with _autocast(self.device, self.precision):
            hidden = _hidden_states(self.hf.base_model, input_ids, attention_mask, self.packing)
        last = _flat_index(attention_mask)[torch.arange(len(input_ids)), _last_column(attention_mask)]
        return self._head(hidden[last])


def _hidden_states(hf: Any, input_ids: Tensor, attention_mask: Tensor, packing: bool) -> Tensor:
    """Last hidden states of the real tokens, row by row: (N,H), N = attention_mask.sum().

    packing lays the rows end to end in one sequence, restarting the positions, so that no padding is computed; without
    it the rows are one padded batch.
    """
    base = hf.base_model
    positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
    if packing:
        out = base(
            input_ids=input_ids[attention_mask][None],
            position_ids=positions[attention_mask][None],
            attention_mask=None,
            use_cache=False,
        )
        return out.last_hidden_state[0]
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
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


# ---------------------------------------------------------------- the LM head, in chunks


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature)[target], and the entropy of that distribution if asked.

    hidden: (N,H). weight: (V,H). targets: (N,). Returns (N,) float32 in nats. Only CHUNK_ELEMENTS logits exist at any
    time, in either direction; gradients of the weight accumulate in float32.
    """
    logprobs, entropies = _ChunkedHead.apply(hidden, weight, bias, targets, temperature, softcap, entropy)  # type: ignore[misc]
    return logprobs, entropies if entropy else None


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, with_entropy):  # type: ignore[override]
        logprobs = torch.empty(len(hidden), device=hidden.device, dtype=_wide(hidden))
        log_norm, entropy = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        for rows in _chunks(len(hidden), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias, softcap) / temperature
            log_norm[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - log_norm[rows]
            if with_entropy:
                probs = (logits - log_norm[rows, None]).exp_()
                entropy[rows] = log_norm[rows] - (probs.mul_(logits)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(bias))
        for rows in _chunks(len(hidden), weight.shape[0]):
            capped = _logits(hidden[rows], weight, bias, ctx.softcap)
            scaled = capped / ctx.temperature - log_norm[rows, None]  # log-probs of the whole vocabulary
            probs = scaled.exp()
            grad = torch.zeros_like(probs)
            if grad_logprobs is not None:
                grad.addcmul_(probs, grad_logprobs[rows, None], value=-1)
                grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None].to(grad.dtype))
            if grad_entropy is not None:
                grad.addcmul_(probs * (scaled + entropy[rows, None]), grad_entropy[rows, None], value=-1)
            grad.div_(ctx.temperature)
            if ctx.softcap is not None:
                grad.mul_(1 - (capped / ctx.softcap) ** 2)
            low = grad.to(hidden.dtype)
            grad_hidden[rows] = low @ weight.to(hidden.dtype)
            grad_weight += low.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).T).to(_wide(hidden))
    if bias is not None:
        logits += bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where x already is (gradient checks)."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(n: int, vocab: int) -> list[slice]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ---------------------------------------------------------------- loading and saving


def load_causal_lm(path: str, device: str, precision: Precision, packing: bool = False) -> CausalLM:
    """Raises DataError when the folder or Hub name is missing, unreadable or not a causal language model."""
    from transformers import AutoModelForCausalLM

    hf, missing, unexpected = _from_pretrained(AutoModelForCausalLM, path)
    if missing:
        raise DataError(f"{path}: not a causal language model, it lacks {', '.join(sorted(missing)[:3])}")
    if "score.weight" in unexpected:  # with tied embeddings it lacks nothing
        raise DataError(f"{path}: not a causal language model but a reward model or critic, it has a head 'score'")
    return CausalLM(hf.to(device), precision, packing)


def load_scalar_model(
    path: str,
    device: str,
    precision: Precision,
    pad_id: int | None,
    packing: bool = False,
    seed: int | None = None,
) -> ScalarModel:
    """A reward model or critic. With a seed, a model without the head gets a fresh one (normal, variance 1/(H+1), as
    Stiennon et al. 2020); without, its absence is a DataError."""
    from transformers import AutoModelForSequenceClassification

    hf, missing, _ = _from_pretrained(AutoModelForSequenceClassification, path, num_labels=1)
    if missing - {"score.weight"} or (missing and seed is None):
        what = "it lacks " + ", ".join(sorted(missing)[:3])
        raise DataError(f"{path}: not a model with one scalar output named 'score', {what}")
    hf.config.pad_token_id = pad_id
    model = ScalarModel(hf.to(device), precision, packing)
    if missing:
        head: nn.Linear = hf.score
        generator = torch.Generator().manual_seed(seed or 0)
        fresh = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
        with torch.no_grad():
            head.weight.copy_(fresh)
    return model


def new_causal_lm(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    context: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    device: str,
    precision: Precision,
    packing: bool = False,
) -> CausalLM:
    """A Llama with tied embeddings and weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlamaForCausalLM(config)
    return CausalLM(hf.to(device), precision, packing)  # type: ignore[arg-type]


def _from_pretrained(auto: Any, path: str, **kwargs: Any) -> tuple[Any, set[str], set[str]]:
    """(model in float32, names of the weights that the checkpoint lacks, and of those that the model does)."""
    quiet_transformers()
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or path.count("/") > 1 or path.startswith(".")):
        raise DataError(f"{path}: no such model folder")
    if folder.exists() and not (folder / "config.json").exists():
        raise DataError(f"{path}: not a model folder, it has no config.json")
    try:
        hf, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **kwargs)
    except Exception as error:
        # Whatever the loader met (a torn safetensors header, an unknown architecture, no network) is about this path.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot load this model: {reason}") from error
    return hf, set(info["missing_keys"]), set(info["unexpected_keys"])


def quiet_transformers() -> None:
    """No progress bars and warnings of its own: what concerns the user, we say."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def enable_gradient_checkpointing(hf: Any) -> None:
    """Recompute activations in backward. transformers does so in training mode only; there is no dropout to wake."""
    if hasattr(hf, "activation_checkpointing_enable"):  # transformers renamed it in 5.x, and warns of the old name
        hf.activation_checkpointing_enable({"use_reentrant": False})
    else:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.train()


def resolve_device(device: str) -> str:
    """Raises DataError when CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("run.device is 'cuda', but PyTorch sees no CUDA device; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_precision(precision: str, device: str) -> Precision:
    """auto: bfloat16 where the hardware is faster at it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if precision != "auto":
        return precision  # type: ignore[return-value]
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else _cpu_has_bfloat16()
    return "bfloat16" if fast else "float32"


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _no_dropout(hf: nn.Module) -> None:
    """Ratios compare two passes over the same tokens, so both must be deterministic."""
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # handed to functional.dropout or to attention
                setattr(module, name, 0.0)
    hf.eval()
