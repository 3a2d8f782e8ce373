"""What every engine promises (rollout/engine.py), run against each one that needs no peer process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama_gqa

from pellucid.errors import ConfigError, DataError
from pellucid.rollout import EmbeddedEngine, FakeEngine, GenerateEngine, RolloutEngine
from pellucid.types import Prompt, SamplingParams, collate

STOP = (3, 5, 7, 11, 13)
PARAMS = SamplingParams(max_new_tokens=6, samples_per_prompt=3, stop_token_ids=STOP)
ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "embedded": lambda: EmbeddedEngine(tiny_llama_gqa(), num_slots=4),
    "embedded_gpt2": lambda: EmbeddedEngine(tiny_gpt2(), num_slots=64),
    "generate": lambda: GenerateEngine(tiny_llama_gqa(), batch_size=4),
    "fake": lambda: FakeEngine([[1, 2, 3, 4], [20, 21, 22, 23, 24, 25, 26], [5]]),
    "fake_function": lambda: FakeEngine(lambda prompt, index: [prompt.id + 20, index, 3]),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RolloutEngine:
    return ENGINES[request.param]()


def test_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_samples_are_ordered_by_prompt_then_index(engine, ragged_prompts):
    prompts = ragged_prompts(5)
    samples = engine.generate(prompts, PARAMS)
    assert [(s.group_id, s.sample_index) for s in samples] == [(p, g) for p in range(5) for g in range(3)]
    assert all(s.prompt is prompts[s.group_id] for s in samples)


def test_columns_describe_tokens(engine, ragged_prompts):
    for sample in engine.generate(ragged_prompts(5), PARAMS):
        before, total = len(sample.prompt.input_ids), len(sample.input_ids)
        assert sample.input_ids[:before] == sample.prompt.input_ids
        assert sample.action_mask == [False] * before + [True] * (total - before)
        assert len(sample.rollout_logprobs) == total
        assert sample.rollout_logprobs[:before] == [0.0] * before
        assert all(logprob <= 0 for logprob in sample.rollout_logprobs)
        assert all(0 <= token < VOCAB_SIZE for token in sample.input_ids)


def test_a_response_ends_at_the_first_stop_token_or_at_the_limit(engine, ragged_prompts):
    samples = engine.generate(ragged_prompts(12), PARAMS)
    for sample in samples:
        response = sample.response_ids
        assert 1 <= len(response) <= PARAMS.max_new_tokens
        assert not set(response[:-1]) & set(STOP)
        assert sample.stop_reason == ("stop" if response[-1] in STOP else "length")
    assert "stop" in {s.stop_reason for s in samples}


def test_samples_collate(engine, ragged_prompts):
    batch = collate(engine.generate(ragged_prompts(3), PARAMS), pad_id=STOP[0])
    assert len(batch) == 9
    assert (batch.ended.sum(1) == 1).all()


def test_the_same_call_gives_the_same_samples(engine, ragged_prompts):
    prompts = ragged_prompts(4)
    assert engine.generate(prompts, PARAMS) == engine.generate(prompts, PARAMS)


def test_versions_are_stamped(engine, ragged_prompts):
    assert engine.version == 0
    assert {s.policy_version for s in engine.generate(ragged_prompts(2), PARAMS)} == {0}
    engine.load_weights(None, 17)
    assert engine.version == 17
    assert {s.policy_version for s in engine.generate(ragged_prompts(2), PARAMS)} == {17}


def test_progress_rises_to_the_total(engine, ragged_prompts):
    seen: list[tuple[int, int]] = []
    engine.generate(ragged_prompts(5), PARAMS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (15, 15)
    assert seen == sorted(set(seen))


def test_no_prompts_no_samples(engine):
    assert engine.generate([], PARAMS) == []


def test_an_empty_prompt_is_named(engine):
    for asked in (engine.generate, engine.check):
        with pytest.raises(DataError, match="prompt 8 has no tokens"):
            asked([Prompt(7, [1], ""), Prompt(8, [], "")], PARAMS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("samples_per_prompt", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_k", -1)],
)
def test_params_out_of_range_are_named(engine, name, value):
    for asked in (engine.generate, engine.check):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            asked([Prompt(0, [1], "")], replace(PARAMS, **{name: value}))
