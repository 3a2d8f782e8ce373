"""The likeliest tokens beside each sampled one, against the whole log-softmax of the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_llama_gqa
from tiny_runs import padded, ragged_rows, random_batch
from torch import Tensor

from pellucid.execution.learner import MicroBatchLimits
from pellucid.execution.workers import ReferenceWorker
from pellucid.models import CausalLM

every_architecture = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)


def whole_logprobs(hf: torch.nn.Module, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> dict[tuple, Tensor]:
    """(row, t) -> (V,) log-probs of the token at t, by transformers' own forward of each row alone."""
    found = {}
    with torch.no_grad():
        for row in range(len(ids)):
            columns = mask[row].nonzero()[:, 0].tolist()
            logits = hf(input_ids=ids[row, columns][None], use_cache=False).logits[0].double()
            for i, t in enumerate(columns[1:]):
                found[row, t] = (logits[i] / temperature).log_softmax(-1)
    return found


@every_architecture
@pytest.mark.parametrize(("temperature", "packing"), [(1.0, True), (0.6, False)])
def test_top_tokens_are_those_of_the_whole_distribution(make, temperature, packing):
    ids, mask = padded(ragged_rows())
    expected = whole_logprobs(make(), ids, mask, temperature)
    model = CausalLM(make(), packing=packing)
    top_ids, top = model.top_tokens(ids, mask, mask, temperature, 5)
    assert top_ids.shape == top.shape == (*ids.shape, 5)
    assert (top_ids.dtype, top.dtype) == (torch.int64, torch.float32)
    for (row, t), whole in expected.items():
        values, order = whole.sort(descending=True)
        torch.testing.assert_close(top[row, t].double(), values[:5], atol=5e-5, rtol=0)
        # Where two tokens are as likely, either may come first.
        torch.testing.assert_close(whole[top_ids[row, t]], values[:5], atol=5e-5, rtol=0)
        if values[0] - values[1] > 1e-3:
            assert top_ids[row, t, 0] == order[0]
        assert len(set(top_ids[row, t].tolist())) == 5
    outside = torch.ones_like(mask)
    for row, t in expected:
        outside[row, t] = False
    assert (top[outside] == 0).all() and (top_ids[outside] == 0).all(), "padding and each row's first token"


def test_more_than_the_vocabulary_is_the_vocabulary():
    ids, mask = padded(ragged_rows())
    top_ids, top = CausalLM(tiny_llama_gqa()).top_tokens(ids, mask, mask, 1.0, VOCAB_SIZE + 30)
    assert top_ids.shape == (*ids.shape, VOCAB_SIZE)
    assert sorted(top_ids[0, 2].tolist()) == list(range(VOCAB_SIZE))
    assert top[0, 2].exp().sum() == pytest.approx(1, abs=1e-5)


def test_more_rows_than_the_head_takes_at_once(monkeypatch):
    monkeypatch.setattr("pellucid.models.head.CHUNK_ROWS", 3)
    monkeypatch.setattr("pellucid.models.head.CHUNK_ELEMENTS", 1)
    ids, mask = padded(ragged_rows())
    expected = whole_logprobs(tiny_llama_gqa(), ids, mask)
    _, top = CausalLM(tiny_llama_gqa()).top_tokens(ids, mask, mask, 1.0, 2)
    for place, whole in expected.items():
        torch.testing.assert_close(top[place].double(), whole.topk(2).values, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "gpt2"])
def test_in_bfloat16_within_its_rounding(name):
    ids, mask = padded(ragged_rows())
    expected = whole_logprobs(ARCHITECTURES[name](), ids, mask)
    model = CausalLM(ARCHITECTURES[name](), "bfloat16")
    top_ids, top = model.top_tokens(ids, mask, mask, 1.0, 4)
    gaps = torch.stack([(top[place].double() - whole[top_ids[place]]).abs().max() for place, whole in expected.items()])
    assert 1e-5 < gaps.max() < 0.5 and gaps.mean() < 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_no_token_is_likelier_than_the_first(precision, temperature):
    """By the worker, over micro-batches: against its own log-probs, which another piece of code makes."""
    batch = random_batch(9, seed=4)
    worker = ReferenceWorker(CausalLM(tiny_llama_gqa(), precision), temperature, MicroBatchLimits(20, 2))
    made, (logprobs, _) = worker.top_tokens(batch, VOCAB_SIZE), worker.logprobs(batch)
    assert made.keys() == {"top_ids", "top_logprobs"}
    assert made["top_ids"].shape == (*batch.input_ids.shape, VOCAB_SIZE)
    place = batch.action_mask & (batch.position_ids > 0)
    best, chosen = made["top_logprobs"][..., 0][place], logprobs[place]
    assert (chosen <= best + 1e-5).all() and (chosen < best - 0.1).any()
    at = made["top_ids"] == batch.input_ids[..., None]
    torch.testing.assert_close(made["top_logprobs"][at & place[..., None]], chosen, atol=1e-5, rtol=0)
    assert (made["top_logprobs"].diff(dim=-1) <= 0).all(), "likeliest first"
