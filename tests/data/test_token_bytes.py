"""The bytes of each token: joined, they are the text that was encoded, whatever family the tokenizer is of."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pellucid.data import token_bytes, train_bpe

HARD_TEXTS = [
    "The soup was cold.",
    "two\nlines\r\n\tand a tab  and  spaces ",
    "naïve Ærø 漢字かな 한국어 Ελληνικά",
    "👩🏽‍🍳 🦦🎉 \U0001f1e9\U0001f1f0 e\u0301",
    "\x00\x7f\u00ad\u2028\ufeff",
    "".join(map(chr, range(0x20, 0x180))),
]


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fast(backend: Tokenizer, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)


# ---------------------------------------------------------------- byte-level BPE


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return train_bpe(["The soup was cold. 漢字 👩🏽‍🍳 naïve"] * 3, 300)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_byte_level_pieces_join_to_the_text(byte_level, text):
    pieces = token_bytes(byte_level)
    assert b"".join(pieces[i] for i in encoded(byte_level, text)) == text.encode()


def test_byte_level_has_each_byte_once_and_parts_of_characters(byte_level):
    pieces = token_bytes(byte_level)
    assert len(pieces) == len(byte_level) > 258
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([i]) for i in range(256)]
    halves = [pieces[i] for i in encoded(byte_level, "🦦")]
    assert len(halves) > 1 and b"".join(halves) == "🦦".encode()
    with pytest.raises(UnicodeDecodeError):
        halves[0].decode()


def test_control_and_added_tokens_stand_for_their_own_text():
    """Added tokens are written as they are; letters of the byte alphabet in them (Ġ, é) are letters there."""
    tokenizer = train_bpe(["The soup was cold."], 270, chat=True)
    tokenizer.add_tokens(["Ġé", AddedToken("<|漢|>", special=True)])
    pieces = token_bytes(tokenizer)
    for text in ("<|end|>", "<|pad|>", "<|user|>", "Ġé", "<|漢|>"):
        assert pieces[tokenizer.convert_tokens_to_ids(text)] == text.encode()
    mixed = "<|user|>é Ġé🦦<|end|>"
    assert b"".join(pieces[i] for i in encoded(tokenizer, mixed)) == mixed.encode()


@pytest.mark.parametrize("family", [decoders.ByteLevel(), decoders.ByteFallback()], ids=["byte level", "byte fallback"])
def test_ids_that_no_token_has_do_not_break_it(family):
    """A vocabulary with holes, as some published ones have: what there is keeps its place."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 5, "d": 6}, merges=[]))
    backend.decoder = family
    pieces = token_bytes(fast(backend))
    assert [pieces[i] for i in (0, 1, 5, 6)] == [b"a", b"b", b"c", b"d"]


# ---------------------------------------------------------------- SentencePiece's conventions


def byte_fallback(kind: str) -> Any:
    """Spaces are U+2581, and what the vocabulary lacks is spelled in tokens <0x00> to <0xFF>."""
    control, spelled = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    words = [*control, *spelled, "\u2581", *"soup", "\u2581s", "漢"]
    if kind == "unigram":
        model = models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True)
    else:
        vocab = {word: i for i, word in enumerate(words)}
        model = models.BPE(vocab=vocab, merges=[("\u2581", "s")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "bpe":  # Llama's way; the other is T5's
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(steps)
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["soup soup", "soup\n 漢字 🦦", "Ærø  ou", " s\u00e9"])
def test_byte_fallback_pieces_join_to_the_text(kind, text):
    tokenizer = byte_fallback(kind)
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    assert pieces[tokenizer.convert_tokens_to_ids("<0xE2>")] == b"\xe2"
    assert pieces[tokenizer.convert_tokens_to_ids("</s>")] == b"</s>"
    ids = encoded(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    assert b"".join(pieces[i] for i in ids) == text.encode()


def test_metaspace_without_byte_fallback():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581soup", -1.0), ("\u2581was", -1.0)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = fast(backend, unk_token="<unk>")
    assert token_bytes(tokenizer) == [b"<unk>", b" soup", b" was"]
    assert encoded(tokenizer, "soup was") == [1, 2]


# ---------------------------------------------------------------- anything else


def test_word_pieces_are_decoded_one_by_one():
    vocab = {word: i for i, word in enumerate(["[UNK]", "[SEP]", "soup", "##s", "漢", "naïve"])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = fast(backend, unk_token="[UNK]", sep_token="[SEP]")
    pieces = token_bytes(tokenizer)
    assert pieces == [tokenizer.decode([i]).encode() for i in range(len(vocab))]
    assert [pieces[i].decode() for i in (0, 1, 2, 4, 5)] == ["[UNK]", "[SEP]", "soup", "漢", "naïve"]
