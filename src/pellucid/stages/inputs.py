"""From the [data] sections of a config to tokens: read, describe, tokenise, and say what was dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pellucid.config import DataConfig
from pellucid.data import (
    PreferenceExample,
    Rows,
    SupervisedExample,
    as_chat,
    describe,
    ensure_pad,
    load_tokenizer,
    preference_examples,
    prompts_from,
    read_rows,
    stop_token_ids,
    supervised_examples,
    with_prompts,
    with_system,
)
from pellucid.errors import DataError
from pellucid.models import CausalLM, ScalarModel
from pellucid.rollout.embedded_checks import check_prompts
from pellucid.types import Prompt, SamplingParams

Say = Callable[[str], None]


def load_run_tokenizer(path: str, data: DataConfig) -> Any:
    """The model's tokenizer, with a pad token; pad may be the EOS token, since no mask comes from comparing ids."""
    tokenizer = load_tokenizer(path, data.chat_template)
    ensure_pad(tokenizer)
    return tokenizer


def stop_ids(tokenizer: Any, model: CausalLM) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's EOS and those of the model's generation config."""
    generation = getattr(model.hf, "generation_config", None)
    return stop_token_ids(tokenizer, getattr(generation, "eos_token_id", None))


def load_rows(data: DataConfig, seed: int) -> Rows:
    rows = read_rows(data.source, data.split, data.columns, data.limit, seed)
    if data.as_chat:
        rows = as_chat(rows)
    return rows if data.system is None else with_system(rows, data.system)


def load_prompts(data: DataConfig, tokenizer: Any, seed: int, say: Say) -> list[Prompt]:
    """Prompts of a prompt-only data set, or of preference pairs: their own, or what both sides begin with."""
    rows = with_prompts(load_rows(data, seed))
    too_long = "truncate_left" if data.too_long == "truncate" else data.too_long
    prompts, counts = prompts_from(rows, tokenizer, data.max_tokens, too_long)
    say(describe(rows, tokenizer, wanted=("prompt_only",)))
    _say_counts(counts, say)
    return prompts


def load_supervised(data: DataConfig, tokenizer: Any, seed: int, say: Say) -> list[SupervisedExample]:
    rows = load_rows(data, seed)
    examples, counts = supervised_examples(rows, tokenizer, data.max_tokens, data.too_long)
    say(describe(rows, tokenizer, wanted=("prompt_completion", "language_modeling")))
    _say_counts(counts, say)
    return examples


def load_preferences(data: DataConfig, tokenizer: Any, seed: int, say: Say) -> list[PreferenceExample]:
    rows = load_rows(data, seed)
    examples, counts = preference_examples(rows, tokenizer, data.max_tokens, data.too_long)
    say(describe(rows, tokenizer, wanted=("preference",)))
    _say_counts(counts, say)
    return examples


def require_room(prompts: list[Prompt], params: SamplingParams, model: CausalLM, data: DataConfig) -> None:
    """Raises DataError, before anything is sampled, when a prompt and its response do not fit into the context."""
    try:
        check_prompts(prompts, params, model.hf, None)
    except DataError as error:
        raise DataError(
            f"{data.source}: {error} (max_tokens and too_long of its section drop or cut long ones.)"
        ) from None


def require_context(lengths: list[int], model: CausalLM | ScalarModel, data: DataConfig) -> None:
    """Raises DataError when the longest example, in tokens, is longer than the model's context."""
    context = getattr(model.hf.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and max(lengths, default=0) > context:
        raise DataError(
            f"{data.source}: the longest example has {max(lengths)} tokens, and the model's context "
            f"(max_position_embeddings) is {context}. Set max_tokens of its section to {context}, and too_long to skip or "
            "truncate."
        )


def _say_counts(counts: dict[str, int], say: Say) -> None:
    dropped = [f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items() if n and what not in ("rows", "kept")]
    if dropped:
        say(f"  of {counts['rows']:,} rows: {', '.join(dropped)}")
