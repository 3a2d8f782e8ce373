"""The models: how they are loaded, wrapped, and read without padding and without logits."""

from pellucid.models.attention import Layout, Packed, Serving, adopt, forward, serving_attention
from pellucid.models.fused import is_llama_like
from pellucid.models.head import token_logprobs
from pellucid.models.loading import load_causal_lm, load_scalar_model, new_causal_lm, quiet_transformers
from pellucid.models.mlp import MLPPolicy, MLPValue
from pellucid.models.precision import Precision, autocast, resolve_device, resolve_precision
from pellucid.models.weights import kernel_dtype
from pellucid.models.wrappers import CausalLM, ScalarModel, enable_gradient_checkpointing

__all__ = [
    "CausalLM",
    "Layout",
    "MLPPolicy",
    "MLPValue",
    "Packed",
    "Precision",
    "ScalarModel",
    "Serving",
    "adopt",
    "autocast",
    "enable_gradient_checkpointing",
    "forward",
    "is_llama_like",
    "kernel_dtype",
    "load_causal_lm",
    "load_scalar_model",
    "new_causal_lm",
    "quiet_transformers",
    "resolve_device",
    "resolve_precision",
    "serving_attention",
    "token_logprobs",
]
