"""What the scripted engine adds to the protocol."""

from __future__ import annotations

from pellucid.rollout import FakeEngine
from pellucid.rollout.fake import Response
from pellucid.types import Prompt, SamplingParams

PROMPTS = [Prompt(4, [1, 2], ""), Prompt(9, [3], "")]


def test_answers_in_order_and_around_again():
    engine = FakeEngine([[10], [11, 12], [13]])
    samples = engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, samples_per_prompt=2))
    assert [s.response_ids for s in samples] == [[10], [11, 12], [13], [10]]


def test_logprobs_are_the_script_s_and_cut_with_the_response():
    engine = FakeEngine([Response([10, 11, 12], [-0.1, -0.2, -0.3])])
    sample = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8, stop_token_ids=(11,)))[0]
    assert sample.response_ids == [10, 11]
    assert sample.rollout_logprobs == [0.0, 0.0, -0.1, -0.2]
    assert sample.stop_reason == "stop"


def test_calls_and_loads_are_recorded():
    engine = FakeEngine(lambda prompt, index: [prompt.id, index])
    params = SamplingParams(max_new_tokens=2)
    samples = engine.generate(PROMPTS, params)
    engine.load_weights("somewhere", 3)
    assert [s.response_ids for s in samples] == [[4, 0], [9, 0]]
    assert engine.calls == [(PROMPTS, params)]
    assert engine.loads == [("somewhere", 3)]
