"""What a user can get wrong with data, models and tokenizers: exit code 2, one or two lines that say what and where.

Every case goes through the command line, in this process. Rewards, disks and checkpoints are in test_bad_runs.py; keys
of the config in test_config.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_commands import (
    CONTEXT,
    PAIRS,
    PROMPTS,
    SUPERVISED,
    make_data,
    make_models,
    ppo_config,
    rm_config,
    sft_config,
    write_jsonl,
    write_toml,
)

from pellucid.cli import main

CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {"sft": sft_config, "rm": rm_config, "ppo": ppo_config}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_models(folder)
    return make_data(folder)


class Runner:
    """Runs a stage's tiny config with some keys changed: `run("ppo", {"data.source": ...})`."""

    def __init__(self, home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.folder, self.capsys = home, folder, capsys
        self.run_dir = folder / "run"

    def __call__(self, stage: str, changes: dict[str, Any], *flags: str) -> tuple[int, str, str]:
        config = CONFIGS[stage](self.home, self.run_dir)
        for key, value in changes.items():
            *path, last = key.split(".")
            node = config
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        code = main([stage, str(write_toml(self.folder / "run.toml", config)), *flags])
        out, err = self.capsys.readouterr()
        return code, out, err

    def refuses(self, stage: str, changes: dict[str, Any], *flags: str) -> str:
        """The error, after checking its form and that no step was taken."""
        code, _, err = self(stage, changes, *flags)
        assert code == 2, err
        assert err.startswith("pellucid: error: ") and len(err.splitlines()) <= 2 and "Traceback" not in err
        assert not (self.run_dir / "metrics.jsonl").exists(), "it was found only after training began"
        return err

    def succeeds(self, stage: str, changes: dict[str, Any]) -> str:
        code, out, err = self(stage, changes)
        assert (code, err) == (0, "")
        return out


@pytest.fixture
def run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(home, tmp_path, capsys)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("stage", CONFIGS)
@pytest.mark.parametrize("key", ["data.source", "eval_data.source"])
def test_a_missing_data_file_is_named_with_the_nearest(run: Runner, home: Path, stage: str, key: str) -> None:
    error = run.refuses(stage, {key: f"{home}/promts.jsonl"})
    assert f"{home}/promts.jsonl: no such file; did you mean {home}/prompts.jsonl?" in error


def test_missing_ptx_data_is_named(run: Runner, home: Path) -> None:
    assert "no such file" in run.refuses("ppo", {"ptx_data.source": f"{home}/nothing.jsonl"})


def test_a_folder_and_an_unknown_kind_of_file_are_told(run: Runner, home: Path, tmp_path: Path) -> None:
    assert "is a folder, a file is needed" in run.refuses("sft", {"data.source": str(home)})
    (tmp_path / "rows.csv").write_text("a,b")
    assert "unknown kind of file" in run.refuses("sft", {"data.source": str(tmp_path / "rows.csv")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_data_file_that_may_not_be_read(run: Runner, home: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", SUPERVISED)
    path.chmod(0)
    assert "not readable" in run.refuses("sft", {"data.source": str(path)})


@pytest.mark.parametrize("stage", CONFIGS)
def test_an_empty_data_set_is_told(run: Runner, tmp_path: Path, stage: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [])
    assert f"{path}: the data set is empty" in run.refuses(stage, {"data.source": str(path)})


@pytest.mark.parametrize(
    ("stage", "rows", "lacks"),
    [("sft", SUPERVISED, "completion"), ("rm", PAIRS, "rejected"), ("ppo", PROMPTS, "prompt")],
)
def test_a_row_without_the_field_has_its_line(
    run: Runner, tmp_path: Path, stage: str, rows: list[Any], lacks: str
) -> None:
    broken = [*rows[:4], {name: value for name, value in rows[4].items() if name != lacks}, *rows[5:]]
    path = write_jsonl(tmp_path / "rows.jsonl", broken)
    assert f"{path}:5: no field '{lacks}'" in run.refuses(stage, {"data.source": str(path)})


def test_a_line_that_is_no_json_has_its_number(run: Runner, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", SUPERVISED[:3])
    path.write_text(path.read_text() + '{"prompt": \n')
    assert f"{path}:4: not JSON" in run.refuses("sft", {"data.source": str(path)})


def test_fewer_prompts_than_a_step_takes(run: Runner) -> None:
    assert "12 prompts are fewer than rollout.prompts_per_step 13" in run.refuses(
        "ppo", {"rollout.prompts_per_step": 13}
    )


# ---------------------------------------------------------------- too long

LONG_PROMPTS = [*PROMPTS, {"prompt": "The tea was good and " * 10, "mark": 99}]


def test_a_prompt_longer_than_the_limit_is_an_error_with_its_line(run: Runner, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", LONG_PROMPTS)
    error = run.refuses("ppo", {"data.source": str(path), "data.max_tokens": 20})
    assert f"{path}:13: " in error and "tokens, the limit is 20" in error and "too_long" in error


@pytest.mark.parametrize(("policy", "counted"), [("skip", "1 skipped too long"), ("truncate", "1 truncated")])
def test_a_longer_prompt_is_skipped_or_cut_by_config_and_counted(
    run: Runner, tmp_path: Path, policy: str, counted: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", LONG_PROMPTS)
    changes = {"data.source": str(path), "data.max_tokens": 20, "data.too_long": policy, "total_steps": 1}
    assert f"of 13 rows: {counted}" in run.succeeds("ppo", changes)


def test_when_every_row_is_skipped_it_is_an_error(run: Runner) -> None:
    error = run.refuses("ppo", {"data.max_tokens": 1, "data.too_long": "skip"})
    assert "none of 12 rows is left (12 skipped too long)" in error


@pytest.mark.parametrize("section", ["data", "eval_data"])
def test_a_prompt_and_response_longer_than_the_context_are_found_before_training(
    run: Runner, tmp_path: Path, section: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [LONG_PROMPTS[-1], *PROMPTS])
    error = run.refuses(
        "ppo", {f"{section}.source": str(path), f"{section}.max_tokens": 300, "rollout.max_new_tokens": 60}
    )
    assert f"{path}: prompt 0 has " in error and "with max_new_tokens=60 that makes" in error
    assert f"the model's context (max_position_embeddings) is {CONTEXT}" in error


@pytest.mark.parametrize(
    ("stage", "row"),
    [
        ("sft", {"prompt": "a", "completion": "tea " * 99}),
        ("rm", {"prompt": "a", "chosen": "tea " * 99, "rejected": "b"}),
    ],
)
@pytest.mark.parametrize("section", ["data", "eval_data"])
def test_an_example_longer_than_the_context_is_found_before_training(
    run: Runner, tmp_path: Path, stage: str, row: dict[str, str], section: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    error = run.refuses(stage, {f"{section}.source": str(path), f"{section}.max_tokens": 300})
    assert f"{path}: the longest example has " in error and f"is {CONTEXT}. Set max_tokens" in error


def test_ptx_examples_longer_than_the_context_are_found_before_training(run: Runner, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "tea " * 99}])
    assert "the longest example has" in run.refuses("ppo", {"ptx_data.source": str(path), "ptx_data.max_tokens": 300})


def test_what_the_shift_of_a_reward_model_needs_is_checked_before_training(run: Runner, home: Path) -> None:
    assert f"with max_new_tokens={CONTEXT} that makes" in run.refuses("rm", {"max_new_tokens": CONTEXT})
    assert "no such folder" in run.refuses("rm", {"reference": f"{home}/nothing"})
    assert "no such file" in run.refuses("rm", {"center_data.source": f"{home}/nothing.jsonl"})


# ---------------------------------------------------------------- models


@pytest.fixture
def broken(home: Path, tmp_path: Path) -> Path:
    """A copy of the policy, to break."""
    return Path(shutil.copytree(home / "policy", tmp_path / "broken"))


ROLES = ("actor", "reference", "reward", "critic")
MODEL_KEYS = [("sft", "model"), ("rm", "model"), *(("ppo", f"models.{role}") for role in ROLES)]


@pytest.mark.parametrize(("stage", "key"), MODEL_KEYS)
def test_a_missing_model_folder_is_named(run: Runner, home: Path, stage: str, key: str) -> None:
    error = run.refuses(stage, {key: f"{home}/polic"})
    assert f"{home}/polic: no such" in error


@pytest.mark.parametrize(("stage", "key"), [*MODEL_KEYS, ("rm", "reference")])
def test_what_could_be_a_hub_name_is_not_waited_for(
    run: Runner, monkeypatch: pytest.MonkeyPatch, stage: str, key: str
) -> None:
    """runs/reward_model is a typing error for a folder and a good name for a model of the Hub. Without a network the
    Hub's client would retry for 40 seconds, and talk about it."""
    from pellucid.data import tokenizers

    monkeypatch.setattr(tokenizers, "hub_reachable", lambda: False)
    assert "foo/bar: no such folder, it is not in the Hub's cache" in run.refuses(stage, {key: "foo/bar"})


@pytest.mark.parametrize(("stage", "key"), MODEL_KEYS)
def test_a_model_that_is_not_whole_is_named(run: Runner, broken: Path, stage: str, key: str) -> None:
    os.truncate(broken / "model.safetensors", 1000)
    assert f"{broken}: cannot load this model" in run.refuses(stage, {key: str(broken)})


def test_a_folder_without_a_model_is_told(run: Runner, broken: Path) -> None:
    (broken / "config.json").unlink()
    assert str(broken) in run.refuses("sft", {"model": str(broken)})


def test_a_config_that_is_no_json_is_told(run: Runner, broken: Path) -> None:
    (broken / "config.json").write_text("{")
    assert str(broken) in run.refuses("sft", {"model": str(broken)})


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(run: Runner, home: Path) -> None:
    assert "not a causal language model" in run.refuses("ppo", {"models.actor": f"{home}/reward"})
    assert "not a model with one scalar output named 'score'" in run.refuses("ppo", {"models.reward": f"{home}/policy"})


@pytest.mark.parametrize(("both", "found"), [(True, "both"), (False, "neither")])
def test_a_reward_is_given_once(run: Runner, home: Path, tmp_path: Path, both: bool, found: str) -> None:
    (tmp_path / "reward.py").write_text("def length(prompts, completions, **_): return [len(c) for c in completions]")
    changes = {"reward.function": f"{tmp_path}/reward.py:length"} if both else {"models": {"actor": f"{home}/policy"}}
    assert f"there is {found}" in run.refuses("ppo", changes)


def test_a_tokenizer_of_a_larger_vocabulary_is_told(run: Runner, broken: Path) -> None:
    from pellucid.data import train_bpe

    texts = [f"{first}{second}{third}" for first in "abcdef" for second in "ghijkl" for third in "mnopqr"]
    train_bpe(texts, vocab_size=400).save_pretrained(broken)
    rows = write_jsonl(broken.parent / "rows.jsonl", [{"prompt": "dlr cir " * 2}])
    changes = {"models.actor": str(broken), "data.source": str(rows), "eval_data.source": str(rows)}
    assert "Is it the tokenizer of another model?" in run.refuses("ppo", changes)


# ---------------------------------------------------------------- tokenizers


def tokenizer_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


CONVERSATION = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": "good"}]} for a in "abcdef"
]


def test_conversations_need_a_chat_template(run: Runner, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", CONVERSATION)
    error = run.refuses("sft", {"data.source": str(path), "eval_data.source": str(path)})
    assert f"{path}:1: the data set is conversational, but the tokenizer" in error and "chat_template" in error


def test_a_chat_template_from_a_file_serves(run: Runner, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", CONVERSATION)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                        "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    data = {"source": str(path), "chat_template": str(template)}
    run.succeeds("sft", {"data": data, "eval_data": data, "learn.max_steps": 1})


def test_a_missing_chat_template_file_is_named(run: Runner, tmp_path: Path) -> None:
    assert "no such file" in run.refuses("sft", {"data.chat_template": str(tmp_path / "chat.jinja")})


def test_a_tokenizer_without_eos_is_told(run: Runner, broken: Path) -> None:
    tokenizer_config(broken, eos_token=None)
    assert "has no EOS token, so no completion could end" in run.refuses("sft", {"model": str(broken)})


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_without_pad_or_with_pad_equal_to_eos_a_run_gives_the_same_numbers(
    run: Runner, home: Path, broken: Path, tmp_path: Path, pad: str | None
) -> None:
    """Masks come from lengths and from generation, so nothing may depend on the pad token. A run over the same weights
    with another pad token must have the same losses, scores, values and KL, to the bit."""
    from transformers import AutoTokenizer

    reward = Path(shutil.copytree(home / "reward", tmp_path / "reward"))
    for folder in (broken, reward):
        tokenizer_config(folder, pad_token=pad)
        assert AutoTokenizer.from_pretrained(folder).pad_token == pad
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            if path.exists():
                path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None if pad is None else 0}))
    found = {}
    for name, actor, scorer in (("own", home / "policy", home / "reward"), ("other", broken, reward)):
        run.run_dir = tmp_path / name
        run.succeeds("ppo", {"models": {"actor": str(actor), "reward": str(scorer)}, "total_steps": 2})
        lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
        found[name] = [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
    assert found["own"] == found["other"]


def test_every_eos_id_of_the_generation_config_stops_a_response(run: Runner, broken: Path) -> None:
    """With every id of the vocabulary an EOS, each response is one token long, and that token is an action."""
    path = broken / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": list(range(300))}))
    run.succeeds("ppo", {"models.actor": str(broken), "total_steps": 1, "run.checkpoint_every": 0})
    step = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert (step["rollout/length"], step["rollout/stopped"], step["rollout/tokens"]) == (1.0, 1.0, 6.0)
