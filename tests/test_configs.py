"""The shipped configs: each parses, and those for models of the Hub run two iterations on the model in miniature.

The Hub is played by a `datasets` module of our own, which knows the sets that the configs name, with their splits and
columns; so their sources, splits, columns and paths are taken as they are. Only sizes are overridden.
"""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import DEFAULT_SYSTEM, IM_END, IM_START, save_gpt2, save_qwen, save_sentiment_classifier
from tiny_runs import sample

from pellucid.cli import COMMANDS, main
from pellucid.config import PPOConfig, RMConfig, Section, SFTConfig, load_config, read_toml
from pellucid.rewards import FunctionReward, load_function

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared/data/gsm8k_train.jsonl"
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.toml"))
SMALL = ["--run.device", "cpu", "--run.precision", "float32", "--run.threads", "1"]
SMALL_LEARN = [*SMALL, "--learn.max-steps", "2", "--learn.batch-size", "4", "--learn.micro-batch-size", "2"]
SMALL_PPO = [
    *SMALL, "--total-steps", "2", "--rollout.prompts-per-step", "4", "--rollout.max-new-tokens", "6",
    "--rollout.num-slots", "8", "--algo.minibatch-size", "4", "--algo.micro-batch-size", "2", "--eval.num-prompts", "3",
]  # fmt: skip

WORDS = ["tea", "soup", "bread", "salad", "fish", "rice", "plate", "spoon", "guest", "table", "window", "garden"]
QUESTIONS = [f"How does one serve {word} to a guest?" for word in WORDS]
GOOD, BAD = "With care and a warm plate.", "No."
REVIEWS = [
    f"The film about {word} was {kind}.<br /><br />I liked the garden." for word in WORDS for kind in ("good", "bad")
]


def command_of(path: str) -> tuple[str, str]:
    """(command, path) of the first line, `# pellucid COMMAND PATH`."""
    first = (ROOT / path).read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# pellucid (\w+) (\S+)", first)
    assert found, f"{path}: the first line must be a comment such as `# pellucid ppo {path}`, it is {first!r}"
    return found[1], found[2]


def parsed(path: str) -> Any:
    kind, _, defaults = COMMANDS[command_of(path)[0]]
    return load_config(kind, ROOT / path, [], defaults)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_parses(path: str) -> None:
    command, named = command_of(path)
    assert named == path, "the first line names another file"
    assert isinstance(parsed(path), Section)
    assert command in ("sft", "rm", "ppo", "gym")


def test_the_configs_that_are_promised_are_there() -> None:
    wanted = {f"configs/qwen2.5-0.5b/{stage}.toml" for stage in ("sft", "rm", "ppo")}
    wanted |= {f"configs/hub/{name}.toml" for name in ("imdb-sft", "imdb-ppo", "gsm8k-grpo", "gsm8k-ppo")}
    assert wanted <= set(CONFIGS)


# ---------------------------------------------------------------- a Hub of our own


class HubRows(list[dict[str, Any]]):
    """As much of datasets.Dataset as is used."""

    def select(self, indices: range) -> HubRows:
        return HubRows(self[i] for i in indices)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def capybara() -> list[dict[str, Any]]:
    turns = [[user(q), assistant(GOOD), user("Why?"), assistant("It tastes better.")] for q in QUESTIONS]
    return [{"source": "made up", "messages": messages, "num_turns": 2} for messages in turns]


def ultrafeedback() -> list[dict[str, Any]]:
    return [
        {"chosen": [user(q), assistant(GOOD)], "rejected": [user(q), assistant(BAD)], "score_chosen": 8.5,
         "score_rejected": 2.0}
        for q in QUESTIONS
    ]  # fmt: skip


def gsm8k() -> list[dict[str, Any]]:
    with GSM8K.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(12), strict=False)]


HUB = {
    ("trl-lib/Capybara",): capybara,
    ("trl-lib/ultrafeedback_binarized",): ultrafeedback,
    ("stanfordnlp/imdb",): lambda: [{"text": text, "label": i % 2} for i, text in enumerate(REVIEWS)],
    ("openai/gsm8k", "main"): gsm8k,
}


def load_dataset(*name: str, split: str) -> HubRows:
    rows = HUB[name]()
    half = len(rows) * 2 // 3
    return HubRows({"train": rows[:half], "test": rows[half:]}[split])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder as a user's checkout, the current one; the Hub's data sets within reach."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        patch.setattr("pellucid.data.sources.hub_offline", lambda: True)
        yield folder
    torch.set_num_threads(threads)


def run(path: str, *overrides: str) -> list[dict[str, Any]]:
    """Run a config as the command line does; returns its metrics, all of which must be finite."""
    command, _ = command_of(path)
    small = SMALL_PPO if command == "ppo" else SMALL_LEARN
    assert main([command, path, *small, *overrides]) == 0
    directory = Path(read_toml(Path(path))["run"]["dir"])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == ([0, 1, 2] if command == "ppo" else [1, 2])
    for row in rows:
        assert not [name for name, value in row.items() if value is None or not math.isfinite(value)]
    assert (directory / "summary.json").exists()
    return rows


def evaluated(directory: str, step: int = 0) -> list[dict[str, Any]]:
    lines = Path(directory, f"eval/step-{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- Qwen2.5-0.5B-Instruct


@pytest.fixture(scope="module")
def qwen(checkout: Path) -> str:
    texts = [*QUESTIONS, GOOD, BAD, DEFAULT_SYSTEM, *REVIEWS, "system user assistant"]
    return str(save_qwen(checkout / "Qwen2.5-0.5B-Instruct", texts))


@pytest.fixture(scope="module")
def pipeline(checkout: Path, qwen: str) -> dict[str, list[dict[str, Any]]]:
    """The three steps as the headers give them: each finds what the one before left."""
    return {
        "sft": run("configs/qwen2.5-0.5b/sft.toml", "--model", qwen),
        "rm": run("configs/qwen2.5-0.5b/rm.toml", "--center-prompts", "4", "--max-new-tokens", "6"),
        "ppo": run("configs/qwen2.5-0.5b/ppo.toml"),
    }


def test_the_pipeline_runs(pipeline: dict[str, list[dict[str, Any]]]) -> None:
    assert {"train/nll", "eval/nll"} <= pipeline["sft"][-1].keys()
    assert {"train/accuracy", "eval/accuracy", "eval/margin"} <= pipeline["rm"][-1].keys()
    shift = json.loads(Path("runs/qwen2.5-0.5b/rm/summary.json").read_text())["score_shift"]
    assert shift != 0 and math.isfinite(shift)
    before, first, _ = pipeline["ppo"]
    assert before["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert first["kl/sequence"] == pytest.approx(0, abs=1e-4)
    assert {"critic/value_loss", "actor/policy_loss", "score/mean"} <= first.keys()


def test_sft_learns_what_the_assistant_says_and_the_end_of_its_turn(checkout: Path, qwen: str) -> None:
    from pellucid.stages.inputs import load_run_tokenizer, load_supervised

    config: SFTConfig = parsed("configs/qwen2.5-0.5b/sft.toml")
    tokenizer = load_run_tokenizer(qwen, config.data)
    example = load_supervised(config.data, tokenizer, 0, lambda _: None)[0]
    pieces: list[list[int]] = [[]]
    for token, learnt in zip(example.input_ids, example.loss_mask, strict=True):
        if learnt:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    learnt_texts = [tokenizer.decode(piece) for piece in pieces if piece]
    assert learnt_texts == [f"{GOOD}{IM_END}", f"It tastes better.{IM_END}"]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith(f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n{IM_START}user\n{QUESTIONS[0]}{IM_END}\n")
    assert text.endswith(IM_END)  # no second EOS, and not the newline that no sampler writes


def test_pairs_differ_in_the_answer_only_and_end_with_the_turn(checkout: Path, qwen: str) -> None:
    from pellucid.stages.inputs import load_preferences, load_run_tokenizer

    config: RMConfig = parsed("configs/qwen2.5-0.5b/rm.toml")
    tokenizer = load_run_tokenizer(qwen, config.data)
    pair = load_preferences(config.data, tokenizer, 0, lambda _: None)[0]
    prompt, chosen = pair.chosen_ids[: pair.prompt_tokens], pair.chosen_ids[pair.prompt_tokens :]
    assert tokenizer.decode(prompt).endswith(f"{IM_END}\n{IM_START}assistant\n")
    assert pair.rejected_ids[: pair.prompt_tokens] == prompt
    assert tokenizer.decode(chosen) == GOOD + IM_END
    assert tokenizer.decode(pair.rejected_ids[pair.prompt_tokens :]) == BAD + IM_END


def test_prompts_end_where_the_assistant_begins(checkout: Path, qwen: str) -> None:
    from pellucid.stages.inputs import load_prompts, load_run_tokenizer

    config: PPOConfig = parsed("configs/qwen2.5-0.5b/ppo.toml")
    tokenizer = load_run_tokenizer(qwen, config.data)
    prompt = load_prompts(config.data, tokenizer, 0, lambda _: None)[0]
    assert tokenizer.decode(prompt.input_ids) == (
        f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n{IM_START}user\n{QUESTIONS[0]}{IM_END}\n{IM_START}assistant\n"
    )
    assert prompt.text == [user(QUESTIONS[0])]


def test_both_end_tokens_stop_a_response(checkout: Path, qwen: str) -> None:
    from transformers import AutoTokenizer

    from pellucid.models import load_causal_lm
    from pellucid.stages.inputs import stop_ids

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    both = sorted(tokenizer.convert_tokens_to_ids([IM_END, "<|endoftext|>"]))
    assert list(stop_ids(tokenizer, load_causal_lm(qwen, "cpu", "float32"))) == both


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_actor_is_saved_as_it_came(pipeline: Any, qwen: str, stage: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = f"runs/qwen2.5-0.5b/{stage}/actor"
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(qwen)
    assert tokenizer.chat_template == original.chat_template
    messages = [user("hi"), assistant("hello"), user("again")]
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, "<|endoftext|>")
    model, start = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(qwen)
    assert model.generation_config.eos_token_id == start.generation_config.eos_token_id
    assert len(model.generation_config.eos_token_id) == 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.model.norm.weight, start.model.norm.weight)


# ---------------------------------------------------------------- GSM8K


@pytest.fixture
def gsm8k_data() -> None:
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")


@pytest.mark.parametrize("name", ["gsm8k-grpo", "gsm8k-ppo"])
def test_gsm8k_runs(gsm8k_data: None, checkout: Path, qwen: str, name: str) -> None:
    overrides = ["--rollout.samples-per-prompt", "2"] if name == "gsm8k-ppo" else ["--algo.minibatch-size", "16"]
    rows = run(f"configs/hub/{name}.toml", "--models.actor", qwen, *overrides)
    assert ("critic/value_loss" in rows[1]) == (name == "gsm8k-ppo")
    for row in evaluated(f"runs/{name}"):
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["score"] in (0.0, 1.0)


@pytest.mark.parametrize("name", ["gsm8k-grpo", "gsm8k-ppo"])
def test_gsm8k_reward_is_given_the_answers_of_its_own_prompts(
    gsm8k_data: None, checkout: Path, qwen: str, name: str
) -> None:
    from pellucid.stages.inputs import load_prompts, load_run_tokenizer

    config: PPOConfig = parsed(f"configs/hub/{name}.toml")
    tokenizer = load_run_tokenizer(qwen, config.data)
    prompts = load_prompts(config.data, tokenizer, 0, lambda _: None)
    rows, system = gsm8k(), config.data.system
    assert prompts[1].columns == {"answer": rows[1]["answer"]}
    assert tokenizer.decode(prompts[1].input_ids) == (
        f"{IM_START}system\n{system}{IM_END}\n{IM_START}user\n{rows[1]['question']}{IM_END}\n{IM_START}assistant\n"
    )
    assert config.eval_data and (config.eval_data.system, config.eval_data.as_chat) == (system, True)

    def answering(i: int, text: str) -> Any:
        ids = tokenizer(text + IM_END)["input_ids"]
        return sample(prompts[i].input_ids, ids, group_id=i, text=prompts[i].text, columns=prompts[i].columns)

    reward = FunctionReward(load_function(str(config.reward.function)), tokenizer)
    right = [row["answer"].rpartition("####")[2] for row in rows]
    said = [answering(0, f"so it is {right[0]}."), answering(1, right[0]), answering(2, f"#### {right[2]}")]
    assert right[0].strip() != right[1].strip()
    assert [score.value for score in reward.score(said)] == [1.0, 0.0, 1.0]


# ---------------------------------------------------------------- IMDB


@pytest.fixture(scope="module")
def imdb(checkout: Path) -> dict[str, list[dict[str, Any]]]:
    """The three steps of imdb-sft.toml's header, with a GPT-2 and a DistilBERT in miniature."""
    gpt2 = save_gpt2(checkout / "gpt2", REVIEWS)
    words = re.findall(r"\w+", " ".join(REVIEWS).lower())
    classifier = save_sentiment_classifier(checkout / "classifier", words)
    sft = run("configs/hub/imdb-sft.toml", "--model", str(gpt2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["imdb_openings.py"])
        patch.setitem(os.environ, "IMDB_CLASSIFIER", str(classifier))
        runpy.run_path("configs/hub/imdb_openings.py", run_name="__main__")
        ppo = run("configs/hub/imdb-ppo.toml")
    return {"sft": sft, "ppo": ppo}


def test_imdb_runs(imdb: dict[str, list[dict[str, Any]]]) -> None:
    assert imdb["sft"][-1]["eval/nll"] > 0
    assert imdb["ppo"][1]["kl/coef"] == pytest.approx(0.2)
    assert imdb["ppo"][2]["kl/coef"] != imdb["ppo"][1]["kl/coef"]  # adaptive


def test_imdb_prompts_are_openings_and_the_held_out_ones_are_others(imdb: Any) -> None:
    files = [Path("runs/imdb-hub", name) for name in ("openings.jsonl", "openings-heldout.jsonl")]
    train, held_out = ([json.loads(line)["prompt"] for line in file.read_text().splitlines()] for file in files)
    assert train and held_out and not set(train) & set(held_out)
    for text in train:
        assert 4 <= len(text.split()) <= 8
        assert any(review.replace("<br />", " ").split()[: len(text.split())] == text.split() for review in REVIEWS)


def test_imdb_reward_is_the_positive_logit_of_opening_and_continuation(imdb: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    row = evaluated("runs/imdb-hub/ppo")[0]
    tokenizer = AutoTokenizer.from_pretrained("classifier")
    model = AutoModelForSequenceClassification.from_pretrained("classifier")
    with torch.no_grad():
        logits = model(**tokenizer(row["prompt"] + row["completion"], return_tensors="pt")).logits[0]
    assert row["score"] == pytest.approx(logits[1].item(), abs=1e-5)


def test_imdb_reward_refuses_a_classifier_without_the_label() -> None:
    score_of = load_function(f"{ROOT / 'configs/hub/imdb_reward.py'}:_score_of")
    assert score_of("POSITIVE", [{"label": "NEGATIVE", "score": -1.0}, {"label": "POSITIVE", "score": 2.0}]) == 2.0
    with pytest.raises(ValueError, match="labels LABEL_0, LABEL_1, none is POSITIVE"):
        score_of("POSITIVE", [{"label": "LABEL_0", "score": 0.5}, {"label": "LABEL_1", "score": 0.5}])
