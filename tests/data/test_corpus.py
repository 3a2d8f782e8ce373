"""The corpus is the same everywhere, its evaluation prompts are new, and gold cannot be cheated."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid.data
from pellucid.data import corpus_rows, detect_format, gold_score, read_rows, supervised_examples, train_bpe
from pellucid.data.gold import HIGHEST, LOWEST
from pellucid.errors import DataError

PARTS = {
    "sft": "prompt_completion",
    "preferences": "preference",
    "preferences_heldout": "preference",
    "prompts": "prompt_only",
    "prompts_heldout": "prompt_only",
}
PROMPT = "Anna: The soup was cold on Monday.\nReply:\n"
GOOD = (
    "Dear Anna, we are truly sorry that the soup was cold. It happened because the oven broke. "
    "We will give you a free meal today. We hope to see you again soon."
)
PLAIN = "Hello, we got your message. We will look into it. Goodbye."
MAKE = """
import json
import pellucid.data
from pellucid.data import corpus_rows, train_bpe
parts = ("sft", "preferences", "preferences_heldout", "prompts", "prompts_heldout")
rows = [corpus_rows(part, seed=5, count=60) for part in parts]
texts = [row["prompt"] + row["completion"] for row in corpus_rows("sft", seed=5, count=300)]
made = json.dumps(rows) + train_bpe(texts, 500).backend_tokenizer.to_str()
"""


def prompts(part: str, seed: int, count: int = 0) -> set[str]:
    return {row["prompt"] for row in corpus_rows(part, seed, count)}


@pytest.mark.parametrize(("part", "name"), PARTS.items())
def test_every_part_has_its_format_and_is_read_by_name(part: str, name: str) -> None:
    rows = read_rows(f"corpus:{part}", seed=1, limit=30)
    assert detect_format(rows) == name
    assert len(rows) == 30
    assert rows == corpus_rows(part, seed=1, count=60)[:30]
    assert rows != read_rows(f"corpus:{part}", seed=2, limit=30)


def test_corpus_and_tokenizer_are_the_same_bytes_in_another_process() -> None:
    here: dict[str, str] = {}
    exec(MAKE, here)
    source = str(Path(pellucid.data.__file__).parents[2])
    there = subprocess.run(
        [sys.executable, "-c", f"{MAKE}\nprint(made, end='')"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": source},
    )
    assert here["made"] == there.stdout
    assert len(here["made"]) > 50_000


def test_an_unknown_part_lists_the_parts() -> None:
    with pytest.raises(DataError, match=r"corpus:stf does not exist; there are corpus:sft, "):
        read_rows("corpus:stf")


def test_held_out_prompts_are_never_training_prompts() -> None:
    evaluated = prompts("prompts_heldout", 0) | prompts("preferences_heldout", 1, 100)
    trained = prompts("sft", 0) | prompts("prompts", 1) | prompts("preferences", 2, 300)
    assert len(evaluated) > 250
    assert not evaluated & trained
    assert len(prompts("prompts_heldout", 0)) == 200  # each of them once


def test_pairs_are_labelled_by_gold_with_the_noise_that_was_asked_for() -> None:
    def wrong(part: str, noise: float) -> float:
        rows = corpus_rows(part, 0, 400, label_noise=noise)
        gaps = [gold_score(r["prompt"], r["chosen"]) - gold_score(r["prompt"], r["rejected"]) for r in rows]
        assert min(map(abs, gaps)) >= 0.2
        return sum(gap < 0 for gap in gaps) / len(rows)

    assert wrong("preferences", 0.1) == pytest.approx(0.1, abs=0.04)
    assert wrong("preferences", 0.0) == 0
    assert wrong("preferences_heldout", 0.5) == 0


def test_there_is_headroom_and_replies_are_short() -> None:
    rows = corpus_rows("sft", 0, 1500)
    scores = sorted(gold_score(row["prompt"], row["completion"]) for row in rows)
    mean, spread = statistics.fmean(scores), statistics.stdev(scores)
    assert scores[int(0.9 * len(scores))] > mean + spread
    assert gold_score(PROMPT, GOOD) > mean + 2 * spread
    tokenizer = train_bpe([row["prompt"] + row["completion"] for row in rows], 1024)
    examples, _ = supervised_examples(rows, tokenizer, 128)
    lengths = sorted(sum(example.loss_mask) for example in examples)
    assert lengths[int(0.98 * len(lengths))] <= 48


# --- the gold preference --------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_gold_is_defined_and_bounded_on_any_text(prompt: str, completion: str) -> None:
    score = gold_score(prompt, completion)
    assert LOWEST <= score <= HIGHEST
    assert score == gold_score(prompt, completion)


WORDS = [*GOOD.lower().replace(".", " .").split(), "refund", "apology", "kind", "please"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_gold_is_bounded_on_salads_of_good_words(words: list[str]) -> None:
    assert LOWEST <= gold_score(PROMPT, " ".join(words)) <= HIGHEST


@pytest.mark.parametrize(
    "worse",
    [
        GOOD + " We hope to see you again soon.",  # a sentence said twice
        GOOD + " " + GOOD,
        GOOD.replace("truly sorry", "truly, truly sorry"),  # a kind word said twice
        GOOD.replace("sorry", "sorry sorry sorry"),
        GOOD.replace("today.", "today. We will cook a fresh one for you today."),  # a second promise
        GOOD.replace("give you a free meal", "repair it for free"),  # another business's promise
        GOOD.replace("the oven broke", "the road was closed"),
        GOOD.replace("soup", "bread"),  # not what Anna wrote about
        GOOD.replace("Anna", "Ben"),
        GOOD.replace(" We hope to see you again soon.", ""),
        GOOD.replace("It happened because the oven broke.", "It was probably your own fault."),
        GOOD.removesuffix("."),
        " ".join(sorted(GOOD.split())),
        GOOD + " And so on" * 30 + ".",
        "Thank you for your kind words. We are delighted. " + GOOD.split(". ", 1)[1],  # thanks for a complaint
    ],
)
def test_every_cheap_trick_lowers_gold(worse: str) -> None:
    assert gold_score(PROMPT, worse) < gold_score(PROMPT, GOOD) - 0.3


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "@@## zxq \x00",
        "The of soup run blue quickly seven happy.",
        "Dear Anna, we are truly sorry that the soup was cold. " * 4,
        "sorry truly delighted thank you dear refund free because today. " * 2,
        "sorry " * 100,
    ],
)
def test_garbage_is_below_a_plain_reply(garbage: str) -> None:
    assert gold_score(PROMPT, garbage) < gold_score(PROMPT, PLAIN) - 0.5 < gold_score(PROMPT, GOOD) - 5


def test_the_tone_must_fit_the_message() -> None:
    praise = PROMPT.replace("was cold", "was fresh")
    thanks = "Dear Anna, thank you for your kind words about the soup."
    apology = "Dear Anna, I am sorry about the soup."
    assert gold_score(praise, thanks) > gold_score(praise, apology)
    assert gold_score(PROMPT, apology) > gold_score(PROMPT, thanks)


def test_the_corpus_itself_is_no_word_salad() -> None:
    from pellucid.data.gold import _neighbours, _sentences, _words

    for row in corpus_rows("sft", 7, 500):
        for sentence in _sentences(_words(row["completion"])):
            assert all(pair in _neighbours() for pair in zip(["", *sentence], sentence, strict=False)), sentence
