"""Ids and masks, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from pellucid.data import (
    PreferenceExample,
    SupervisedExample,
    preference_examples,
    prompts_from,
    stop_token_ids,
    supervised_examples,
)
from pellucid.errors import DataError

USER = [{"role": "user", "content": "The soup was cold."}]
REPLY = [{"role": "assistant", "content": "We are sorry."}]
AGAIN = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "It is hot."}]


def learnt(example: SupervisedExample, tokenizer: Any) -> str:
    return tokenizer.decode([i for i, m in zip(example.input_ids, example.loss_mask, strict=True) if m])


def one(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> SupervisedExample:
    examples, _ = supervised_examples(rows, tokenizer, **({"max_tokens": 100} | options))
    return examples[0]


def add_bos_and_eos(tokenizer: Any) -> Any:
    """As a tokenizer with add_bos_token and add_eos_token: every text is encoded as <|bos|> text <|end|>."""
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    ids = [("<|bos|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=ids)
    return tokenizer


# --- supervised -----------------------------------------------------------------------------------


def test_loss_is_on_the_completion_and_one_eos(plain: Any) -> None:
    example = one([{"prompt": "The soup was cold.\n", "completion": "We are sorry."}], plain)
    assert plain.decode(example.input_ids) == "The soup was cold.\nWe are sorry.<|end|>"
    assert learnt(example, plain) == "We are sorry.<|end|>"
    already = one([{"prompt": "The soup was cold.\n", "completion": "We are sorry.<|end|>"}], plain)
    assert already == example


def test_a_prompt_has_the_same_ids_alone_and_before_a_completion(plain: Any) -> None:
    # "so" + "up" merge across the border when encoded at once; the sampler would see the prompt's own ids.
    rows = [{"prompt": "The so", "completion": "up was cold."}]
    prompt = prompts_from(rows, plain, 50)[0][0].input_ids
    example = one(rows, plain)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.loss_mask == [t >= len(prompt) for t in range(len(example.input_ids))]


def test_language_modeling_learns_every_token_but_the_first(plain: Any) -> None:
    example = one([{"text": "We are sorry."}], plain)
    assert plain.decode(example.input_ids) == "We are sorry.<|end|>"
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_bos_comes_first_and_eos_once_whatever_the_tokenizer_adds(plain: Any) -> None:
    tokenizer = add_bos_and_eos(plain)
    example = one([{"prompt": "The soup", "completion": " was cold."}], tokenizer)
    assert tokenizer.decode(example.input_ids) == "<|bos|>The soup was cold.<|end|>"
    assert learnt(example, tokenizer) == " was cold.<|end|>"
    whole = prompts_from([{"prompt": "The soup was cold."}], tokenizer, 50)[0][0].input_ids
    cut = prompts_from([{"prompt": "The soup was cold."}], tokenizer, 3, "truncate_left")[0][0].input_ids
    assert cut == [tokenizer.bos_token_id, *whole[-2:]]


def test_pad_equal_to_eos_changes_no_mask(plain: Any) -> None:
    rows = [{"prompt": "The <|end|> soup", "completion": " was <|end|> cold."}]
    before = one(rows, plain)
    plain.pad_token = plain.eos_token
    assert one(rows, plain) == before
    assert learnt(before, plain) == " was <|end|> cold.<|end|>"


def test_only_assistant_turns_are_learnt_up_to_their_end_of_turn(chatml: Any) -> None:
    example = one([{"messages": USER + REPLY + AGAIN}], chatml)
    assert learnt(example, chatml) == "We are sorry.<|im_end|>It is hot.<|im_end|>"
    text = chatml.apply_chat_template(USER + REPLY + AGAIN, tokenize=False)
    assert chatml.decode(example.input_ids) == text.rstrip("\n")  # ends where a sampler would have stopped
    assert example.input_ids == chatml(text.rstrip("\n"))["input_ids"]


def test_conversational_prompt_and_completion(chatml: Any) -> None:
    example = one([{"prompt": USER + REPLY + AGAIN[:1], "completion": AGAIN[1:]}], chatml)
    assert learnt(example, chatml) == "It is hot.<|im_end|>"
    prompt = prompts_from([{"prompt": USER + REPLY + AGAIN[:1]}], chatml, 100)[0][0]
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert chatml.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")


def test_a_reply_that_merges_with_the_template_keeps_its_exact_mask(chatml: Any) -> None:
    reply = [{"role": "assistant", "content": "\nIt is hot."}]
    example = one([{"messages": USER + reply}], chatml)
    assert learnt(example, chatml) == "\nIt is hot.<|im_end|>"


def test_a_template_without_end_of_turn_gets_eos(plain: Any) -> None:
    plain.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert learnt(one([{"messages": USER + REPLY}], plain), plain) == " We are sorry.\n<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(chatml: Any) -> None:
    chatml.chat_template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 1: the chat template is not prefix-stable.*message 2"):
        supervised_examples([{"messages": USER + REPLY}], chatml, 100)


@pytest.mark.parametrize(
    ("messages", "message"),
    [(USER, "no assistant turn"), (REPLY + AGAIN, "starts with the assistant")],
)
def test_conversations_that_teach_nothing_exact(chatml: Any, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"row 2: the conversation .*{message}|row 2: .*{message}"):
        supervised_examples([{"messages": USER + REPLY}, {"messages": messages}], chatml, 100)


def test_no_chat_template_says_how_to_give_one(plain: Any) -> None:
    for make, row in ((supervised_examples, {"messages": USER + REPLY}), (prompts_from, {"prompt": USER})):
        with pytest.raises(DataError, match=r"has no chat template.*`chat_template: PATH`"):
            make([row], plain, 100)


def test_what_a_template_refuses_is_passed_on_with_the_row(chatml: Any) -> None:
    chatml.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 1: the chat template refuses these messages: roles must alternate"):
        prompts_from([{"prompt": USER}], chatml, 100)


def test_too_long_examples(plain: Any) -> None:
    rows = [
        {"prompt": "The soup", "completion": " was cold."},
        {"prompt": "The soup was cold. " * 3, "completion": "We"},
    ]
    with pytest.raises(DataError, match=r'row 2: \d+ tokens, the limit is 8.*"skip" or "truncate"'):
        supervised_examples(rows, plain, 8)
    examples, counts = supervised_examples(rows, plain, 8, "skip")
    assert (len(examples), counts["kept"], counts["skipped_too_long"]) == (1, 1, 1)
    long = len(examples[0].input_ids)
    # Cut at the end, without EOS; the second example has then nothing left to learn, and is skipped.
    examples, counts = supervised_examples(rows, plain, long - 1, "truncate")
    assert (counts["truncated"], counts["skipped_too_long"]) == (1, 1)
    assert learnt(examples[0], plain) == " was cold."
    with pytest.raises(DataError, match=r"none of 1 rows is left \(1 skipped too long\)"):
        supervised_examples(rows[1:], plain, 8, "skip")
    with pytest.raises(DataError, match='too_long is "cut"'):
        supervised_examples(rows, plain, 8, "cut")


def test_empty_texts_are_counted(plain: Any) -> None:
    _, counts = supervised_examples([{"text": ""}, {"text": "We"}], plain, 8)
    assert (counts["rows"], counts["kept"], counts["skipped_empty"]) == (2, 1, 1)


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_keep_their_row_number_text_and_columns(plain: Any) -> None:
    rows = [{"prompt": "The soup was cold."}, {"prompt": "We", "answer": "4"}]
    prompts, counts = prompts_from(rows, plain, 3, "skip")
    assert [(p.id, p.text, p.columns) for p in prompts] == [(1, "We", {"answer": "4"})]
    assert counts == {
        "rows": 2,
        "kept": 1,
        "truncated": 0,
        "skipped_too_long": 1,
        "skipped_empty": 0,
        "skipped_identical": 0,
    }


def test_prompts_too_long(plain: Any) -> None:
    rows = [{"prompt": "The soup was cold."}]
    with pytest.raises(DataError, match=r'row 1: \d+ tokens, the limit is 2.*"skip" or "truncate_left"'):
        prompts_from(rows, plain, 2)
    prompts, counts = prompts_from(rows, plain, 2, "truncate_left")
    assert prompts[0].input_ids == plain("The soup was cold.")["input_ids"][-2:]
    assert counts["truncated"] == 1
    with pytest.raises(DataError, match="row 1: the prompt has no tokens"):
        prompts_from([{"prompt": ""}], plain, 2)


def test_a_prompt_that_ends_with_the_assistant_is_continued(chatml: Any) -> None:
    prompts, _ = prompts_from([{"prompt": USER + REPLY}], chatml, 100)
    assert chatml.decode(prompts[0].input_ids).endswith("<|im_start|>assistant\nWe are sorry.")


# --- preference -----------------------------------------------------------------------------------


def test_pairs_end_with_eos_and_share_the_prompt(plain: Any) -> None:
    rows = [{"prompt": "The soup", "chosen": " was cold.", "rejected": " was"}]
    (pair,), _ = preference_examples(rows, plain, 100)
    assert plain.decode(pair.chosen_ids) == "The soup was cold.<|end|>"
    assert plain.decode(pair.rejected_ids) == "The soup was<|end|>"
    assert plain.decode(pair.chosen_ids[: pair.prompt_tokens]) == "The soup"
    implicit, _ = preference_examples([{"chosen": "The soup was", "rejected": "The soup it"}], plain, 100)
    assert plain.decode(implicit[0].rejected_ids[implicit[0].prompt_tokens :]) == " it<|end|>"


def test_conversational_pairs_end_with_the_end_of_turn(chatml: Any) -> None:
    other = [{"role": "assistant", "content": "It."}]
    explicit, _ = preference_examples([{"prompt": USER, "chosen": REPLY, "rejected": other}], chatml, 100)
    implicit, _ = preference_examples([{"chosen": USER + REPLY, "rejected": USER + other}], chatml, 100)
    assert explicit == implicit
    assert chatml.decode(explicit[0].rejected_ids).endswith("<|im_start|>assistant\nIt.<|im_end|>")
    # What a reward model reads last in training is what a sampled response ends with.
    assert explicit[0].chosen_ids[-1] in stop_token_ids(chatml)


def test_long_pairs_lose_the_beginning_of_their_prompt(plain: Any) -> None:
    rows = [{"prompt": "We are sorry, The soup", "chosen": " was cold.", "rejected": " was"}]
    (pair,), _ = preference_examples(rows, plain, 100)
    limit = len(pair.chosen_ids) - pair.prompt_tokens + 2
    (cut,), counts = preference_examples(rows, plain, limit, "truncate")
    assert counts["truncated"] == 1
    assert cut == PreferenceExample(
        pair.chosen_ids[-limit:], pair.rejected_ids[pair.prompt_tokens - 2 :], prompt_tokens=2
    )
    (tiny,), _ = preference_examples(rows, plain, 2, "truncate")
    assert (len(tiny.chosen_ids), tiny.prompt_tokens) == (2, 0)


def test_sides_that_answer_different_prompts_are_refused(chatml: Any) -> None:
    row = {"chosen": USER + REPLY, "rejected": AGAIN}
    with pytest.raises(DataError, match="row 1: chosen and rejected differ before the assistant's turn"):
        preference_examples([row], chatml, 100)


@pytest.mark.parametrize("prompt", [{"prompt": "a"}, {}])
def test_identical_sides_are_skipped_and_counted(plain: Any, prompt: dict[str, str]) -> None:
    rows = [prompt | {"chosen": "b", "rejected": "b"}, prompt | {"chosen": "b", "rejected": "c"}]
    pairs, counts = preference_examples(rows, plain, 9)
    assert (len(pairs), counts["kept"], counts["skipped_identical"]) == (1, 1, 1)
