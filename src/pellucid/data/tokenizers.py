"""Tokenizers: loading one, what training needs of it, and training a small one from texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pellucid.data.chat import end_of_turn_id
from pellucid.data.sources import hub_offline, hub_reachable, nearest
from pellucid.errors import DataError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The smallest prefix-stable template: a control token opens each turn, EOS closes the assistant's."""


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Any:
    """A Hugging Face tokenizer from a folder, or by Hub name from the cache or the network.

    chat_template: a Jinja file that replaces the tokenizer's own template. The network is asked whether it is
    there before the Hub's client, which would retry for most of a minute. Raises DataError.
    """
    from transformers import AutoTokenizer

    source, local = locate(path, "tokenizer", ("tokenizer_config.json", "tokenizer.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:  # a broken tokenizer.json raises bare Exception from Rust; the Hub has its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"tokenizer {path} could not be loaded: {reason}") from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template).expanduser())
    return tokenizer


def locate(path: str | Path, kind: str, files: Sequence[str]) -> tuple[str, bool]:
    """(what to load from, whether it is on this machine), of a folder or a Hub name.

    kind: what it is called in an error. files: any of them in the Hub's cache says that the name is cached. Raises
    DataError for what is not here and cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.exists() or _looks_local(path):
        if not folder.is_dir():
            what = "is a file, a folder is needed" if folder.exists() else f"no such folder{nearest(folder)}"
            raise DataError(f"{kind} {path}: {what}")
        return str(folder), True
    cached = _cached(str(path), files)
    if not cached and not hub_offline() and not hub_reachable():
        raise DataError(
            f"{kind} {path}: no such folder, it is not in the Hub's cache, and the Hub cannot be "
            "reached. Give the folder of a downloaded model."
        )
    return str(path), cached


def _looks_local(path: str | Path) -> bool:
    return isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _cached(name: str, files: Sequence[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError:  # no Hub name at all; loading it says so
        return False


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"chat_template {file}: no such file{nearest(file)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template {file}: not readable ({error})") from error


def ensure_pad(tokenizer: Any) -> int:
    """The pad id; a tokenizer without a pad token gets its EOS as one, in place.

    That is safe because masks come from lengths and from generation, never from comparing ids. Raises
    DataError without an EOS token: nothing could then end a completion.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no EOS token, so no completion could end. "
            'Set "eos_token" in its tokenizer_config.json.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer.eos_token_id
    return tokenizer.pad_token_id


def stop_token_ids(tokenizer: Any, generation_config_eos: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Ids that end a response, sorted, each once.

    They are the tokenizer's EOS, the generation config's (one or several), and the control token with which
    the chat template ends an assistant turn.
    """
    given = generation_config_eos
    ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    ids |= {given} if isinstance(given, int) else set(given or ())
    return tuple(sorted(i for i in ids if i is not None))


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for, by id, up to the highest; none for an id that is no token. One token may be a part
    of a character.

    Byte-level BPE writes bytes as letters of an alphabet of its own; SentencePiece writes a space as U+2581 and a byte as
    <0xE2>. Anything else is decoded token by token.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    names = [name or "" for name in tokenizer.convert_ids_to_tokens(list(range(size)))]
    added = {str(token) for token in tokenizer.get_added_vocab()}
    decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    if "ByteLevel" in decoder:
        alphabet = {letter: byte for byte, letter in _byte_alphabet().items()}
        return [
            name.encode() if name in added or not set(name) <= alphabet.keys() else bytes(alphabet[c] for c in name)
            for name in names
        ]
    if "ByteFallback" in decoder or any(name.startswith("\u2581") for name in names):
        return [
            bytes([int(name[3:5], 16)]) if _BYTE_TOKEN.fullmatch(name) else name.replace("\u2581", " ").encode()
            for name in names
        ]
    return [tokenizer.decode([i]).encode(errors="replace") for i in range(len(names))]


_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[int, str]:
    """byte -> letter of GPT-2's byte-level BPE: printable bytes stand for themselves, the rest follow from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def train_bpe(
    texts: Iterable[str], vocab_size: int, eos: str = "<|end|>", pad: str = "<|pad|>", chat: bool = False
) -> Any:
    """A byte-level BPE tokenizer learnt from texts. It encodes any text; the same texts give the same one.

    vocab_size: tokens, control tokens and the 256 bytes included; the result may be smaller when the texts
    offer no more merges, so size a model by len(tokenizer). chat: adds <|system|>, <|user|>, <|assistant|>
    and CHAT_TEMPLATE. save_pretrained writes a folder that AutoTokenizer loads. Raises DataError: a
    vocabulary too small, or no texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = ["<|system|>", "<|user|>", "<|assistant|>"] if chat else []
    control = [eos, *([pad] if pad != eos else []), *roles]
    if vocab_size < 256 + len(control):
        raise DataError(f"vocab_size is {vocab_size}; 256 bytes and {len(control)} control tokens are the least")
    texts = list(texts)
    if not any(texts):
        raise DataError("no text to train a tokenizer on")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=roles,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
