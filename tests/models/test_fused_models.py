"""Which models the training pass over kernels takes, and that it leaves the others to transformers."""

from __future__ import annotations

import pytest
from native_kernels import needs_bfloat16, needs_kernels
from passes import EVEN, assert_same, gap, ours, reference
from tiny_models import tiny_gemma, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_llama_gqa, tiny_qwen3
from torch import nn

from pellucid.models import CausalLM, native
from pellucid.models.fused import fuse

OTHERS = {"gpt2": tiny_gpt2, "qwen3": tiny_qwen3, "gemma": tiny_gemma, "gemma2": tiny_gemma2}

each_precision = pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])


@each_precision
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_models_are_left_to_transformers(make, precision):
    hf = make(vocab_size=EVEN)
    model = CausalLM(hf, precision)
    assert model._fused is None
    assert gap(ours(model, (5, 9))[1], gradients_of_transformers(make)) < (1e-5 if precision == "float32" else 0.2)


def gradients_of_transformers(make):
    hf = make(vocab_size=EVEN)
    if make is tiny_gemma2:  # caps its scores, which of transformers' own kinds only eager does
        hf.set_attn_implementation("eager")
    return reference(hf, (5, 9))[1]


def test_padded_passes_are_left_to_transformers():
    assert CausalLM(tiny_llama(), packing=False)._fused is None


def test_without_kernels_everything_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    model = CausalLM(tiny_llama_gqa())
    assert model._fused is None and model._packed_head is None
    assert_same(ours(model, (5, 9)), reference(tiny_llama_gqa(), (5, 9)))


def test_a_float64_model_is_left_to_transformers():
    assert fuse(tiny_llama().double(), "float32") is None


@needs_bfloat16
def test_odd_shapes_cannot_be_multiplied_in_bfloat16():
    assert fuse(tiny_llama(intermediate_size=63), "bfloat16") is None
    assert fuse(tiny_llama(intermediate_size=63), "float32") is not None


def scaled(module: nn.Module) -> None:
    """Its outputs become 0.9 of what they were; its parts and parameters stay."""
    theirs = type(module)

    class Scaled(theirs):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (0.9 * out[0], *out[1:]) if isinstance(out, tuple) else 0.9 * out

    module.__class__ = Scaled


PARTS = ["mlp", "self_attn", "input_layernorm", "self_attn.k_proj", "mlp.act_fn", ""]


@needs_kernels
@pytest.mark.parametrize("part", PARTS)
def test_a_layer_that_computes_something_else_is_refused(part):
    hf = tiny_llama()
    assert fuse(hf, "float32") is not None
    scaled(hf.model.layers[0].get_submodule(part))
    assert fuse(hf, "float32") is None
    assert_same(ours(CausalLM(hf), (5, 9)), reference(hf, (5, 9)))


@needs_bfloat16
@pytest.mark.parametrize("part", PARTS)
def test_a_layer_that_computes_something_else_is_refused_in_bfloat16_too(part):
    hf = tiny_llama(vocab_size=EVEN)
    assert fuse(hf, "bfloat16") is not None
    scaled(hf.model.layers[0].get_submodule(part))
    assert fuse(hf, "bfloat16") is None


@needs_bfloat16
@pytest.mark.parametrize("part", ["mlp", "self_attn.k_proj"])
def test_a_layer_of_a_fresh_model_that_computes_something_else_is_refused_in_bfloat16_too(part):
    hf = tiny_llama(vocab_size=EVEN, initializer_range=0.02)
    scaled(hf.model.layers[0].get_submodule(part))
    assert fuse(hf, "bfloat16") is None
