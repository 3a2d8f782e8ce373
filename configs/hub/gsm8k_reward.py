"""Whether a GSM8K answer is right: 1 or 0. The reward of gsm8k-grpo.toml and gsm8k-ppo.toml.

The data set's `answer` ends in `#### N`. Of a completion that number counts which follows its last `####`, else the one
in its last \\boxed{}, else its last number. Commas, currency, percent signs and LaTeX around a number do not matter;
1/2 and \\frac{1}{2} are 0.5.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

LONGEST = 100
"""Characters of a number; a longer one is babble, and Python refuses to read digits by the thousand."""

# A sign counts unless something to subtract from stands before it: "20-25" is two positive numbers. Digits that belong to
# a word are no number: "m2", "CO2".
NUMBER = re.compile(
    r"(?:(?<![\w)\]}%$])(?P<sign>[-+]))?[$€£]?(?:(?<=[$€£])(?P<inner_sign>[-+]))?(?<![A-Za-z0-9])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?P<decimals>(?<!\.)\.[0-9]+)?(?:/(?P<over>[0-9]+))?",
    re.ASCII,
)


def correct(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
    """1.0 where the completion's final number is the answer's. Plain text, or messages as a chat model gives them."""
    return [float(_is_right(_text(said), wanted)) for said, wanted in zip(completions, answer, strict=True)]


def _is_right(completion: str, answer: str) -> bool:
    wanted = final_number(answer) if "####" in answer else None
    if wanted is None:
        raise ValueError(f"the data set's answer has no `#### number` at its end: {answer[-60:]!r}")
    return final_number(completion) == wanted


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly; None if there is none."""
    text = _without_latex(text)
    _, marked, after = text.rpartition("####")
    if marked and (found := _numbers(after)):
        return found[0]
    for box in reversed(re.findall(r"\\boxed\{([^{}]*)\}", text)):
        if found := _numbers(box):
            return found[-1]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    found = [_value(match) for match in NUMBER.finditer(text) if match["whole"] or match["decimals"]]
    return [value for value in found if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST or (match["over"] and not int(match["over"])):
        return None
    value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ""))
    value /= int(match["over"] or 1)
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _without_latex(text: str) -> str:
    """Plain signs for the ways in which models write numbers: minus signs, escapes, thin spaces, fractions. Exponents go."""
    text = text.replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"\\[!,;:]", "", text)  # 1\,000 and 1{,}000
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\^(?:\{[^{}]*\}|[-0-9]+)", "", text)  # the 2 of m^2 is no answer
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
