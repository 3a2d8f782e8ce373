"""Operations, bytes and exponents are counted right: against a counter, against sums written out, against known powers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4),
    "qwen2, grouped": Qwen2Config(**SIZES, num_key_value_heads=2),
    "wide heads": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=32),
}


def eager(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_of_the_counter(name):
    """Eager attention multiplies all L x L pairs where we count the L(L+1)/2 that are seen."""
    from benchmarks.learner import count_flops

    model, length = eager(CONFIGS[name]), 32
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.ones(2, length, dtype=torch.int64), use_cache=False).logits.sum()
    forward = counter.get_total_flops()
    flops = count_flops(model, [(0, length)] * 2)
    assert flops.linear + flops.head + flops.attention * 2 * length / (length + 1) == pytest.approx(forward, rel=0.002)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.002)
    assert flops.step == 3 * flops.forward == 3 * sum(flops)


def test_prompts_cost_no_head_and_sequences_add_up():
    from benchmarks.learner import count_flops

    model = eager(CONFIGS["llama"])
    one, other = count_flops(model, [(5, 7)]), count_flops(model, [(3, 9)])
    assert one.linear == other.linear and one.attention == other.attention
    assert one.head == 2 * 128 * 48 * 7 and other.head == 2 * 128 * 48 * 9
    assert count_flops(model, [(5, 7), (3, 9)]) == tuple(a + b for a, b in zip(one, other, strict=True))


def test_both_packing_workloads_have_the_same_tokens():
    from benchmarks import learner

    works = learner.workloads(tiny=False)
    ragged, same = works[learner.RAGGED], works[learner.EQUAL]
    totals = [sum(pair) for pair in ragged]
    assert len(ragged) == len(same) == 64 and (min(totals), max(totals)) == (16, 160)
    for column in (0, 1):
        assert sum(pair[column] for pair in ragged) == sum(pair[column] for pair in same)
    assert {sum(pair) for pair in same} == {88}
    assert works[learner.PADDED] == ragged and works[learner.DENSE] == [(32, 128)] * 64


def test_a_batch_has_the_lengths_asked_for():
    from benchmarks.learner import random_batch

    batch = random_batch([(2, 3), (4, 1)], vocab_size=16)
    assert batch.attention_mask.sum(1).tolist() == [5, 5] and batch.action_mask.sum(1).tolist() == [3, 1]
    assert batch.input_ids.min() >= 1 and batch.input_ids.max() < 16


def test_the_rollout_reads_weights_and_cache():
    from benchmarks import gpu, scaling, shapes

    model = eager(CONFIGS["qwen2, grouped"])
    weights = sum(p.numel() for p in model.parameters())
    per_token = 2 * 2 * 12 * 3  # keys and values, heads, width of each, layers
    cached = sum(per_token * seen for _ in range(2) for seen in (32, 33, 34))
    point = scaling.Point(shapes.TINY, 2, 3, 3)
    assert scaling.rollout_bytes(model, point) == 4 * (3 * weights + cached)
    scale = gpu.Scale({}, 2, 32, 3, 0, 0, 0)
    assert gpu.bandwidth_seconds(model, scale, 10.0) == pytest.approx(2 * (3 * weights + cached) / 10)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_exponents(power):
    from benchmarks.scaling import exponent

    sizes = [64, 128, 512, 1024]
    assert exponent(sizes, [3.5 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_an_exponent_lies_between_its_parts():
    from benchmarks.scaling import exponent

    sizes = [64, 128, 256, 512, 1024]
    assert 1.2 < exponent(sizes, [n + n * n / 256 for n in sizes]) < 1.8


def measured(seconds, sizes=(1, 2, 4)):
    from benchmarks.learner import Flops
    from benchmarks.scaling import KINDS, Measured

    works = [(n, Flops(n**2, 0, 0), n) for n in sizes]
    return [Measured(n, {kind: [s] for kind in KINDS}, *work) for s, (n, *work) in zip(seconds, works, strict=True)]


def test_what_is_demanded_is_linear_but_for_length():
    from benchmarks.scaling import fit

    points = measured([1.0, 4.0, 16.0])
    length, batch = fit("length", points), fit("batch", points)
    assert length["actor step"]["fitted"] == pytest.approx(2)
    assert length["actor step"]["demanded"] == pytest.approx(2) and batch["actor step"]["demanded"] == 1
    assert length["rollout"]["demanded"] == pytest.approx(1)


@pytest.mark.parametrize("growth, holds", [(2.0, True), (2.1, True), (2.3, False)])
def test_the_bar_of_an_exponent(growth, holds):
    from benchmarks.figures import bar
    from benchmarks.scaling import bound_of, fit

    fitted = fit("batch", measured([1.0, growth, growth**2]))["rollout"]
    assert bar("x", **bound_of(fitted))["holds"] is holds


def test_the_axes_cover_what_they_say():
    from benchmarks.scaling import axes

    points = axes(tiny=False)
    assert [p.size for p in points["length"]] == [64, 128, 256, 512, 1024]
    assert [p.size for p in points["batch"]] == [16, 32, 64, 128, 256]
    assert len(points["parameters"]) == 4
    assert any(p.shape.name == "S8" for p in points["parameters"])
    assert {p.shape.hidden_size // p.shape.num_heads for p in points["parameters"]} == {48}
