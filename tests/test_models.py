"""The LM head in chunks against plain softmax, and both kinds of model against plain transformers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_llama_gqa, tiny_qwen2
from tiny_runs import padded, ragged_rows
from torch import nn

from pellucid import models
from pellucid.errors import DataError, IntegrityError
from pellucid.models import CausalLM, ScalarModel, enable_gradient_checkpointing, token_logprobs

TOKENS, HIDDEN = 23, 8


def full_logprobs(hidden, weight, bias, targets, temperature, softcap):
    """The same two numbers from the whole (N,V) logits, by autograd."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    every = (logits / temperature).log_softmax(-1)
    return every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)


def head_inputs(bias: bool, dtype=torch.float32, tokens=TOKENS):
    random = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=dtype).requires_grad_()  # noqa: E731
    inputs = make(tokens, HIDDEN), make(VOCAB_SIZE, HIDDEN), make(VOCAB_SIZE) if bias else None
    return *inputs, torch.randint(VOCAB_SIZE, (tokens,), generator=random)


def tiny_gemma2(**overrides):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(Gemma2Config(**shape, **heads, **overrides)).eval()


def tiny_scalar(seed: int = 0, **overrides) -> ScalarModel:
    from transformers import LlamaForSequenceClassification

    config = tiny_llama_gqa(num_labels=1, **overrides).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScalarModel(LlamaForSequenceClassification(config))


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("chunk", [1, 5 * VOCAB_SIZE, 1 << 21], ids=["one token", "5 tokens", "all"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_head_is_log_softmax_of_the_whole_logits(monkeypatch, chunk, softcap, bias):
    monkeypatch.setattr(models.head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(models.head, "CHUNK_ELEMENTS", chunk)
    assert len(models.head._chunks(TOKENS, VOCAB_SIZE)) == {1: 23, 5 * VOCAB_SIZE: 5}.get(chunk, 1)
    monkeypatch.setattr(models.head, "CHUNK_ROWS", 1)
    *leaves, targets = head_inputs(bias)
    upstream = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(2))
    results = []
    for compute in (
        lambda: token_logprobs(*leaves, targets, 0.7, softcap, entropy=True),
        lambda: full_logprobs(*leaves, targets, 0.7, softcap),
    ):
        logprobs, entropy = compute()
        grads = torch.autograd.grad(
            (logprobs * upstream[0] + entropy * upstream[1]).sum(), [x for x in leaves if x is not None]
        )
        results.append([logprobs, entropy, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["logprobs", "entropy"])
def test_either_output_of_the_head_can_be_differentiated_alone(which):
    *leaves, targets = head_inputs(bias=True)
    index = ["logprobs", "entropy"].index(which)
    ours = torch.autograd.grad(token_logprobs(*leaves, targets, 1.3, None, True)[index].sum(), leaves)
    theirs = torch.autograd.grad(full_logprobs(*leaves, targets, 1.3, None)[index].sum(), leaves)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_chunked_head_in_float64(monkeypatch, softcap):
    monkeypatch.setattr(models.head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(models.head, "CHUNK_ELEMENTS", 22)
    assert len(models.head._chunks(3, 11)) == 2
    monkeypatch.setattr(models.head, "CHUNK_ROWS", 1)
    *leaves, targets = head_inputs(bias=True, dtype=torch.float64, tokens=3)
    leaves[1] = leaves[1].detach()[:11].requires_grad_()
    leaves[2] = leaves[2].detach()[:11].requires_grad_()

    def head(hidden, weight, bias):
        return token_logprobs(hidden, weight, bias, targets % 11, 0.7, softcap, entropy=True)

    assert torch.autograd.gradcheck(head, leaves)


def test_head_with_no_tokens_under_the_mask():
    *leaves, targets = head_inputs(bias=False, tokens=0)
    logprobs, _ = token_logprobs(*leaves, targets, 1.0)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert leaves[1].grad.abs().sum() == 0


# ---------------------------------------------------------------- the causal LM


ARCHITECTURES = {"llama": tiny_llama, "gqa": tiny_llama_gqa, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logprobs_and_entropy_are_those_of_plain_transformers(make, temperature):
    hf = make()
    ids, mask = padded(ragged_rows())
    wanted = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    logprobs, entropy = CausalLM(hf).logprobs(ids, mask, wanted, temperature, entropy=True)
    with torch.no_grad():
        every = (hf(input_ids=ids, attention_mask=mask.long()).logits / temperature).log_softmax(-1)
    expected = every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    counted = wanted.clone()
    counted[:, 0] = False
    torch.testing.assert_close(logprobs[:, 1:][counted[:, 1:]], expected[counted[:, 1:]], atol=2e-5, rtol=1e-5)
    spread = -(every.exp() * every).sum(-1)[:, :-1]
    torch.testing.assert_close(entropy[:, 1:][counted[:, 1:]], spread[counted[:, 1:]], atol=2e-5, rtol=1e-5)
    assert (logprobs[~counted] == 0).all() and (entropy[~counted] == 0).all()


def test_logprobs_leaves_the_callers_mask_alone():
    ids, mask = padded(ragged_rows())
    before = mask.clone()
    CausalLM(tiny_llama()).logprobs(ids, mask, mask, 1.0)
    assert mask.equal(before)


def test_softcapped_logits_as_in_gemma2():
    hf = tiny_gemma2(final_logit_softcapping=1.5)
    ids, mask = padded(ragged_rows())
    logprobs, _ = CausalLM(hf).logprobs(ids, mask, mask, 1.0)
    with torch.no_grad():
        every = hf(input_ids=ids, attention_mask=mask.long()).logits.log_softmax(-1)
    expected = every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], atol=2e-5, rtol=1e-5)


def test_a_model_that_scales_its_logits_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GraniteConfig(**shape, num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0, pad_token_id=None)
    with pytest.raises(IntegrityError, match=r"GraniteForCausalLM: the LM head .* not supported"):
        CausalLM(GraniteForCausalLM(config).eval())


def test_gradients_of_the_model_equal_those_through_the_whole_logits():
    ids, mask = padded(ragged_rows())
    ours, plain = CausalLM(tiny_llama_gqa()), tiny_llama_gqa()
    logprobs, _ = ours.logprobs(ids, mask, mask, 0.7)
    logprobs.sum().backward()
    every = (plain(input_ids=ids, attention_mask=mask.long()).logits / 0.7).log_softmax(-1)
    (every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum().backward()
    for (name, a), b in zip(ours.hf.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_is_off_in_both_modes(mode):
    hf = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = CausalLM(hf)
    getattr(hf, mode)()
    ids, mask = padded(ragged_rows())
    first, second = (model.logprobs(ids, mask, mask, 1.0)[0] for _ in range(2))
    assert first.equal(second)


def test_dropout_kept_as_a_number_is_off_too():
    """Many architectures call functional.dropout(p=self.dropout), which no nn.Dropout shows."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    hf = OPTForCausalLM(OPTConfig(**shape, num_attention_heads=2, word_embed_proj_dim=32, dropout=0.5))
    model = CausalLM(hf)
    hf.train()
    ids, mask = padded(ragged_rows())
    first, second = (model.logprobs(ids, mask, mask, 1.0)[0] for _ in range(2))
    assert first.equal(second)


def count_forwards(model: CausalLM) -> list[int]:
    """Grows by one whenever the first layer runs."""
    calls: list[int] = []
    if model._fused is None:
        model.hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    else:
        layer = model._fused.layers[0]
        run = layer.forward
        layer.forward = lambda *inputs: (calls.append(1), run(*inputs))[1]
    return calls


@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(packing):
    ids, mask = padded(ragged_rows())
    grads, runs = [], []
    for checkpointed in (False, True):
        model = CausalLM(tiny_qwen2(), packing=packing)
        if checkpointed:
            enable_gradient_checkpointing(model.hf)
        calls = count_forwards(model)
        model.logprobs(ids, mask, mask, 1.0)[0].sum().backward()
        grads.append([p.grad for p in model.hf.parameters()])
        runs.append(len(calls))
    assert runs == [1, 2], "the layer runs again in the backward pass"
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_bfloat16_is_near_float32_and_keeps_float32_weights_and_gradients(packing):
    ids, mask = padded(ragged_rows())
    results = {}
    for precision in ("float32", "bfloat16"):
        model = CausalLM(tiny_llama(initializer_range=0.1), precision, packing)
        logprobs, entropy = model.logprobs(ids, mask, mask, 1.0, entropy=True)
        logprobs.sum().backward()
        results[precision] = logprobs.detach(), entropy.detach()
        for parameter in model.hf.parameters():
            assert parameter.dtype is torch.float32 and parameter.grad.dtype is torch.float32
            assert parameter.grad.isfinite().all()
    for high, low in zip(results["float32"], results["bfloat16"], strict=True):
        assert low.dtype is torch.float32
        assert 0 < (high - low).abs().max() < 0.05


def test_bfloat16_scores_are_near_float32():
    ids, mask = padded(ragged_rows())
    scores = []
    for precision in ("float32", "bfloat16"):
        model = ScalarModel(tiny_scalar(initializer_range=0.1).hf, precision)
        scores.append(model.scores(ids, mask).detach())
    assert scores[1].dtype is torch.float32
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.05


# ---------------------------------------------------------------- the scalar head


def test_values_are_read_one_token_earlier_and_scores_at_the_last_token():
    model = tiny_scalar()
    model.set_shift(0.5)
    ids, mask = padded(ragged_rows())
    with torch.no_grad():
        hidden = model.hf.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        every = model.hf.score(hidden)[..., 0] - 0.5
        values, scores = model.values(ids, mask, mask), model.scores(ids, mask)
    torch.testing.assert_close(values[:, 1:][mask[:, 1:]], every[:, :-1][mask[:, 1:]])
    assert (values[~mask] == 0).all() and (values[:, 0] == 0).all()
    torch.testing.assert_close(scores, every[torch.arange(len(ids)), mask.sum(1) - 1])


def test_scores_pool_by_mask_where_pad_is_eos():
    """transformers takes the rightmost token that is not pad: with pad == eos that is one too early."""
    eos = 7
    model = tiny_scalar(pad_token_id=eos, eos_token_id=eos)
    rows = [[1, 2, 3, eos], [4, eos], [eos, eos, 6, eos]]
    ids, mask = padded(rows, pad_id=eos)
    scores = model.scores(ids, mask)
    alone = torch.cat([model.scores(*padded([row], pad_id=eos)) for row in rows])
    torch.testing.assert_close(scores, alone)
    hidden = model.hf.base_model(input_ids=torch.tensor([rows[0]])).last_hidden_state
    torch.testing.assert_close(scores[0], model.hf.score(hidden)[0, -1, 0])
    with torch.no_grad():
        theirs = model.hf(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    assert (theirs - scores).abs().min() > 1e-3


def test_a_bias_of_the_score_head_counts():
    model = tiny_scalar()
    ids, mask = padded(ragged_rows())
    before = model.scores(ids, mask)
    head = nn.Linear(32, 1)
    head.weight, head.bias = model.hf.score.weight, nn.Parameter(torch.tensor([2.0]))
    model.hf.score = head
    torch.testing.assert_close(model.scores(ids, mask), before + 2.0)


def test_a_head_with_two_outputs_is_refused():
    from transformers import LlamaForSequenceClassification

    with pytest.raises(DataError, match="LlamaForSequenceClassification has no linear head named 'score' with one"):
        ScalarModel(LlamaForSequenceClassification(tiny_llama(num_labels=2).config))


# ---------------------------------------------------------------- where and how precisely


def test_resolve_device_and_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_device("auto") == models.resolve_device("cpu") == "cpu"
    with pytest.raises(DataError, match=r"run\.device is 'cuda', but PyTorch sees no CUDA device"):
        models.resolve_device("cuda")
    assert models.resolve_precision("bfloat16", "cpu") == "bfloat16"
    for capability, precision in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capability: {c: True})
        assert models.resolve_precision("auto", "cpu") == precision


def test_new_causal_lm_is_drawn_from_its_seed_alone():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    rest = {"context": 32, "eos_id": 1, "pad_id": 0, "device": "cpu", "precision": "float32"}
    state = torch.get_rng_state()
    weights = [models.new_causal_lm(**shape, **rest, seed=s).head.weight for s in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_fresh_score_head_has_the_variance_of_stiennon_et_al(tmp_path):
    tiny_llama(hidden_size=256, num_hidden_layers=1).save_pretrained(tmp_path)
    model = models.load_scalar_model(str(tmp_path), "cpu", "float32", 0, seed=1)
    assert math.isclose(model.hf.score.weight.var().item() * 257, 1, rel_tol=0.3)
    again = models.load_scalar_model(str(tmp_path), "cpu", "float32", 0, seed=1)
    other = models.load_scalar_model(str(tmp_path), "cpu", "float32", 0, seed=2)
    assert model.hf.score.weight.equal(again.hf.score.weight)
    assert not model.hf.score.weight.equal(other.hf.score.weight)
