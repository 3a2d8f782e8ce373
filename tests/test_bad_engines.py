"""What a user can get wrong with the engine: a cache that does not fit, a model that it cannot serve, a precision that
there is not. Exit code 2, one or two lines, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_commands import CONTEXT, make_data, make_models, ppo_config, write_toml

from pellucid.cli import main
from pellucid.rollout import embedded, embedded_checks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_models(folder)
    return make_data(folder)


@pytest.fixture(scope="module")
def alibi(home: Path) -> Path:
    """A policy whose attention is biased by distance, which no engine of ours can lay out."""
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(home / "policy")
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4, seq_length=CONTEXT)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    BloomForCausalLM(config).save_pretrained(home / "alibi")
    tokenizer.save_pretrained(home / "alibi")
    return home / "alibi"


def train(home: Path, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """(exit code, what was said of it) of a tiny PPO run."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = ppo_config(home, folder / "run") | {"total_steps": 1}
    code = main(["ppo", str(write_toml(folder / "run.toml", config)), *flags])
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 2 and "Traceback" not in error
    assert (folder / "run" / "metrics.jsonl").exists() == (code == 0)
    return code, error


def test_a_cache_larger_than_memory_is_predicted(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedded_checks, "available_bytes", lambda device: 2048)
    monkeypatch.setattr(embedded, "SlotCache", None)  # it is said before one is made
    code, error = train(home, tmp_path, capsys)
    assert code == 2
    assert "the KV cache of " in error and " bytes (" in error and "Lower num_slots (to " in error
    assert "max_new_tokens" in error and "2.0 KiB are free on cpu" in error


def test_a_precision_that_there_is_not(home, tmp_path, capsys):
    code, error = train(home, tmp_path, capsys, "--run.precision", "float16")
    assert code == 2
    assert "run.precision" in error and "float16" in error and "bfloat16" in error


def test_a_model_that_cannot_be_served_takes_generate_if_asked(home, alibi, tmp_path, capsys):
    model = ("--models.actor", str(alibi))
    code, error = train(home, tmp_path / "1", capsys, *model)
    assert code == 2 and "BloomForCausalLM has an attention of its own" in error
    assert "set packing = false and rollout.engine = 'generate'" in error
    code, error = train(home, tmp_path / "2", capsys, *model, "--algo.packing", "false")
    assert code == 2 and "Set rollout.engine = 'generate' for this model" in error
    code, error = train(home, tmp_path / "3", capsys, *model, "--algo.packing", "false", "--rollout.engine", "generate")
    assert (code, error) == (0, "")
    first = json.loads((tmp_path / "3" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["rollout/parity_max"] < 1e-3
