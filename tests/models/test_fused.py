"""The training pass over kernels against plain transformers: values, gradients, and weights that change."""

from __future__ import annotations

import copy

import pytest
import torch
from native_kernels import each_number_of_threads, needs_bfloat16, needs_kernels
from passes import (
    EVEN,
    FUSED,
    assert_same,
    distance,
    gap,
    gradients,
    our_loss,
    ours,
    padded,
    qwen2,
    reference,
    sequences,
    upstream,
    with_noisy_biases,
)
from tiny_models import tiny_llama, tiny_llama_gqa
from torch import nn
from transformers import LlamaForSequenceClassification, Qwen2ForSequenceClassification

from pellucid.config import OptimizerConfig
from pellucid.execution.learner import Learner
from pellucid.models import CausalLM, ScalarModel, enable_gradient_checkpointing

STEP = 0.002
"""Of a difference quotient, in weights: small against the loss's curvature, large against its rounding."""
LENGTHS = {"one": (9,), "ragged": (5, 1, 12, 33, 2, 40)}

pytestmark = needs_kernels
every_model = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
each_precision = pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_kernels(hf, precision="float32", packing=True) -> CausalLM:
    model = CausalLM(hf, precision, packing)
    model._fused = model._packed_head = None
    return model


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_model
def test_logprobs_entropies_and_gradients_are_those_of_transformers(make, lengths):
    expected = reference(make(), lengths)
    for side in ("right", "left"):
        model = CausalLM(make())
        assert model._fused is not None and model._packed_head is not None
        found = ours(model, lengths, side)
        assert_same(found, expected)
    assert_same(ours(without_kernels(make(), packing=False), lengths), expected)


@every_model
def test_the_gradient_is_the_slope_of_the_loss(make):
    """Along the gradient, and along the part of a few parameters of each kind, by central differences."""
    lengths = (5, 1, 12)
    model = CausalLM(make())
    _, found = ours(model, lengths)
    names = dict(model.hf.named_parameters())
    kinds = ("q_proj.weight", "v_proj", "o_proj", "up_proj", "down_proj", "input_layernorm", "embed_tokens")
    for kind in ("", *kinds):
        chosen = {name: gradient for name, gradient in found.items() if kind in name}
        length, values = distance(chosen).item(), []
        for sign in (1, -1):
            with torch.no_grad():
                for name, gradient in chosen.items():
                    names[name] += sign * STEP * gradient / length
                values.append(our_loss(model, sequences(lengths), upstream(lengths))[0].item())
                for name, gradient in chosen.items():
                    names[name] -= sign * STEP * gradient / length
        assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(length, rel=0.01), kind


@needs_bfloat16
@every_model
def test_bfloat16_is_no_further_from_the_exact_gradient_than_autocast(make):
    """Both round the two sides of every product; the kernels round little else."""
    lengths, gaps, hf = LENGTHS["ragged"], [], make(vocab_size=EVEN, initializer_range=0.1)
    exact = reference(hf, lengths)
    for model in (CausalLM(copy.deepcopy(hf), "bfloat16"), without_kernels(copy.deepcopy(hf), "bfloat16")):
        parts, found = ours(model, lengths)
        outputs = [(part - other).abs().max() for part, other in zip(parts, exact[0], strict=True)]
        gaps.append([gap(found, exact[1]), float(max(outputs))])
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        assert (model._fused is None) == (model._packed_head is None) == (len(gaps) == 2)
    assert gaps[0][0] < 1.1 * gaps[1][0] and gaps[0][0] < 0.03
    assert gaps[0][1] < 1.5 * gaps[1][1]


@needs_bfloat16
def test_bfloat16_of_an_odd_vocabulary_leaves_the_head_to_pytorch():
    model = CausalLM(tiny_llama(initializer_range=0.1), "bfloat16")
    assert model._fused is not None and model._packed_head is None
    assert gap(ours(model, (5, 9))[1], reference(tiny_llama(initializer_range=0.1), (5, 9))[1]) < 0.03


@each_precision
@every_model
def test_gradient_checkpointing_gives_the_same_bits(make, precision):
    results = []
    for checkpointed in (False, True):
        model = CausalLM(make(vocab_size=EVEN), precision)
        if checkpointed:
            enable_gradient_checkpointing(model.hf)
        calls, layer = [], model._fused.layers[0]
        run = layer.forward
        layer.forward = lambda *args, calls=calls, run=run: calls.append(1) or run(*args)
        results.append(ours(model, (5, 1, 12)))
        assert len(calls) == 1 + checkpointed, "the layer runs again in the backward pass"
    for name, gradient in results[0][1].items():
        assert results[1][1][name].equal(gradient)


@every_model
def test_micro_batches_add_up_to_the_gradient_of_the_whole(make):
    lengths = (5, 1, 12, 33, 2, 40)
    model = CausalLM(make())
    parts, whole = ours(model, lengths)
    rows, weights, found = sequences(lengths), upstream(lengths), []
    model.hf.zero_grad()
    for group in ([0, 1], [2], [3, 4, 5]):
        loss, pieces = our_loss(model, [rows[i] for i in group], [weights[i] for i in group])
        loss.backward()
        found += pieces
    for piece, part in zip(found, parts, strict=True):
        assert piece.equal(part), "a sequence's log-probs do not depend on its company"
    assert_same((parts, gradients(model.hf)), (parts, whole), 1e-6)


@each_precision
def test_the_pass_depends_on_no_thread(precision):
    model = CausalLM(tiny_llama_gqa(vocab_size=EVEN), precision)
    parts, first = ours(model, (5, 1, 12, 40))
    for _ in each_number_of_threads():
        again, found = ours(model, (5, 1, 12, 40))
        assert all(one.equal(other) for one, other in zip(again, parts, strict=True))
        # PyTorch sums the embedding's gradient, and a bias's
        assert all(found[name].equal(first[name]) for name in first if "proj" in name)


def test_frozen_parameters_get_no_gradient_and_change_no_other():
    model = CausalLM(tiny_llama_gqa())
    parts, whole = ours(model, (5, 9))
    for name, parameter in model.hf.named_parameters():
        parameter.requires_grad_("layers.1" in name and "k_proj" not in name)
    model.hf.zero_grad()
    again, found = ours(model, (5, 9))
    assert found and all("layers.1" in name and "k_proj" not in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[name])
    assert all(one.equal(other) for one, other in zip(again, parts, strict=True))


# ---------------------------------------------------------------- scalar models


@pytest.mark.parametrize(
    ("kind", "make"), [(LlamaForSequenceClassification, tiny_llama_gqa), (Qwen2ForSequenceClassification, qwen2)]
)
def test_values_and_scores_are_those_of_transformers(kind, make):
    config = make(num_labels=1).config
    torch.manual_seed(0)
    hf = with_noisy_biases(kind(config).eval())
    lengths = LENGTHS["ragged"]
    rows, weights = sequences(lengths), upstream(lengths)
    exact, values, scores, loss = copy.deepcopy(hf).double(), [], [], 0.0
    for ids, weight in zip(rows, weights, strict=True):
        every = exact.score(exact.model(input_ids=ids[None], use_cache=False).last_hidden_state)[0, :, 0] - 0.5
        values.append(nn.functional.pad(every[:-1], (1, 0)))
        scores.append(every[-1])
        loss = loss + (values[-1] * weight[0]).sum() + every[-1] * weight[1, 0]
    loss.backward()
    model = ScalarModel(hf)
    assert model._fused is not None
    model.set_shift(0.5)
    ids, mask = padded(rows)
    found, found_scores = model.values(ids, mask, mask), model.scores(ids, mask)
    torch.testing.assert_close(found[mask].double(), torch.cat(values), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found_scores.double(), torch.stack(scores), atol=2e-5, rtol=1e-5)
    per_token = torch.cat([weight[0] for weight in weights])
    first = torch.stack([weight[1, 0] for weight in weights])
    ((found[mask] * per_token).sum() + (found_scores * first).sum()).backward()
    assert_same(([], gradients(hf)), ([], gradients(exact)))


# ---------------------------------------------------------------- weights that change


def write(model: CausalLM) -> None:
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.01)


def move(model: CausalLM) -> None:
    for parameter in model.hf.parameters():
        parameter.data = parameter.data * 1.01


def load(model: CausalLM) -> None:
    model.hf.load_state_dict(type(model.hf)(model.hf.config).state_dict())


def learn(model: CausalLM) -> None:
    learner = Learner("actor", model.hf, OptimizerConfig(lr=0.01), 10)
    learner.zero_grad()
    our_loss(model, sequences((5, 9)), upstream((5, 9)))[0].backward()
    learner.step()


def one_weight(model: CausalLM) -> None:
    with torch.no_grad():
        model.hf.model.layers[1].self_attn.v_proj.weight[3, 4] += 1


def one_norm(model: CausalLM) -> None:
    with torch.no_grad():
        model.hf.model.norm.weight[3] += 1


@pytest.mark.parametrize("change", [write, move, load, learn, one_weight, one_norm])
@pytest.mark.parametrize("make", [tiny_llama, tiny_llama_gqa, qwen2], ids=["untied", "tied", "biases"])
@each_precision
def test_changed_weights_are_used_by_the_next_pass(make, change, precision):
    """In both directions: the transposed copies too."""
    model = CausalLM(make(vocab_size=EVEN), precision)
    for _ in range(2):  # the second time into memory that packed copies have already
        before, _ = ours(model, (5, 9))
        change(model)
        parts, found = ours(model, (5, 9))
        assert not parts[1].equal(before[1]) or change is load
        fresh, expected = ours(CausalLM(copy.deepcopy(model.hf), precision), (5, 9))
        assert all(one.equal(other) for one, other in zip(parts, fresh, strict=True))
        assert all(found[name].equal(gradient) for name, gradient in expected.items())


@each_precision
def test_weights_changed_between_the_passes_are_an_error(precision):
    """Their packed copies are of the new weights by then, and the gradient would be of neither."""
    model = CausalLM(tiny_llama(vocab_size=EVEN), precision)
    for change in (write, one_weight, one_norm):
        loss, _ = our_loss(model, sequences((5, 9)), upstream((5, 9)))
        change(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
