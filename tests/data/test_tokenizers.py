"""Loading, pad and EOS, stop ids, and a tokenizer trained from texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pellucid.data import (
    ensure_pad,
    load_tokenizer,
    prompts_from,
    stop_token_ids,
    supervised_examples,
    train_bpe,
)
from pellucid.errors import DataError


def test_trained_bpe_encodes_anything_and_back(plain: Any) -> None:
    assert (plain.eos_token, plain.pad_token, len(plain)) == ("<|end|>", "<|pad|>", 300)
    for text in ("The soup was cold.", "  é 漢 \n\t\x00 !", ""):
        assert plain.decode(plain(text)["input_ids"]) == text


def test_trained_bpe_is_saved_and_loaded_by_auto_tokenizer(plain: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (plain.eos_token_id, plain.pad_token_id)
    text = "We are sorry.<|end|> é"
    assert loaded(text)["input_ids"] == plain(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_trained_chat_tokenizer_has_exact_masks(tmp_path: Path) -> None:
    train_bpe(["We are sorry."], 270, chat=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "We are sorry."}] * 2
    (example,), _ = supervised_examples([{"messages": messages}], tokenizer, 200)
    text = tokenizer.decode(example.input_ids)
    assert text == "<|user|>Hi<|assistant|>We are sorry.<|end|>" * 2
    learnt = [i for i, m in zip(example.input_ids, example.loss_mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "We are sorry.<|end|>" * 2
    assert len(tokenizer("<|user|><|assistant|>")["input_ids"]) == 2


def test_training_needs_room_and_texts() -> None:
    with pytest.raises(DataError, match="vocab_size is 200; 256 bytes and 2 control tokens"):
        train_bpe(["a"], 200)
    with pytest.raises(DataError, match="no text"):
        train_bpe(["", ""], 300)


def test_pad_becomes_eos_only_where_it_is_missing(plain: Any) -> None:
    assert ensure_pad(plain) == plain.convert_tokens_to_ids("<|pad|>")
    plain.pad_token = None
    assert ensure_pad(plain) == plain.eos_token_id == plain.pad_token_id


def test_no_eos_is_an_error(plain: Any) -> None:
    plain.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        ensure_pad(plain)


def test_stop_ids_are_all_of_them_once_and_sorted(plain: Any, chatml: Any) -> None:
    end_of_turn = chatml.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(chatml) == (chatml.eos_token_id, end_of_turn)
    plain.chat_template = None
    eos = plain.eos_token_id
    assert stop_token_ids(plain) == (eos,)
    assert stop_token_ids(plain, 7) == (eos, 7)
    assert stop_token_ids(plain, [9, 7, 9, eos]) == (eos, 7, 9)


def test_a_missing_or_broken_tokenizer_is_one_clear_line(plain: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"no such folder; did you mean .*model\?"):
        load_tokenizer(str(tmp_path / "modle"))
    with pytest.raises(DataError, match="is a file, a folder is needed"):
        load_tokenizer(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="could not be loaded"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "model" / "tokenizer.json").write_text("{broken")
    with pytest.raises(DataError, match="could not be loaded") as caught:
        load_tokenizer(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.data.tokenizers.hub_reachable", lambda: False)
    with pytest.raises(DataError, match="not in the Hub's cache, and the Hub cannot be reached"):
        load_tokenizer("nobody/has-this-model")


def test_a_chat_template_comes_from_a_file(plain: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    tokenizer = load_tokenizer(tmp_path, chat_template=template)
    prompts, _ = prompts_from([{"prompt": [{"role": "user", "content": "Hi"}]}], tokenizer, 50)
    assert tokenizer.decode(prompts[0].input_ids) == "Hi!"
    with pytest.raises(DataError, match=r"chat_template .*no such file; did you mean .*chat\.jinja"):
        load_tokenizer(tmp_path, chat_template=tmp_path / "chat.jinj")
