"""Models from a folder or the Hub, or new ones from a seed. Always float32: lower precision is a matter of passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pellucid.errors import DataError
from pellucid.models.precision import Precision
from pellucid.models.wrappers import CausalLM, ScalarModel


def load_causal_lm(path: str, device: str, precision: Precision, packing: bool = True) -> CausalLM:
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
    packing: bool = True,
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
    packing: bool = True,
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
    return CausalLM(hf.to(device), precision, packing)


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
