"""Decode steps as graphs: what is recorded and when, and that samples stay what they were.

Without a GPU, `Tape` stands in for CUDA graphs. It records the operators of a step and runs them again over the same tensors,
and no Python with them: what a step takes from Python, or from memory that has moved, is as stale as it would be in a graph.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_gpt2, tiny_llama_gqa, tiny_mistral, tiny_qwen2, tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pellucid.errors import ConfigError, IntegrityError
from pellucid.models import Packed, Serving
from pellucid.rollout import EmbeddedEngine, embedded, embedded_checks, embedded_graphs
from pellucid.rollout.embedded_cache import SlotCache
from pellucid.rollout.embedded_graphs import CudaRecorder, GraphedModel, rounded
from pellucid.rollout.embedded_llama import LlamaModel
from pellucid.rollout.embedded_models import TransformersModel, measure_layers
from pellucid.types import SamplingParams

FAMILY = ("llama", "llama_gqa", "qwen2", "qwen3", "mistral")
WAYS = [(name, LlamaModel) for name in FAMILY] + [(name, TransformersModel) for name in ARCHITECTURES]
EITHER = pytest.mark.parametrize("path", [LlamaModel, TransformersModel])
ROOM = 1 << 30
GREEDY = SamplingParams(max_new_tokens=3, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=14, temperature=0.9, stop_token_ids=(3, 5, 8, 13), samples_per_prompt=3, seed=1)
WAITS = ("aten::nonzero", "aten::masked_select", "aten::lift_fresh")
"""Operators that wait for the device or take numbers from the host, besides those that return numbers."""


class Tape(TorchDispatchMode):
    """A Recorder."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        masks = "index" in func.name() and any(getattr(x, "dtype", None) == torch.bool for x in tree_leaves(args[1]))
        if masks or func.name() in WAITS or not all(isinstance(x, torch.Tensor) for x in tree_leaves(out)):
            raise RuntimeError(f"{func.name()} is not permitted when a stream is capturing")
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        self.calls = calls = []
        with self:
            step()

        def again() -> None:
            for func, args, kwargs, out in calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if not old.is_set_to(new):
                        old.copy_(new)

        return again


def engine_over(path, model, precision="float32", num_slots=5, recorder=None, keep=ROOM) -> EmbeddedEngine:
    """Without a recorder, without graphs."""
    engine = EmbeddedEngine(model, num_slots=num_slots, precision=precision)
    with embedded.serving(model):
        served = path(model, precision)
        engine._served = served if recorder is None else GraphedModel(served, recorder, keep)
        engine._layers = measure_layers(model, served.dtype)
    return engine


@pytest.fixture(autouse=True)
def short_columns(monkeypatch):
    """Tests' sequences have some twenty tokens."""
    monkeypatch.setattr(embedded_graphs, "COLUMNS", 8)


def check_same(found, expected, atol=1e-5):
    assert [sample.input_ids for sample in found] == [sample.input_ids for sample in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.rollout_logprobs), torch.tensor(other.rollout_logprobs), atol=atol, rtol=0
        )


def change(model) -> None:
    """A step of training."""
    model.train()
    model(torch.arange(12)[None] % VOCAB_SIZE).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.zero_grad()


# ---------------------------------------------------------------- the same samples


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_samples_are_those_of_eager_steps(ragged_prompts, name, path):
    prompts, make = ragged_prompts(12), ARCHITECTURES[name]
    expected = engine_over(path, make()).generate(prompts, SAMPLED)
    engine = engine_over(path, make(), recorder=Tape)
    found = engine.generate(prompts, SAMPLED)
    check_same(found, expected)
    assert engine._served.failure is None
    assert engine._served.captures > 3
    assert len({len(sample.response_ids) for sample in found}) > 3


@EITHER
@pytest.mark.parametrize("num_slots", [1, 3, 11, 64])
def test_any_number_of_slots(ragged_prompts, path, num_slots):
    prompts, params = ragged_prompts(40), replace(SAMPLED, samples_per_prompt=1)
    expected = engine_over(path, tiny_qwen2(), num_slots=num_slots).generate(prompts, params)
    engine = engine_over(path, tiny_qwen2(), num_slots=num_slots, recorder=Tape)
    check_same(engine.generate(prompts, params), expected)
    assert engine.graphs == f"{engine._served.captures} captured"


def test_bfloat16(ragged_prompts):
    prompts = ragged_prompts(12)
    engines = [engine_over(LlamaModel, tiny_qwen2(), "bfloat16", recorder=recorder) for recorder in (None, Tape)]
    for eager, graphed in zip(*(engine.generate(prompts, GREEDY) for engine in engines), strict=True):
        gaps = torch.tensor(eager.rollout_logprobs) - torch.tensor(graphed.rollout_logprobs)
        assert gaps.abs().mean() < 0.05
    assert engines[1]._served.captures


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    "n, slots", [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (57, 64), (65, 80), (193, 200), (200, 200)]
)
def test_slots_are_rounded_up(monkeypatch, n, slots):
    monkeypatch.setattr(embedded_graphs, "COLUMNS", 128)
    cache = SlotCache([], 200, 2000, torch.device("cpu"))
    assert rounded(n, 1, cache) == (slots, 128)


@pytest.mark.parametrize(
    "length, columns",
    [(1, 128), (128, 128), (129, 256), (1024, 1024), (1025, 1280), (1281, 1536), (1900, 2000), (2000, 2000)],
)
def test_columns_are_rounded_up(monkeypatch, length, columns):
    monkeypatch.setattr(embedded_graphs, "COLUMNS", 128)
    assert rounded(1, length, SlotCache([], 200, 2000, torch.device("cpu"))) == (1, columns)


def test_graphs_are_few(llama, ragged_prompts):
    engine = engine_over(LlamaModel, llama, num_slots=12, recorder=Tape)
    for step in range(4):
        engine.generate(ragged_prompts(30), replace(SAMPLED, step=step))
    # 1, 2, 4, 8, 12 slots; 8, 16, 24 columns.
    assert engine._served.captures <= 5 * 3


@EITHER
def test_rows_that_are_added_write_to_their_first_column_alone(path):
    model = tiny_mistral()
    served = GraphedModel(path(model, "float32"), Tape, ROOM)
    with embedded.serving(model):
        cache = served.cache(measure_layers(model, torch.float32), 8, 16, model.device)
        served.refresh(cache.length)
        for layer in cache.layers:
            layer.keys.normal_()
        before = [layer.keys.clone() for layer in cache.layers]
        # The buffers have been used by more rows, further on, before.
        for n, positions in ((8, [15] * 8), (5, [3, 12, 7, 0, 9])):
            for layer, keys in zip(cache.layers, before, strict=True):
                layer.keys.copy_(keys)
            where = torch.tensor(positions)
            cache.aim.rows, cache.aim.positions = torch.arange(n), where
            layout = Serving(where, max(positions) + 1, True, Packed(()), cache.views(n, max(positions) + 1))
            logits = served.logits(torch.full((n,), 7), where, layout, cache)
        assert logits.shape == (5, VOCAB_SIZE) and logits.isfinite().all()
        for layer, keys in zip(cache.layers, before, strict=True):
            changed = (layer.keys != keys).any(dim=(1, 3)).nonzero().tolist()
            assert changed == [[0, 3], [1, 12], [2, 7], [3, 0], [4, 9], [5, 0], [6, 0], [7, 0]]
            assert layer.values.isfinite().all()


# ---------------------------------------------------------------- from rollout to rollout


@pytest.mark.parametrize(
    ("path", "precision"), [(LlamaModel, "float32"), (LlamaModel, "bfloat16"), (TransformersModel, "float32")]
)
@pytest.mark.parametrize("make", [tiny_llama_gqa, tiny_qwen2, tiny_qwen3])
def test_graphs_serve_the_next_rollout_with_its_weights(ragged_prompts, make, path, precision):
    model, prompts = make(), ragged_prompts(12)
    engine = engine_over(path, model, precision, recorder=Tape)
    before = engine.generate(prompts, SAMPLED)
    captures = engine._served.captures
    check_same(engine.generate(prompts, SAMPLED), before, atol=0)
    assert engine._served.captures == captures
    change(model)
    after = engine.generate(prompts, SAMPLED)
    assert [s.input_ids for s in after] != [s.input_ids for s in before]
    check_same(after, engine_over(path, copy.deepcopy(model), precision, recorder=Tape).generate(prompts, SAMPLED), 0)
    assert engine._served.failure is None


@EITHER
def test_weights_that_moved_are_recorded_anew(ragged_prompts, path):
    model, prompts = tiny_qwen2(), ragged_prompts(8)
    engine = engine_over(path, model, recorder=Tape)
    engine.generate(prompts, SAMPLED)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()
    expected = engine_over(path, copy.deepcopy(model)).generate(prompts, SAMPLED)
    check_same(engine.generate(prompts, SAMPLED), expected)


def test_weights_that_traded_places_are_not_written_over(ragged_prompts):
    """As when an average of the weights is put in for an evaluation."""
    model, other, prompts = tiny_qwen2(), tiny_qwen2(seed=1), ragged_prompts(8)
    for norm in [module for name, module in other.named_modules() if name.endswith("norm")]:
        norm.weight.data.mul_(1.5)
    expected = engine_over(LlamaModel, copy.deepcopy(other)).generate(prompts, SAMPLED)
    engine = engine_over(LlamaModel, model, recorder=Tape)
    engine.generate(prompts, SAMPLED)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    first, second = ([parameter.detach().clone() for parameter in each] for each in zip(*pairs, strict=True))
    for one, two in pairs:
        one.data, two.data = two.data, one.data
    check_same(engine.generate(prompts, SAMPLED), expected)
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), second, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(other.parameters(), first, strict=True))


@EITHER
def test_one_cache_for_rollouts_of_several_sizes(ragged_prompts, path):
    model = tiny_qwen2()
    engine, eager = engine_over(path, model, num_slots=9, recorder=Tape), engine_over(path, model, num_slots=9)
    many = (ragged_prompts(12), replace(SAMPLED, max_new_tokens=4))
    long = (ragged_prompts(2, longest=30), replace(SAMPLED, samples_per_prompt=1, max_new_tokens=30))
    sizes = []
    for prompts, params in (many, long, many, long, many):
        check_same(engine.generate(prompts, params), eager.generate(prompts, params))
        cache = engine._served._graphs.cache
        sizes.append((cache, cache.num_slots, cache.length, engine._served.captures))
    assert sizes[1][0] is not sizes[0][0]
    assert all(cache is sizes[1][0] for cache, *_ in sizes[2:])
    assert sizes[1][1] == 9 and sizes[1][2] >= 31
    assert sizes[3][3] == sizes[4][3]  # everything has been recorded by then


@EITHER
def test_what_diverged_weights_left_in_the_cache_is_gone(llama, ragged_prompts, path):
    prompts, engine = ragged_prompts(12), engine_over(path, llama, recorder=Tape)
    before = engine.generate(prompts, SAMPLED)
    weights = llama.model.layers[0].self_attn.v_proj.weight
    good = weights.detach().clone()
    with torch.no_grad():
        weights.fill_(torch.nan)
    with pytest.raises(IntegrityError, match="not finite"):
        engine.generate(prompts, SAMPLED)
    with torch.no_grad():
        weights.copy_(good)
    check_same(engine.generate(prompts, SAMPLED), before, atol=0)


@EITHER
def test_a_shorter_rollout_moves_nothing(llama, ragged_prompts, path):
    engine = engine_over(path, llama, recorder=Tape)
    for max_new_tokens in (14, 9, 13):
        engine.generate(ragged_prompts(6), replace(SAMPLED, max_new_tokens=max_new_tokens))
    assert engine._served.captures == len(engine._served._graphs.replays)


# ---------------------------------------------------------------- without graphs


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.max().item(),
        lambda x: 1.0 if (x > 0).any() else 2.0,
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.nonzero(),
    ],
)
def test_the_tape_refuses_what_a_graph_would(wait):
    with pytest.raises(RuntimeError, match="not permitted"), torch.inference_mode():
        Tape().capture(lambda: wait(torch.ones(3)))


class Failing(Tape):
    """After some captures, none."""

    left = 0

    def capture(self, step):
        if not Failing.left:
            step()
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        Failing.left -= 1
        return super().capture(step)


@EITHER
@pytest.mark.parametrize("succeed", [0, 2])
def test_a_capture_that_fails_is_said_once_and_changes_no_sample(ragged_prompts, caplog, path, succeed):
    prompts = ragged_prompts(12)
    expected = engine_over(path, tiny_mistral(), num_slots=40).generate(prompts, SAMPLED)
    Failing.left = succeed
    engine = engine_over(path, tiny_mistral(), num_slots=40, recorder=Failing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_same(engine.generate(prompts, SAMPLED), expected)
    (record,) = caplog.records
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert f"cannot be captured as a CUDA graph ({reason})" in record.getMessage()
    assert engine.graphs == f"{succeed} captured, none any more: {reason}"
    assert not hasattr(engine._served._inner, "_layers")  # released, as ever


def test_a_model_that_waits_for_the_device(ragged_prompts, caplog):
    model, prompts = tiny_gpt2(), ragged_prompts(6)
    expected = engine_over(TransformersModel, model).generate(prompts, SAMPLED)
    engine = engine_over(TransformersModel, model, recorder=Tape)
    model.transformer.ln_f.register_forward_hook(lambda module, args, output: output * (1 + 0 * output.max().item()))
    check_same(engine.generate(prompts, SAMPLED), expected)
    assert "aten::item is not permitted" in engine.graphs and len(caplog.records) == 1


def test_a_large_cache_is_not_kept(llama, ragged_prompts):
    prompts = ragged_prompts(8)
    engine = engine_over(LlamaModel, llama, recorder=Tape, keep=1000)
    check_same(engine.generate(prompts, SAMPLED), engine_over(LlamaModel, llama).generate(prompts, SAMPLED), atol=0)
    assert engine.graphs == "0 captured, none any more: the cache is too large to be kept"
    assert not hasattr(engine._served._inner, "_layers")


def test_a_cache_that_does_not_fit(llama, ragged_prompts, monkeypatch):
    engine = engine_over(LlamaModel, llama, recorder=Tape)
    for module in (embedded_checks, embedded_graphs):
        monkeypatch.setattr(module, "available_bytes", lambda device: 5000)
    with pytest.raises(ConfigError, match="Lower num_slots"):
        engine.generate(ragged_prompts(8), SAMPLED)


@pytest.mark.parametrize("make", [tiny_llama_gqa, tiny_gpt2])
def test_there_are_none_on_a_cpu(make):
    assert EmbeddedEngine(make(), num_slots=2).graphs is None


# ---------------------------------------------------------------- on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("make", [tiny_llama_gqa, tiny_qwen2, tiny_qwen3, tiny_mistral, tiny_gpt2])
def test_cuda_graphs(ragged_prompts, make):
    """Twice over the same graphs, with a step of training between."""
    model, prompts = make().cuda(), ragged_prompts(40)
    engine = EmbeddedEngine(model, num_slots=11)
    assert isinstance(engine._served, GraphedModel)
    captures = []
    for _ in range(2):
        eager = engine_over(type(engine._served._inner), copy.deepcopy(model), num_slots=11).generate(prompts, SAMPLED)
        check_same(engine.generate(prompts, SAMPLED), eager, atol=1e-4)
        captures.append(engine._served.captures)
        model.train()
        model(torch.arange(12, device="cuda")[None]).logits.square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert engine._served.failure is None and captures[0] > 3
    torch.rand(1, device="cuda")  # the random state is as it was


@pytest.mark.gpu
@on_a_gpu
def test_a_step_that_waits_cannot_be_recorded_and_leaves_cuda_intact():
    stream, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        CudaRecorder(x.device).capture(lambda: x.add_(x.sum().item()))
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.empty_cache()
    total = torch.zeros(4, device="cuda")
    replay = CudaRecorder(x.device).capture(lambda: total.add_(1))
    before = total.clone()
    replay()
    assert torch.equal(total, before + 1)
