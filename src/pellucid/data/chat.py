"""Chat templates: messages -> text, cut at the exact borders of what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.errors import DataError

Message = dict[str, Any]
Segment = tuple[str, bool]
"""A piece of text, and whether the model is trained on it."""


def require_template(tokenizer: Any) -> None:
    """Raises DataError when conversational data meets a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the data set is conversational, but the tokenizer {tokenizer.name_or_path or ''} has no chat "
            "template. Give a Jinja file with `chat_template: PATH`, or use plain text fields."
        )


def render(tokenizer: Any, messages: Sequence[Message], reply_follows: bool) -> str:
    """Messages as text. reply_follows: end with the header of the assistant's turn, ready for its words.

    When the last message is the assistant's own, the reply goes on from it, as TRL does. Raises DataError
    with the template's own words.
    """
    require_template(tokenizer)
    unfinished = reply_follows and messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=reply_follows and not unfinished,
            continue_final_message=unfinished,
        )
    except Exception as error:  # Jinja's errors, and whatever a template's raise_exception makes
        raise DataError(f"the chat template refuses these messages: {error}") from error


def segments(tokenizer: Any, messages: Sequence[Message], first_trained: int = 0) -> list[Segment]:
    """A conversation as text pieces; the assistant's turns from message `first_trained` on are trained on.

    Each assistant turn starts where the template, asked for a reply, stops, and ends where the conversation
    up to it ends. That needs a template whose text for n messages begins its text for n+1: DataError when it
    does not.
    """
    pieces: list[Segment] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < first_trained:
            continue
        if turn == 0:
            raise DataError("the conversation starts with the assistant; a turn must come before its reply")
        before = render(tokenizer, messages[:turn], reply_follows=True)
        after = render(tokenizer, messages[: turn + 1], reply_follows=False)
        pieces += [(_rest(done, before, turn), False), (_rest(before, after, turn), True)]
        done = after
    if not pieces:
        raise DataError("the conversation has no assistant turn to train on")
    return pieces


def _rest(beginning: str, text: str, turn: int) -> str:
    if not text.startswith(beginning):
        raise DataError(
            f"the chat template is not prefix-stable: its text up to message {turn + 1} does not begin with "
            "its text before it, so the assistant's tokens cannot be told exactly. Use a template that "
            "renders turns one by one."
        )
    return text[len(beginning) :]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens: the named ones (eos, pad, ...) and those added as special, as <|im_end|> is."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The control token with which the chat template ends an assistant turn; None if it has no such token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        pieces = segments(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except DataError:
        return None
    control = control_ids(tokenizer)
    ids = without_tail(tokenizer, tokenizer(pieces[-1][0], add_special_tokens=False)["input_ids"], control)
    return ids[-1] if ids and ids[-1] in control else None


def without_tail(tokenizer: Any, ids: list[int], control: frozenset[int]) -> list[int]:
    """Without the blanks after a closing control token: ChatML has a newline there, no sampler does."""
    for end in range(len(ids), 0, -1):
        if ids[end - 1] in control:
            return ids[:end]
        if tokenizer.decode([ids[end - 1]]).strip():
            break
    return ids
