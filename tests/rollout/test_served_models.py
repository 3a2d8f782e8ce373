"""The ways to run the policy: which is chosen for a model, that all give the same, and what happens without kernels."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from native_kernels import HAS_BFLOAT16, needs_bfloat16, needs_kernels
from tiny_models import (
    VOCAB_SIZE,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_gqa,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)
from transformers import AutoConfig, AutoModelForCausalLM

from pellucid.models import CausalLM, native
from pellucid.rollout import EmbeddedEngine, embedded
from pellucid.rollout.embedded_llama import LlamaModel
from pellucid.rollout.embedded_models import TransformersModel, measure_layers
from pellucid.rollout.embedded_native import NativeLlamaModel
from pellucid.types import Prompt, SamplingParams

FAMILY = {
    "llama": tiny_llama,
    "llama_gqa": tiny_llama_gqa,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
}
PATHS = [pytest.param(NativeLlamaModel, marks=needs_kernels), LlamaModel, TransformersModel]
EVERY_WAY = [
    pytest.param(NativeLlamaModel, "float32", marks=needs_kernels),
    pytest.param(NativeLlamaModel, "bfloat16", marks=needs_bfloat16),
    *[(path, precision) for path in (LlamaModel, TransformersModel) for precision in ("float32", "bfloat16")],
]
ROUNDED_BY_COMPANY = [(path, "bfloat16") for path in (LlamaModel, TransformersModel)]
"""PyTorch's sums run in an order that depends on the other rows, which in bfloat16 can change a token."""
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, stop_token_ids=(3, 5), seed=1)


def engine_over(path, model, precision="float32", num_slots=4) -> EmbeddedEngine:
    """An engine that runs the model in this way, whichever it would choose."""
    engine = EmbeddedEngine(model, num_slots=num_slots, precision=precision)
    with embedded.serving(model):
        engine._served = path(model, precision)
        engine._layers = measure_layers(model, engine._served.dtype)
    return engine


def full_logprobs(model, sample) -> torch.Tensor:
    """Of a sample's response, from a plain forward."""
    ids = torch.tensor([sample.input_ids])
    with torch.no_grad():
        every = model(ids).logits[0, :-1].float().log_softmax(-1)
    return every.gather(1, ids[0, 1:, None])[torch.tensor(sample.action_mask)[1:], 0]


def logprobs_of(sample) -> torch.Tensor:
    return torch.tensor(sample.rollout_logprobs)[torch.tensor(sample.action_mask)]


# ---------------------------------------------------------------- the paths agree


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_every_path_is_the_plain_forward(ragged_prompts, make, path):
    model, prompts = make(), ragged_prompts(12)
    for sample in engine_over(path, model).generate(prompts, GREEDY):
        ids = torch.tensor([sample.prompt.input_ids])
        plain = make().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert sample.input_ids == plain[0].tolist()
        torch.testing.assert_close(logprobs_of(sample), full_logprobs(make(), sample), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_long_prompts_beside_short_ones(ragged_prompts, path):
    """Prompts beyond 128 tokens, admitted together with short ones and while others decode."""
    model = tiny_qwen3(max_position_embeddings=512)
    long = [
        Prompt(100 + i, [(7 * i + 3 * t) % VOCAB_SIZE for t in range(n)], "") for i, n in enumerate((128, 129, 200))
    ]
    short = ragged_prompts(5)
    prompts = [short[0], long[0], short[1], long[1], short[2], short[3], long[2], short[4]]
    for sample in engine_over(path, model, num_slots=3).generate(prompts, GREEDY):
        torch.testing.assert_close(logprobs_of(sample), full_logprobs(model, sample), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("path", "precision"), [way for way in EVERY_WAY if way not in ROUNDED_BY_COMPANY])
def test_a_sample_alone_or_among_64(ragged_prompts, path, precision):
    model, prompts = tiny_qwen2(), ragged_prompts(64)
    together = engine_over(path, model, precision, num_slots=64).generate(prompts, SAMPLED)
    engine = engine_over(path, model, precision, num_slots=1)
    for index in (0, 5, 17, 40, 63):
        (alone,) = engine.generate([prompts[index]], SAMPLED)
        assert alone.response_ids == together[index].response_ids
        if path is NativeLlamaModel:  # to the last bit
            assert alone.rollout_logprobs == together[index].rollout_logprobs


@pytest.mark.parametrize(("path", "precision"), EVERY_WAY)
@pytest.mark.parametrize("make", [tiny_llama_gqa, tiny_qwen2, tiny_qwen3])
def test_weights_changed_in_place_are_used_by_the_next_rollout(ragged_prompts, make, path, precision):
    model, prompts = make(), ragged_prompts(4)
    engine = engine_over(path, model, precision)
    before = engine.generate(prompts, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = engine.generate(prompts, GREEDY)
    assert [s.response_ids for s in after] != [s.response_ids for s in before]
    fresh = engine_over(path, copy.deepcopy(model), precision).generate(prompts, GREEDY)
    assert [(s.input_ids, s.rollout_logprobs) for s in after] == [(s.input_ids, s.rollout_logprobs) for s in fresh]


# ---------------------------------------------------------------- bfloat16


def in_bfloat16(model):
    """A copy with rounded weights. Buffers stay: rotary frequencies are float32 in transformers at any precision."""
    low = copy.deepcopy(model)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    return low


def assert_near_bfloat16(model, samples) -> None:
    """The samples' log-probs, at SAMPLED's temperature, are about those of a plain forward with rounded weights."""
    low, gaps = in_bfloat16(model), []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            every = (low(ids).logits[0, :-1].float() / 0.8).log_softmax(-1)
        expected = every.gather(1, ids[0, 1:, None])[torch.tensor(sample.action_mask)[1:], 0]
        gaps.append((logprobs_of(sample) - expected).abs())
    assert torch.cat(gaps).max() < 0.1
    assert torch.cat(gaps).mean() < 0.02


BFLOAT16 = [(LlamaModel, make) for make in FAMILY.values()]
BFLOAT16 += [pytest.param(NativeLlamaModel, make, marks=needs_bfloat16) for make in FAMILY.values()]
BFLOAT16 += [(TransformersModel, make) for make in (*FAMILY.values(), tiny_gpt2, tiny_gemma)]


@pytest.mark.parametrize(("path", "make"), BFLOAT16, ids=lambda value: value.__name__)
def test_bfloat16_is_the_bfloat16_forward(ragged_prompts, path, make):
    model = make(initializer_range=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = engine_over(path, model, "bfloat16").generate(ragged_prompts(8), SAMPLED)
    assert_near_bfloat16(model, samples)
    for name, value in model.state_dict().items():
        assert value.dtype is torch.float32 and value.equal(before[name])


@needs_bfloat16
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_mistral])
def test_bfloat16_of_long_prompts_beside_short_ones(ragged_prompts, make):
    """Long prompts go to PyTorch's attention, over the same cache."""
    model = make(max_position_embeddings=512, initializer_range=0.1)
    long = [
        Prompt(100 + i, [(7 * i + 3 * t) % VOCAB_SIZE for t in range(n)], "") for i, n in enumerate((128, 129, 200))
    ]
    short = ragged_prompts(5)
    prompts = [short[0], long[0], short[1], long[1], short[2], short[3], long[2], short[4]]
    assert_near_bfloat16(
        model, engine_over(NativeLlamaModel, model, "bfloat16", num_slots=3).generate(prompts, SAMPLED)
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_llama_gqa, tiny_qwen2, tiny_mistral])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@needs_kernels
def test_the_engines_log_probs_are_the_trainers(ragged_prompts, make, precision):
    """Both over kernels, but other ones, and the engine's keys and values are rounded once more than the trainer's."""
    hf = make(vocab_size=VOCAB_SIZE + 1, initializer_range=0.1)
    model, engine = CausalLM(hf, precision), EmbeddedEngine(hf, num_slots=4, precision=precision)
    assert type(engine._served) is NativeLlamaModel and model._fused is not None
    gaps = []
    for sample in engine.generate(ragged_prompts(8), SAMPLED):
        ids, mask = torch.tensor([sample.input_ids]), torch.tensor([sample.action_mask])
        with torch.no_grad():
            expected, _ = model.logprobs(ids, torch.ones_like(mask), mask, SAMPLED.temperature)
        gaps.append((logprobs_of(sample) - expected[mask]).abs())
    worst, mean = {"float32": (5e-6, 1e-6), "bfloat16": (0.03, 0.006)}[precision]
    assert torch.cat(gaps).max() < worst and torch.cat(gaps).mean() < mean


@pytest.mark.parametrize("path", [LlamaModel, TransformersModel])
def test_bfloat16_does_not_round_the_angles_of_positions(path):
    """A rounded frequency is wrong by up to 1 / 256: at position 1000 by radians."""
    model = tiny_llama(max_position_embeddings=2048)
    served = engine_over(path, model, "bfloat16")._served
    with embedded.serving(model):
        served.refresh(2000)
    cos, _ = model.model.rotary_emb(torch.zeros(1), torch.arange(2000)[None])
    if path is LlamaModel:
        found = served._cos[:, 0]
    else:
        found = served._model.model.rotary_emb(torch.zeros(1), torch.arange(2000)[None])[0][0, :, :4]
    torch.testing.assert_close(found.float(), cos[0, :, :4], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- which path


def best(precision: str = "float32") -> type:
    fast = HAS_BFLOAT16 if precision == "bfloat16" else native.load() is not None
    return NativeLlamaModel if fast else LlamaModel


def test_the_fastest_path_that_fits_is_taken(model):
    family = model.config.model_type in ("llama", "qwen2", "qwen3", "mistral")
    for precision in ("float32", "bfloat16"):
        engine = EmbeddedEngine(model, num_slots=1, precision=precision)
        assert type(engine._served) is (best(precision) if family else TransformersModel)


@needs_bfloat16
def test_odd_shapes_cannot_be_multiplied_in_bfloat16():
    model = tiny_llama(intermediate_size=63)
    assert NativeLlamaModel.serves(model, "float32") and not NativeLlamaModel.serves(model, "bfloat16")


def test_parts_that_look_like_llamas_but_compute_something_else(ragged_prompts):
    model = tiny_llama()
    theirs = type(model.model.layers[1].mlp)

    class Scaled(theirs):
        def forward(self, x):
            return 0.9 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Scaled
    engine = EmbeddedEngine(model, num_slots=4)
    assert type(engine._served) is TransformersModel
    for sample in engine.generate(ragged_prompts(4), GREEDY):
        torch.testing.assert_close(logprobs_of(sample), full_logprobs(model, sample), atol=1e-5, rtol=1e-5)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
LOOKALIKES = {
    "granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}),
    "olmo": ("olmo", {}),
    "helium": ("helium", {}),
    "ernie4_5": ("ernie4_5", {}),
    "smollm3": ("smollm3", {}),
    "ministral": ("ministral", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "ministral3": ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0}}),
    "llama, a window that it does not use": ("llama", {"sliding_window": 6}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen3, windows in some layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_relatives_of_llama_are_served_right(kind, fields):
    """By whichever path: what they do differently may show only behind a window, or far into the sequence."""
    shape = {**tiny_llama_gqa().config.to_dict(), "num_hidden_layers": 4, "head_dim": 8, **fields}
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    wanted += ("num_key_value_heads", "max_position_embeddings", "initializer_range", *fields)
    try:
        config = AutoConfig.for_model(kind, **{name: shape[name] for name in wanted}, pad_token_id=None)
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    (sample,) = EmbeddedEngine(model, num_slots=1).generate([Prompt(0, [1, 2, 3], "")], SamplingParams(40))
    torch.testing.assert_close(logprobs_of(sample), full_logprobs(model, sample), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- compiling the kernels


QUICK = ("-O0", "-fopenmp", "-std=gnu11", "-shared", "-fPIC")


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty folder for compiled kernels, and nothing remembered from before. They are compiled quickly here, not well."""
    monkeypatch.setattr(native, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PELLUCID_NATIVE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native._build.cache_clear()
    yield tmp_path / "cache" / "pellucid"
    native._build.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that stands for the C compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def no_compiler(patch, folder):
    patch.delenv("CC", raising=False)
    patch.setattr(native.shutil, "which", lambda name: None)


REASONS = {
    "switched off": (lambda patch, folder: patch.setenv("PELLUCID_NATIVE", "0"), "PELLUCID_NATIVE is 0"),
    "a compiler that is not there": (lambda patch, folder: patch.setenv("CC", "/no/such/cc"), "/no/such/cc"),
    "no compiler": (no_compiler, "there is no C compiler"),
    "a compiler that fails": (
        lambda patch, folder: patch.setenv("CC", compiler(folder, 'echo "product.c:1: error: no" >&2; exit 1')),
        "product.c:1: error: no",
    ),
}


@pytest.mark.parametrize(("deny", "words"), REASONS.values(), ids=REASONS)
def test_without_kernels_the_engine_gives_the_same(cache_home, monkeypatch, tmp_path, ragged_prompts, deny, words):
    model, prompts = tiny_qwen3(), ragged_prompts(6)
    deny(monkeypatch, tmp_path)
    assert native.load() is None
    assert words in native.why_not()
    engine = EmbeddedEngine(model, num_slots=4)
    assert type(engine._served) is LlamaModel
    plain = [sample.response_ids for sample in engine.generate(prompts, SAMPLED)]
    monkeypatch.undo()
    native._build.cache_clear()
    engine = EmbeddedEngine(model, num_slots=4)
    assert type(engine._served) is best()
    assert [sample.response_ids for sample in engine.generate(prompts, SAMPLED)] == plain


@needs_kernels
def test_kernels_are_compiled_once_and_kept(cache_home, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler(tmp_path, f'echo "$@" >> {tmp_path}/calls; exec cc "$@"'))
    assert native.load() is not None and native.why_not() is None
    calls = (tmp_path / "calls").read_text()
    (kept,) = cache_home.iterdir()
    assert kept.suffix == ".so"
    native._build.cache_clear()
    assert native.load() is not None
    assert (tmp_path / "calls").read_text() == calls


@needs_kernels
def test_a_cache_that_cannot_be_made(cache_home, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert native.load() is not None, native.why_not()


@needs_kernels
def test_a_cache_that_cannot_be_written(cache_home, monkeypatch):
    """The folder is there, but read-only: of another user, say."""
    cache_home.mkdir(parents=True, mode=0o500)
    write = tempfile.TemporaryFile

    def write_as_a_user(*args, dir=None, **kwargs):  # these tests may run as root, whom no mode stops
        if dir is not None and Path(dir) == cache_home:
            raise PermissionError(f"{dir} is read-only")
        return write(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", write_as_a_user)
    assert native.load() is not None, native.why_not()
    assert not list(cache_home.iterdir())


@needs_kernels
def test_processes_that_compile_at_once_leave_one_good_file(cache_home):
    load = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('native', sys.argv[1]); "
        "native = importlib.util.module_from_spec(spec); spec.loader.exec_module(native); "
        f"native.FLAGS = {QUICK}; "
        "assert native.load() is not None, native.why_not(); assert native.load().panel_columns() > 0"
    )
    command = [sys.executable, "-c", load, str(native.__file__)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    (kept,) = cache_home.iterdir()
    assert kept.suffix == ".so"
    assert native.load() is not None
