"""Qwen2.5-Instruct and GPT-2 in miniature, as they lie on the Hub: architecture, tokenizer, chat template, generation
config. A few kilobytes of random weights each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SPARE_ROWS = 7
"""Embedding rows beyond the tokenizer's vocabulary: Qwen's model has 151,936, its tokenizer 151,665."""

# Written after the behaviour of Qwen2.5's template: a default system message, ChatML turns each closed by <|im_end|> and a
# newline, tool calls and tool results in XML tags inside the assistant's and the user's turns.
CHAT_TEMPLATE = """\
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set system = messages[0].content if messages[0].role == 'system' else default %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def save_qwen(folder: Path, texts: Iterable[str]) -> Path:
    """A Qwen2.5-Instruct of two layers, with a byte-level BPE tokenizer learnt from texts."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocab, merges = _learn_bpe(texts, 400)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        unk_token=None,
        extra_special_tokens=[IM_START, IM_END],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    stop = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    config = Qwen2Config(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=stop[1],
        eos_token_id=stop[0],
    )
    model = _seeded(Qwen2ForCausalLM, config)
    model.generation_config = GenerationConfig(
        bos_token_id=stop[1],
        pad_token_id=stop[1],
        eos_token_id=stop,
        do_sample=True,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
    )
    model.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, texts: Iterable[str]) -> Path:
    """A GPT-2 of two layers: one special token that is BOS and EOS, no pad token, no chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    vocab, merges = _learn_bpe(texts, 400)
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    _seeded(GPT2LMHeadModel, config).save_pretrained(folder)
    return folder


def save_sentiment_classifier(folder: Path, words: Iterable[str]) -> Path:
    """A DistilBERT with the labels NEGATIVE and POSITIVE, whose head is not called score."""
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    folder.mkdir(parents=True, exist_ok=True)
    names = ["input_ids", "attention_mask"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, model_input_names=names)
    tokenizer.save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=len(vocab),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    _seeded(DistilBertForSequenceClassification, config).save_pretrained(folder)
    return folder


def _seeded(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def _learn_bpe(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary, <|endoftext|> last as on the Hub, and merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    return vocab | {END_OF_TEXT: len(vocab)}, [tuple(pair) for pair in model["merges"]]
