"""Tiny random-weight Hugging Face causal LMs, made from configs: no download, a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97


def _shape(**overrides: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        # Large enough that distributions are neither flat nor certain: greedy and sampled tokens vary.
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return {**shape, **overrides}


def _build(kind: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """Seeded without touching the caller's random state. In eval mode, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def tiny_llama(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Llama with as many key/value heads as query heads. Overrides are config fields."""
    return _build(LlamaForCausalLM, LlamaConfig(**_shape(**overrides)), seed)


def tiny_llama_gqa(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Llama whose four query heads share two key/value heads; embeddings tied."""
    return tiny_llama(seed, **{"num_key_value_heads": 2, "tie_word_embeddings": True, **overrides})


def tiny_qwen2(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Qwen2: GQA with biases on q, k, v."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**_shape(**{"num_key_value_heads": 2, **overrides})), seed)


def tiny_qwen3(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Qwen3: GQA with norms on q and k, and a head_dim that is not hidden / heads."""
    fields = _shape(**{"num_key_value_heads": 2, "head_dim": 16, **overrides})
    return _build(Qwen3ForCausalLM, Qwen3Config(**fields), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """GPT-2: learned absolute positions, LayerNorm, tied embeddings."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**{**fields, **overrides}), seed)


def tiny_mistral(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Mistral: every layer sees the last `sliding_window` tokens only, here fewer than the tests' sequences have."""
    fields = _shape(**{"num_key_value_heads": 2, "sliding_window": 6, **overrides})
    return _build(MistralForCausalLM, MistralConfig(**fields), seed)


def tiny_gemma(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Gemma: scaled embeddings, norms that multiply by 1 + weight, a gated MLP with GELU."""
    fields = _shape(**{"num_key_value_heads": 1, "head_dim": 16, **overrides})
    return _build(GemmaForCausalLM, GemmaConfig(**fields), seed)


def tiny_gemma2(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Gemma 2: every other layer with a sliding window, attention scores and logits capped by tanh, four norms a layer."""
    fields = _shape(
        **{"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, **overrides}
    )
    fields = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, **fields}
    return _build(Gemma2ForCausalLM, Gemma2Config(**fields), seed)


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama_gqa": tiny_llama_gqa,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
    "mistral": tiny_mistral,
    "gemma": tiny_gemma,
    "gemma2": tiny_gemma2,
}
"""Every architecture that is tested throughout: packed passes, sampling, log-probs."""
