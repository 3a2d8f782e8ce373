"""Rows -> token ids. Text becomes tokens once, here; from then on masks and lengths speak of ids only.

A prompt and what follows it are encoded so that the prompt's ids are a beginning of the whole: what
supervised training sees after a prompt is what the policy will have before it when it samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pellucid.data import chat
from pellucid.data.chat import Segment
from pellucid.data.formats import Format, detect_format, is_conversational, preference_parts
from pellucid.data.sources import Row, where
from pellucid.errors import DataError
from pellucid.types import Prompt

T = TypeVar("T")
TooLong = Literal["error", "skip", "truncate"]
PromptTooLong = Literal["error", "skip", "truncate_left"]
Counts = dict[str, int]
"""What became of the rows: "rows" read, "kept", "truncated" (of those kept), "skipped_too_long",
"skipped_empty" (nothing in them to learn) and "skipped_identical" (pairs whose two sides are the same). rows
= kept + the skipped."""


@dataclass(frozen=True)
class SupervisedExample:
    """input_ids, loss_mask: (T_i,). Column t of the mask says whether token t is learnt.

    Column 0 never is: nothing comes before it.
    """

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class PreferenceExample:
    """chosen_ids, rejected_ids: prompt, completion, EOS. prompt_tokens: how many of them are the prompt."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_tokens: int = 0


def prompts_from(
    rows: Sequence[Row], tokenizer: Any, max_prompt_tokens: int, too_long: PromptTooLong = "error"
) -> tuple[list[Prompt], Counts]:
    """Rows with a prompt -> prompts, and what became of the rows. Prompt.id is the row's index, from 0.

    Conversational prompts go through the chat template, ready for the assistant's reply. Other fields of the
    row land in Prompt.columns. too_long: "truncate_left" keeps the end of the prompt, and the BOS token where
    there is one.

    Raises DataError: a wrong row, a prompt of no tokens, one too long under "error", or none left.
    """
    plain = not is_conversational(rows[0], detect_format(rows, wanted=("prompt_only",)))
    counts = _start(rows, too_long, "truncate_left")
    texts = _each(rows, lambda row: row["prompt"] if plain else chat.render(tokenizer, row["prompt"], True))
    prompts = []
    for index, ids in enumerate(_encode(texts, tokenizer, plain)):
        if not ids:
            raise DataError(f"{where(rows, index)}: the prompt has no tokens")
        if len(ids) > max_prompt_tokens:
            if not _keep_too_long(rows, index, len(ids), max_prompt_tokens, too_long, "truncate_left", counts):
                continue
            ids = _keep_end(ids, max_prompt_tokens, tokenizer)
        columns = {name: value for name, value in rows[index].items() if name != "prompt"}
        prompts.append(Prompt(id=index, input_ids=ids, text=rows[index]["prompt"], columns=columns))
    return _kept(rows, prompts, counts)


def supervised_examples(
    rows: Sequence[Row], tokenizer: Any, max_tokens: int, too_long: TooLong = "error"
) -> tuple[list[SupervisedExample], Counts]:
    """Rows of text, messages, or prompt and completion -> examples, and what became of the rows.

    Learnt are: all tokens of a text; the completion after a prompt; the assistant's turns of a conversation.
    An EOS is appended and learnt, unless the chat template ends the turn with a control token of its own;
    turns after the assistant's last are left out. too_long: "truncate" cuts the end, EOS included, since the
    text goes on; an example of which nothing learnt remains is skipped.

    Raises DataError: a wrong row, an example too long under "error", or none left.
    """
    name = detect_format(rows, wanted=("prompt_completion", "language_modeling"))
    plain = not is_conversational(rows[0], name)
    counts, control = _start(rows, too_long, "truncate"), chat.control_ids(tokenizer)
    pieces = _each(rows, lambda row: _supervised_segments(row, name, plain, tokenizer))
    examples = []
    for index, parts in enumerate(_encode_all(pieces, tokenizer, plain)):
        parts[-1] = _closed(parts[-1], tokenizer, plain, control)
        ids, mask = _flat(parts), []
        for part, (_, trained) in zip(parts, pieces[index], strict=True):
            # Learnt up to the closing control token: blanks that a template writes after it are no action of
            # the model.
            learnt = 0 if not trained else len(part) if plain else len(chat.without_tail(tokenizer, part, control))
            mask += [t < learnt for t in range(len(part))]
        mask[0] = False
        if not any(mask):
            counts["skipped_empty"] += 1
            continue
        if len(ids) > max_tokens:
            learnt = any(mask[:max_tokens])
            policy = too_long if learnt or too_long == "error" else "skip"
            if not _keep_too_long(rows, index, len(ids), max_tokens, policy, "truncate", counts):
                continue
        examples.append(SupervisedExample(ids[:max_tokens], mask[:max_tokens]))
    return _kept(rows, examples, counts)


def preference_examples(
    rows: Sequence[Row], tokenizer: Any, max_tokens: int, too_long: TooLong = "error"
) -> tuple[list[PreferenceExample], Counts]:
    """Preference pairs -> token pairs, and what became of the rows. Both sides end with EOS (or end of turn).

    too_long: "truncate" drops the beginning of the prompt, for both sides alike, so that both endings stay;
    only a completion longer than max_tokens by itself loses its end. A pair whose two sides are the same
    tokens teaches nothing, and is skipped and counted.

    Raises DataError: a wrong row, a pair too long under "error", or none left.
    """
    plain = not is_conversational(rows[0], detect_format(rows, wanted=("preference",)))
    counts, control = _start(rows, too_long, "truncate"), chat.control_ids(tokenizer)
    sides = _each(rows, lambda row: _preference_segments(row, plain, tokenizer))
    encoded = iter(_encode_all([side for pair in sides for side in pair], tokenizer, plain))
    examples = []
    for index in range(len(rows)):
        prompt, *chosen = next(encoded)
        rejected = next(encoded)[1:]
        good, bad = (_closed(_flat(side), tokenizer, plain, control) for side in (chosen, rejected))
        if good == bad:
            counts["skipped_identical"] += 1
            continue
        longest = max(len(good), len(bad))
        if len(prompt) + longest > max_tokens:
            total = len(prompt) + longest
            if not _keep_too_long(rows, index, total, max_tokens, too_long, "truncate", counts):
                continue
            prompt = _keep_end(prompt, max(0, max_tokens - longest), tokenizer)
        ids = [(prompt + side)[:max_tokens] for side in (good, bad)]
        examples.append(PreferenceExample(*ids, prompt_tokens=len(prompt)))
    return _kept(rows, examples, counts)


# --- rows -> text pieces ------------------------------------------------------------------------------------


def _supervised_segments(row: Row, name: Format, plain: bool, tokenizer: Any) -> list[Segment]:
    if name == "prompt_completion":
        if plain:
            return [(row["prompt"], False), (row["completion"], True)]
        return chat.segments(tokenizer, row["prompt"] + row["completion"], first_trained=len(row["prompt"]))
    return [(row["text"], True)] if plain else chat.segments(tokenizer, row["messages"])


def _preference_segments(row: Row, plain: bool, tokenizer: Any) -> tuple[list[Segment], list[Segment]]:
    prompt, chosen, rejected = preference_parts(row)
    if plain:
        return [(prompt, False), (chosen, True)], [(prompt, False), (rejected, True)]
    good, bad = (chat.segments(tokenizer, prompt + side, first_trained=len(prompt)) for side in (chosen, rejected))
    if good[0] != bad[0]:
        raise DataError("chosen and rejected differ before the assistant's turn; a pair answers one prompt")
    return good, bad


def _each(rows: Sequence[Row], make: Callable[[Row], T]) -> list[T]:
    """make(row) of every row, with the row's place in front of what it complains about."""
    made = []
    for index, row in enumerate(rows):
        try:
            made.append(make(row))
        except DataError as error:
            raise DataError(f"{where(rows, index)}: {error}") from error
    return made


# --- text pieces -> ids -------------------------------------------------------------------------------------


def _encode_all(examples: Sequence[Sequence[Segment]], tokenizer: Any, special: bool) -> list[list[list[int]]]:
    """The ids of each piece of each example.

    Each beginning of an example is encoded as a whole, and a piece's ids are what it adds. Where a tokenizer
    merges characters over the border of two pieces there is no such difference; the piece is then encoded by
    itself, which is also how a sampler continues from a prompt's ids.
    """
    beginnings: list[str] = []
    for pieces in examples:
        text = ""
        for piece, _ in pieces:
            text += piece
            beginnings.append(text)
    encoded = iter(_encode(beginnings, tokenizer, special))
    result = []
    for pieces in examples:
        parts: list[list[int]] = []
        for piece, _ in pieces:
            whole, done = next(encoded), _flat(parts)
            fits = whole[: len(done)] == done
            parts.append(whole[len(done) :] if fits else _encode([piece], tokenizer, False)[0])
        result.append(parts)
    return result


def _encode(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if special and tokenizer("a")["input_ids"][-1] == eos:
        # Set to add EOS by itself. Here EOS is what ends a completion, so it is added there only.
        return [ids[:-1] for ids in encoded]
    return encoded


def _closed(ids: list[int], tokenizer: Any, plain: bool, control: frozenset[int]) -> list[int]:
    """With EOS at the end exactly once; a chat template's own closing control token counts as one."""
    if not plain:
        ids = chat.without_tail(tokenizer, ids, control)
    ends = {tokenizer.eos_token_id} if plain else control
    return ids if ids and ids[-1] in ends else [*ids, tokenizer.eos_token_id]


def _flat(parts: Sequence[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


# --- too long -----------------------------------------------------------------------------------------------


def _keep_too_long(
    rows: Sequence[Row], index: int, length: int, limit: int, policy: str, truncate: str, counts: Counts
) -> bool:
    """Apply the policy to a row that is too long: True if it is to be cut and kept."""
    if policy == "error":
        raise DataError(
            f"{where(rows, index)}: {length} tokens, the limit is {limit}. Raise the limit, or set too_long "
            f'to "skip" or "{truncate}".'
        )
    counts["skipped_too_long" if policy == "skip" else "truncated"] += 1
    return policy != "skip"


def _keep_end(ids: list[int], length: int, tokenizer: Any) -> list[int]:
    """The last `length` ids, of which the first stays BOS if it was."""
    if len(ids) <= length:
        return ids
    bos = ids[:1] if length > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[len(ids) - length + len(bos) :]


def _start(rows: Sequence[Row], too_long: str, truncate: str) -> Counts:
    """Counts of nothing yet, after a look at the policy: a wrong one must not wait for the first long row."""
    if too_long not in ("error", "skip", truncate):
        raise DataError(f'too_long is "{too_long}", must be "error", "skip" or "{truncate}"')
    names = ("kept", "truncated", "skipped_too_long", "skipped_empty", "skipped_identical")
    return {"rows": len(rows)} | dict.fromkeys(names, 0)


def _kept(rows: Sequence[Row], made: list[T], counts: Counts) -> tuple[list[T], Counts]:
    if not made:
        why = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n and "skipped" in name)
        raise DataError(f"{getattr(rows, 'source', 'data')}: none of {len(rows)} rows is left ({why})")
    return made, counts | {"kept": len(made)}
