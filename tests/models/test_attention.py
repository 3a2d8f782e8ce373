"""Attention without padding against attention with it, and an adopted model against one that never was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_gemma2, tiny_llama, tiny_llama_gqa
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pellucid.errors import DataError
from pellucid.models import CausalLM, Packed, Serving, adopt, enable_gradient_checkpointing, forward
from pellucid.models import attention as module

LENGTHS = {"one": (9,), "equal": (7, 7, 7), "all different": (5, 1, 12, 8), "runs": (4, 4, 9, 9, 9, 1, 4)}
every_model = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(lengths) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(VOCAB_SIZE, (length,), generator=random) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), (B,T) each."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return ids, nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def untouched(make):
    """The model as transformers made it. Gemma 2 caps its scores, which of transformers' own kinds only eager does."""
    hf = make()
    if make is tiny_gemma2:
        hf.set_attn_implementation("eager")
    return hf


def packed_logits(hf, rows: list[torch.Tensor]) -> torch.Tensor:
    """(N,V), sequences end to end."""
    places = torch.cat([torch.arange(len(row)) for row in rows])
    return forward(hf, torch.cat(rows)[None], places[None], Packed(tuple(map(len, rows))), use_cache=False).logits[0]


def gradients(hf, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    hf.zero_grad()
    (logits.log_softmax(-1) * weights).sum().div(len(logits)).backward()
    return {name: parameter.grad.clone() for name, parameter in hf.named_parameters()}


def assert_same_gradients(ours, theirs) -> None:
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------- packed


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_model
def test_packed_is_padded_is_one_by_one(make, lengths):
    rows = sequences(lengths)
    adopted, plain = make(), untouched(make)
    adopt(adopted)
    ours = packed_logits(adopted, rows)
    alone = torch.cat([plain(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    ids, mask = padded(rows)
    theirs = plain(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[mask]
    torch.testing.assert_close(ours, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    found = gradients(adopted, ours)
    assert_same_gradients(found, gradients(plain, alone))
    assert_same_gradients(found, gradients(plain, theirs))


@every_model
def test_both_layouts_of_the_wrapper_give_the_same(make):
    """Rows that differ in length, with the padding on either side."""
    rows, results = sequences((6, 3, 11, 3)), []
    for packing in (True, False):
        for side in ("right", "left"):
            model = CausalLM(make() if packing else untouched(make), packing=packing)
            ids, mask = padded(rows, side)
            logprobs, entropy = model.logprobs(ids, mask, mask, 0.7, entropy=True)
            (logprobs.sum() / 10).backward()
            results.append((logprobs[mask], entropy[mask], {n: p.grad for n, p in model.hf.named_parameters()}))
    for logprobs, entropy, grads in results[1:]:
        torch.testing.assert_close(logprobs, results[0][0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropy, results[0][1], atol=2e-5, rtol=1e-5)
        assert_same_gradients(grads, results[0][2])


@every_model
def test_gradient_checkpointing_changes_no_gradient(make):
    rows, found = sequences((6, 3, 3, 11)), []
    for checkpointed in (False, True):
        model = CausalLM(make())
        if checkpointed:
            enable_gradient_checkpointing(model.hf)
        ids, mask = padded(rows)
        (model.logprobs(ids, mask, mask, 1.0)[0].sum() / 10).backward()
        found.append({name: parameter.grad for name, parameter in model.hf.named_parameters()})
    assert_same_gradients(*found)


def test_a_row_without_tokens_adds_nothing():
    model, rows = CausalLM(tiny_llama()), sequences((4, 6))
    ids, mask = padded(rows)
    expected, _ = model.logprobs(ids, mask, mask, 1.0)
    ids, mask = (torch.cat([x[:1], torch.zeros_like(x[:1]), x[1:]]) for x in (ids, mask))
    found, _ = model.logprobs(ids, mask, mask, 1.0)
    assert not found[1].any()
    torch.testing.assert_close(found[[0, 2]], expected, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- without a layout


@pytest.mark.parametrize("side", ["left", "right"])
@every_model
def test_an_adopted_model_called_plainly_is_plain_transformers(make, side):
    adopted, plain = make(), untouched(make)
    adopt(adopted)
    ids, mask = padded(sequences((6, 3, 11)), side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for kwargs in (
        {"input_ids": ids, "attention_mask": mask.long(), "position_ids": places},
        {"input_ids": ids},
        {"input_ids": ids[:, -1:]},
    ):
        ours, theirs = (hf(**kwargs, use_cache=False).logits for hf in (adopted, plain))
        seen = mask if "attention_mask" in kwargs else torch.ones(ours.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


@every_model
def test_an_adopted_model_generates_as_before(make):
    adopted, plain = make(), untouched(make)
    adopt(adopted)
    ids, mask = padded(sequences((6, 3, 11)), "left")
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    ours, theirs = (hf.generate(ids, attention_mask=mask.long(), **options) for hf in (adopted, plain))
    assert ours.equal(theirs)


@every_model
def test_a_saved_model_names_no_attention_of_ours(make, tmp_path):
    model = CausalLM(make())
    model.hf.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert module.IMPLEMENTATION not in written
    assert not [key for key in json.loads(written) if "attn_implementation" in key]
    again = type(model.hf).from_pretrained(tmp_path)
    assert again.config._attn_implementation != module.IMPLEMENTATION
    ids = sequences((9,))[0][None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.hf(ids).logits, atol=2e-5, rtol=1e-5)


def test_a_copy_of_an_adopted_model_can_be_packed():
    hf, rows = tiny_llama(), sequences((5, 2))
    adopt(hf)
    assert packed_logits(copy.deepcopy(hf), rows).equal(packed_logits(hf, rows))


# ---------------------------------------------------------------- what cannot be packed


def test_a_model_that_hands_on_no_layout_is_refused():
    hf = tiny_llama()
    theirs = type(hf.model.layers[0].self_attn)

    class Deaf(theirs):
        def forward(self, *args, layout=None, **kwargs):
            return super().forward(*args, **kwargs)

    for layer in hf.model.layers:
        layer.self_attn.__class__ = Deaf
    with pytest.raises(DataError, match=r"LlamaForCausalLM has an attention of its own .* set packing = false"):
        CausalLM(hf)
    hf = tiny_llama()
    hf.model.layers[1].self_attn.__class__ = Deaf
    with pytest.raises(DataError, match="its sequences cannot be laid end to end"):
        CausalLM(hf)


@pytest.mark.parametrize("kind", ["phimoe", "doge"])
def test_a_window_that_is_in_the_mask_alone_is_refused_or_kept(kind):
    """These models never tell their attention of the window: without a mask it would be lost beyond 6 tokens."""
    shape = tiny_llama_gqa().config.to_dict()
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wanted += ("num_key_value_heads", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    config = AutoConfig.for_model(kind, **{name: shape[name] for name in wanted}, sliding_window=6)
    torch.manual_seed(0)
    hf, ids = AutoModelForCausalLM.from_config(config).eval(), sequences((20,))[0][None]
    with torch.no_grad():
        expected = hf(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    everything = torch.ones_like(ids, dtype=torch.bool)
    try:
        model = CausalLM(hf)
    except DataError as error:
        assert "set packing = false" in str(error)
        model = CausalLM(hf, packing=False)
    found, _ = model.logprobs(ids, everything, everything, 1.0)
    torch.testing.assert_close(found[0, 1:], expected, atol=2e-5, rtol=1e-5)


def test_alibi_is_refused_with_packing_and_works_without():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    hf = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()
    with pytest.raises(DataError, match=r"BloomForCausalLM has an attention of its own .* set packing = false"):
        CausalLM(hf)
    rows = sequences((6, 3, 11))
    ids, mask = padded(rows)
    found, _ = CausalLM(hf, packing=False).logprobs(ids, mask, mask, 1.0)
    for row, ours in zip(rows, found, strict=True):
        with torch.no_grad():
            every = hf(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        expected = every.gather(1, row[1:, None])[:, 0]
        torch.testing.assert_close(ours[1 : len(row)], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_terms_of_attention_that_are_not_computed_are_refused(name):
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(DataError, match=f"Linear adds {name} to its attention"):
        module.attention(nn.Linear(1, 1), x, x, x, None, **{name: torch.zeros(2)})


# ---------------------------------------------------------------- serving


def serving(positions: list[int], prompts=(), cached=None) -> Serving:
    length = max(positions, default=0) + 1
    ragged = len(set(positions)) > 1
    return Serving(torch.tensor(positions, dtype=torch.int64), length, ragged, Packed(tuple(prompts)), cached)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7, 100])
@pytest.mark.parametrize("positions", [[0], [5], [5, 5, 5], [0, 5, 3], [9, 1, 8, 8]], ids=str)
def test_bias_of_cached_columns(positions, window):
    bias = serving(positions).bias(window)
    expected = torch.zeros(len(positions), 1, 1, max(positions) + 1)
    for row, position in enumerate(positions):
        for column in range(max(positions) + 1):
            if column > position or (window is not None and column <= position - window):
                expected[row, 0, 0, column] = -torch.inf
    if bias is None:
        assert not expected.any()
    else:
        assert bias.equal(expected)


def test_the_tokens_whose_successors_are_asked_for():
    assert serving([3, 1], (4, 1, 2)).last_tokens().tolist() == [0, 1, 5, 6, 8]
    assert serving([], (4, 1)).last_tokens().tolist() == [3, 4]
    assert serving([3, 1]).last_tokens().tolist() == [0, 1]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prompts", [(), (4,), (2, 2, 5)], ids=str)
@pytest.mark.parametrize("positions", [[], [5, 5], [2, 6, 0]], ids=str)
def test_serving_attention_is_a_loop_over_tokens(positions, prompts, window, softcap):
    if not positions and not prompts:
        return
    n, total = len(positions), len(positions) + sum(prompts)
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, total, 8, generator=random) for heads in (4, 2, 2))
    caches = [torch.randn(n, 2, 7, 8, generator=random) for _ in range(2)]
    for row, position in enumerate(positions):
        for cache, new in zip(caches, (key, value), strict=True):
            cache[row, :, position] = new[0, :, row]
    layout = serving(positions, prompts, lambda layer: tuple(cache[:, :, : max(positions) + 1] for cache in caches))
    found = module.serving_attention(query, key, value, layout, 0, 0.5, window, softcap)
    assert found.shape == (1, total, 4, 8)
    # For each token, the keys (kv_heads, seen, dim) and values of its own sequence up to itself.
    past = [(caches[0][row, :, : p + 1], caches[1][row, :, : p + 1]) for row, p in enumerate(positions)]
    start = n
    for length in prompts:
        past += [(key[0, :, start : start + i + 1], value[0, :, start : start + i + 1]) for i in range(length)]
        start += length
    for token, (keys, values) in enumerate(past):
        for head in range(4):
            seen_keys, seen_values = (x[head // 2][-window if window else 0 :].double() for x in (keys, values))
            scores = seen_keys @ query[0, head, token].double() * 0.5
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            expected = scores.softmax(0) @ seen_values
            torch.testing.assert_close(found[0, token, head].double(), expected, atol=1e-5, rtol=1e-5)
