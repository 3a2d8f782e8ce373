"""Sample -> Batch: what the columns mean, and that a batch is made once and never edited."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_runs import random_batch, sample

from pellucid.types import SamplingParams, collate, collate_supervised, derive_seed, pad

SAMPLES = [
    sample([11, 12], [13, 14, 15], group_id=0),
    sample([21, 22, 23], [24, 25], actions=[True, False], group_id=1, stop_reason="length"),
    sample([31], [32, 33, 34, 35, 36], actions=[True, False, True, False, False], group_id=1),
]


def test_collate_pads_on_the_right_and_describes_token_t_in_column_t():
    batch = collate(SAMPLES, pad_id=99)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 14, 15, 99],
        [21, 22, 23, 24, 25, 99],
        [31, 32, 33, 34, 35, 36],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 5, 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert batch.action_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert batch.ended.int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert (batch.rollout_logprobs == -1.0 * batch.action_mask).all()
    assert (batch.bootstrap_values == 0).all()
    assert batch.group_ids.tolist() == [0, 1, 1]
    assert batch.stop_reason == ("stop", "length", "stop")
    assert len(batch) == 3


def test_masks_come_from_the_samples_even_if_pad_is_a_token_of_theirs():
    for pad_id in (0, 15, 22, 36):
        batch = collate(SAMPLES, pad_id=pad_id)
        assert batch.attention_mask.sum(1).tolist() == [5, 5, 6]
        assert batch.action_mask.sum(1).tolist() == [3, 1, 2]


def test_dtypes():
    batch = collate(SAMPLES, pad_id=0)
    kinds = {name: getattr(batch, name).dtype for name in ("input_ids", "position_ids", "group_ids", "policy_version")}
    assert set(kinds.values()) == {torch.int64}
    assert {batch.attention_mask.dtype, batch.response_mask.dtype, batch.action_mask.dtype, batch.ended.dtype} == {
        torch.bool
    }
    assert batch.rollout_logprobs.dtype is torch.float32


def test_a_sample_without_an_action_has_no_end():
    batch = collate([sample([1, 2], [3], actions=[False])], pad_id=0)
    assert not batch.ended.any()


def test_collate_needs_a_sample():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_id=0)


def test_having_makes_a_field_once_and_edits_nothing():
    batch = collate(SAMPLES, pad_id=0)
    scores = torch.ones(3)
    scored = batch.having(scores=scores)
    assert batch.scores is None and scored.scores is scores
    with pytest.raises(ValueError, match="batch already has scores"):
        scored.having(scores=scores)
    with pytest.raises(ValueError, match="batch has no advantages yet"):
        scored.get("advantages")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored.scores = None  # type: ignore[misc]


def test_select_takes_rows_of_every_field_and_cuts_the_padding():
    batch = random_batch()
    rows = torch.tensor([4, 0])
    part = batch.select(rows)
    width = int(batch.attention_mask[rows].sum(1).max())
    assert part.input_ids.shape == (2, width)
    for field in dataclasses.fields(batch):
        whole, picked = getattr(batch, field.name), getattr(part, field.name)
        if isinstance(whole, tuple):
            assert picked == (whole[4], whole[0])
        elif whole is None:
            assert picked is None
        else:
            assert picked.equal(whole[rows] if whole.dim() == 1 else whole[rows, :width]), field.name
    assert not batch.attention_mask[rows, width:].any()


def test_to_moves_every_tensor():
    moved = random_batch().to("meta")
    devices = {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)}
    assert devices == {"meta"}


def test_collate_supervised():
    batch = collate_supervised([[1, 2, 3], [4]], [[False, True, True], [True]], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.select(torch.tensor([1])).input_ids.tolist() == [[4]]


def test_pad():
    assert pad([[1.5], [2.0, 3.0]], 0.0, torch.float32).tolist() == [[1.5, 0.0], [2.0, 3.0]]


def test_response_ids():
    assert SAMPLES[2].response_ids == [32, 33, 34, 35, 36]


def test_seeds_differ_by_every_part_and_are_the_same_everywhere():
    params = SamplingParams(max_new_tokens=1, seed=3, step=5)
    seeds = {
        SamplingParams(max_new_tokens=1, seed=seed, step=step).request_seed(prompt, index)
        for seed in range(3)
        for step in range(3)
        for prompt in range(3)
        for index in range(3)
    }
    assert len(seeds) == 81 and all(0 <= seed < 2**63 for seed in seeds)
    assert params.request_seed(1, 2) == derive_seed(3, 5, 1, 2)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    # Written down, so that a run of today can be repeated with the library of tomorrow.
    assert derive_seed(0, "rollout") == 3670801387313646888
