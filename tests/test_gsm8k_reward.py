"""The reward of the GSM8K configs: what counts as the final number of an answer."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import sample, tokenizer

from pellucid.errors import RewardError
from pellucid.rewards import FunctionReward, load_function

ROOT = Path(__file__).parents[1]
REWARD = ROOT / "configs/hub/gsm8k_reward.py"
final_number = load_function(f"{REWARD}:final_number")
correct = load_function(f"{REWARD}:correct")

CASES: list[tuple[str, str | None]] = [
    ("The answer is 18.", "18"),
    ("#### 18", "18"),
    ("####18", "18"),
    ("She has 16 - 3 - 4 = 9 eggs, 9 * 2 = $18.", "18"),
    ("It costs $1,080.", "1080"),
    ("109,200,000 people", "109200000"),
    ("1, 2, 3", "3"),
    ("1,2,3", "3"),
    ("12 and 1234,567", "567"),
    ("about $18.00 in total.", "18"),
    ("3.5 hours", "7/2"),
    (".5", "1/2"),
    ("18.", "18"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("-7", "-7"),
    ("\u22127", "-7"),  # a minus sign
    ("x = -7", "-7"),
    ("x=-7", "-7"),
    ("(-7)", "-7"),
    ("-$7", "-7"),
    ("$-7", "-7"),
    ("+7", "7"),
    ("20-25", "25"),
    ("20 - 25", "25"),
    ("$5-$8", "8"),
    ("(3)-5", "5"),
    ("- 8 apples", "8"),
    ("US$5", "5"),
    ("\u20ac5", "5"),
    ("5\u20ac", "5"),
    (r"\boxed{42}", "42"),
    (r"\boxed{42} because 6 * 7", "42"),
    (r"\boxed{x = 42} dollars", "42"),
    (r"first \boxed{1}, then \boxed{2}.", "2"),
    (r"\boxed{\text{no}} so 3", "3"),
    (r"\boxed{\$1{,}000}", "1000"),
    (r"$1\,000$", "1000"),
    (r"\(\frac{1}{2}\)", "1/2"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    ("1/2", "1/2"),
    ("4/0", None),
    ("#### 18 dollars (2 for each of 9)", "18"),
    ("#### 1\n#### 2", "2"),
    ("17 #### none", "17"),
    ("**18**", "18"),
    ("_18_", "18"),
    ("<<9*2=18>>18", "18"),
    ("5 m^2", "5"),
    (r"5 m^{2}", "5"),
    ("5 m2", "5"),
    ("5 kg of CO2", "5"),
    ("5 m\u00b2", "5"),
    ("\u7b54\u6848\u662f-18\u3002", "-18"),  # Chinese, which the model may answer in
    ("the 7th", "7"),
    ("wait... 18", "18"),
    ("wait...18", "18"),
    ("007", "7"),
    ("-0", "0"),
    ("", None),
    ("no number", None),
    ("####", None),
    ("$", None),
    ("-", None),
    ("1" * 5000, None),
    ("18, then " + "1" * 5000, "18"),
]


@pytest.mark.parametrize(("text", "number"), CASES)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


def test_plain_and_conversational_completions() -> None:
    answer = "9 * 2 = <<9*2=18>>18\n#### 18"
    said = ["18.0", [{"role": "assistant", "content": "It is $18."}], "17", ""]
    assert correct(["q"] * 4, said, [answer] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", ["18", "no number ####", ""])
def test_an_answer_of_another_data_set_is_an_error(answer: str) -> None:
    words = tokenizer()
    reward = FunctionReward(correct, words)
    broken = sample(words("q")["input_ids"], words("18")["input_ids"], columns={"answer": answer})
    with pytest.raises(RewardError, match="no `#### number` at its end"):
        reward.score([broken])


def test_every_answer_of_the_data_set_is_its_own(shared_gsm8k: list[dict[str, Any]]) -> None:
    answers = [row["answer"] for row in shared_gsm8k]
    assert correct(answers, answers, answers) == [1.0] * len(answers)
    bare = [answer.rpartition("####")[2] for answer in answers]
    assert correct(bare, bare, answers) == [1.0] * len(answers)
    above = [answer.rpartition("####")[0] for answer in answers]  # the working ends in the result, nearly always
    assert sum(correct(above, above, answers)) > 0.9 * len(answers)


@pytest.fixture(scope="module")
def shared_gsm8k() -> list[dict[str, Any]]:
    path = ROOT.parent / "shared/data/gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
