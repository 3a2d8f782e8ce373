"""Python functions as rewards: called as TRL calls them, and every way in which one can fail."""

from __future__ import annotations

import functools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_runs import sample, tokenizer

from pellucid.errors import ConfigError, RewardError
from pellucid.rewards import FunctionReward, load_function

WORDS = tokenizer()


def samples(n: int = 3, chat: bool = False):
    made = []
    for i in range(n):
        text = [{"role": "user", "content": f"question {i}"}] if chat else f"question {i}"
        response = WORDS(f"answer {i}")["input_ids"] + [WORDS.eos_token_id]
        made.append(sample([1, 2], response, group_id=i, text=text, columns={"gold": i, "topic": f"t{i}"}))
    return made


def score(function, given=None):
    return [s.value for s in FunctionReward(function, WORDS).score(samples() if given is None else given)]


def refused(function, match, given=None):
    with pytest.raises(RewardError, match=match) as caught:
        score(function, given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- how it is called


def test_prompts_and_completions_are_text_without_special_tokens():
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [1, 2.5, None]

    assert score(reward) == [1.0, 2.5, None]
    assert seen["prompts"] == ["question 0", "question 1", "question 2"]
    assert seen["completions"] == ["answer 0", "answer 1", "answer 2"]


def test_columns_go_to_the_parameters_of_their_name():
    def reward(completions, gold, prompts, completion_ids, unheard="default"):
        assert unheard == "default"
        assert [WORDS.decode(ids) for ids in completion_ids] == [f"{text}{WORDS.eos_token}" for text in completions]
        return [10 * value for value in gold]

    assert score(reward) == [0, 10, 20]


def test_kwargs_take_every_column():
    def reward(prompts, **columns):
        assert sorted(columns) == ["completion_ids", "completions", "gold", "topic"]
        return columns["gold"]

    assert score(reward) == [0, 1, 2]


def test_a_row_without_a_column_gives_none():
    given = [*samples(1), sample([1], [3], text="bare")]
    assert score(lambda prompts, completions, gold: [0.0 if g is None else 1.0 for g in gold], given) == [1, 0]


def test_conversations_are_message_lists():
    def reward(prompts, completions, **_):
        assert prompts[1] == [{"role": "user", "content": "question 1"}]
        assert completions[1] == [{"role": "assistant", "content": "answer 1"}]
        return [0, 0, 0]

    assert score(reward, samples(chat=True)) == [0, 0, 0]


def test_callables_that_are_not_plain_functions():
    class Reward:
        def __call__(self, prompts, completions):
            return [1.0] * len(prompts)

    def scaled(prompts, completions, factor):
        return [factor] * len(prompts)

    assert score(Reward()) == [1, 1, 1]
    assert score(functools.partial(scaled, factor=2.0)) == [2, 2, 2]
    assert FunctionReward(Reward(), WORDS).name == "Reward"


@pytest.mark.parametrize(
    "values",
    [(1.0, 2.0, 3.0), np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])],
    ids=["tuple", "floats", "ints", "tensor"],
)
def test_lists_arrays_and_tensors_are_all_right(values):
    assert score(lambda prompts, completions: values) == [1, 2, 3]


def test_scalars_of_other_libraries_are_numbers():
    values = [np.float32(0.5), torch.tensor(2.0), Fraction(1, 4)]
    scores = score(lambda prompts, completions: values)
    assert scores == [0.5, 2.0, 0.25] and {type(s) for s in scores} == {float}


def test_no_samples_no_call():
    assert FunctionReward(lambda prompts, completions: 1 / 0, WORDS).score([]) == []


def test_the_source_is_on_every_score():
    def brevity(prompts, completions):
        return [0, 1, None]

    assert {s.source for s in FunctionReward(brevity, WORDS).score(samples())} == {"brevity"}
    assert {s.source for s in FunctionReward(brevity, WORDS, "short").score(samples())} == {"short"}


# ---------------------------------------------------------------- what is wrong with it


def test_one_that_raises_names_the_function_and_the_sample():
    def fragile(prompts, completions, gold):
        return [1 / (g - 1) for g in gold]

    message = refused(fragile, "reward function fragile raised ZeroDivisionError: division by zero")
    assert message.endswith("on prompt 1, sample 0, completion 'answer 1'")


def test_one_that_raises_for_the_batch_only():
    def at_most_one(prompts, completions):
        if len(prompts) > 1:
            raise KeyError("several")
        return [0.0]

    refused(at_most_one, "reward function at_most_one raised KeyError: 'several' on a batch of 3 samples")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)], ids=repr)
def test_a_score_that_is_not_finite_names_the_sample(bad):
    def reward(prompts, completions):
        return [0.0, 1.0, bad]

    refused(reward, "reward function reward returned (nan|-?inf), on prompt 2, sample 0, completion 'answer 2'")


@pytest.mark.parametrize(
    "bad",
    ["0.5", True, np.True_, [1.0], {"score": 1.0}, 1 + 2j, np.array([1.0, 2.0]), torch.ones(2), object],
    ids=["text", "bool", "numpy bool", "list", "dict", "complex", "array", "tensor", "type"],
)
def test_a_score_of_a_wrong_type_names_the_sample(bad):
    refused(
        lambda prompts, completions: [0.0, bad, 1.0],
        "reward function <lambda> returned .*, not a number, on prompt 1, sample 0, completion 'answer 1'",
    )


@pytest.mark.parametrize("n", [0, 2, 4])
def test_a_wrong_length(n):
    refused(lambda prompts, completions: [1.0] * n, f"<lambda> returned {n} scores for 3 samples")


@pytest.mark.parametrize(
    "returned",
    [
        0.5, None, "abc", b"abc", True, {1.0, 2.0, 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}, iter([1, 2, 3]),
        np.array(0.5), np.float32(0.5), torch.tensor(0.5),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_anything_but_a_list(returned):
    refused(lambda prompts, completions: returned, r"<lambda> returned .*; it must return a list of 3 numbers")


def test_async_functions_are_refused_at_once():
    async def slow(prompts, completions):
        return [0.0]

    for function in (slow, functools.partial(slow)):
        with pytest.raises(RewardError, match=r"reward function \w+ is async; give a plain function"):
            FunctionReward(function, WORDS)


@pytest.mark.parametrize(
    "function", [lambda data_source, solution_str: 0.0, lambda queries, prompts, labels: 0, lambda: 0, max]
)
def test_an_unknown_signature_is_refused_at_once(function):
    with pytest.raises(RewardError, match=r"has an unknown signature; write f\(prompts, completions, \*\*columns\)"):
        FunctionReward(function, WORDS)


def test_a_column_that_the_data_does_not_have():
    refused(lambda prompts, completions, solution: [0.0] * 3, "missing 1 required .* argument: 'solution'")


# ---------------------------------------------------------------- finding it


def test_load_function_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(prompts, completions):\n    return [1.0] * len(prompts)\n")
    assert score(load_function(f"{tmp_path}/mine.py:reward")) == [1, 1, 1]


def test_a_file_of_a_known_name_does_not_take_its_place(tmp_path):
    import json

    (tmp_path / "json.py").write_text("def reward(prompts, completions): return []\n")
    load_function(f"{tmp_path}/json.py:reward")
    assert sys.modules["json"] is json


def test_load_function_from_a_module():
    assert load_function("math:sqrt") is math.sqrt
    assert load_function("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("content", "spec", "match"),
    [
        (None, "reward", "'reward' is not a function; write file.py:name or package.module:name"),
        (None, "{dir}/gone.py:f", r"gone\.py: no such file \(for the function 'f'\)"),
        (None, "no_such_module:f", "no_such_module: cannot be imported: ModuleNotFoundError"),
        (None, ":f", ": cannot be imported"),
        ("def g(): pass", "{dir}/mine.py:f", "mine.py has no function 'f'"),
        ("f = 3", "{dir}/mine.py:f", "mine.py has no function 'f'"),
        ("def f(:", "{dir}/mine.py:f", "mine.py: cannot be imported: SyntaxError"),
        ("raise RuntimeError('boom')", "{dir}/mine.py:f", "mine.py: cannot be imported: RuntimeError: boom"),
        (
            "open('/no/such/table')",
            "{dir}/mine.py:f",
            "mine.py: cannot be imported: FileNotFoundError: .*/no/such/table",
        ),
    ],
)
def test_load_function_says_what_is_missing(tmp_path, content, spec, match):
    if content is not None:
        (tmp_path / "mine.py").write_text(content + "\n")
    with pytest.raises(ConfigError, match=match) as caught:
        load_function(spec.format(dir=tmp_path))
    assert "\n" not in str(caught.value)
