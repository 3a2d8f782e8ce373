"""A trained reward model as a source: order kept, batch size without effect, read at the last token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama_gqa
from tiny_runs import ragged_rows, sample

from pellucid.models import ScalarModel
from pellucid.rewards import ModelReward, RewardSource


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScalarModel(LlamaForSequenceClassification(tiny_llama_gqa(num_labels=1, pad_token_id=0).config))
    model.set_shift(0.3)
    return model


ROWS = ragged_rows(seed=4, lengths=(7, 3, 9, 3, 5, 8, 4))
SAMPLES = [sample(row[:2], row[2:], group_id=i) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_scores_keep_their_order_and_do_not_depend_on_the_batch(model, batch_size):
    source: RewardSource = ModelReward(model, batch_size)
    scores = source.score(SAMPLES)
    for row, score in zip(ROWS, scores, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            alone = model.hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item() - 0.3
        assert score.value == pytest.approx(alone, abs=1e-5)
        assert score.source == "reward_model"


def test_no_samples(model):
    assert ModelReward(model, 4).score([]) == []


def test_scoring_leaves_no_gradient_behind(model):
    ModelReward(model, 4).score(SAMPLES)
    assert all(p.grad is None for p in model.hf.parameters())
