"""Data: sources -> rows -> tokens -> batches of items, and the built-in corpus."""

from pellucid.data.corpus import corpus_rows
from pellucid.data.formats import Format, describe, detect_format
from pellucid.data.gold import gold_score
from pellucid.data.loader import Loader
from pellucid.data.reshape import as_chat, with_prompts, with_system
from pellucid.data.sources import Rows, read_rows
from pellucid.data.tokenize import (
    PreferenceExample,
    SupervisedExample,
    preference_examples,
    prompts_from,
    supervised_examples,
)
from pellucid.data.tokenizers import ensure_pad, load_tokenizer, locate, stop_token_ids, token_bytes, train_bpe

__all__ = [
    "Format",
    "Loader",
    "PreferenceExample",
    "Rows",
    "SupervisedExample",
    "as_chat",
    "corpus_rows",
    "describe",
    "detect_format",
    "ensure_pad",
    "gold_score",
    "load_tokenizer",
    "locate",
    "preference_examples",
    "prompts_from",
    "read_rows",
    "stop_token_ids",
    "supervised_examples",
    "token_bytes",
    "train_bpe",
    "with_prompts",
    "with_system",
]
