"""SFT -> reward model -> PPO through the Python API, a few steps each, and what the run directories then hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TEXTS, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pellucid import PPOConfig, RMConfig, SFTConfig, train_ppo, train_rm, train_sft
from pellucid.errors import DataError, RewardError
from pellucid.metrics import Reporter
from pellucid.models import load_causal_lm, load_scalar_model
from pellucid.rewards import ModelReward
from pellucid.rollout import EmbeddedEngine
from pellucid.stages.inputs import load_prompts, load_run_tokenizer, stop_ids
from pellucid.stages.scoring import raw_scores
from pellucid.types import SamplingParams, derive_seed

QUIET = Reporter(quiet=True)
PAIRS = [
    {"prompt": text[:10], "chosen": text[10:], "rejected": other[10:]}
    for text, other in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
]


def run_section(path: Path, **more: Any) -> dict[str, Any]:
    return {"dir": path, "threads": 1, "device": "cpu", "precision": "float32", **more}


def write_data(folder: Path) -> dict[str, dict[str, Any]]:
    rows = {
        "texts": [{"text": text} for text in TEXTS],
        "pairs": PAIRS,
        "prompts": [{"prompt": text[:10], "answer": i} for i, text in enumerate(TEXTS)],
    }
    return {name: {"source": str(write_jsonl(folder / f"{name}.jsonl", content))} for name, content in rows.items()}


def sft_config(folder: Path, data: dict[str, Any], **more: Any) -> SFTConfig:
    shape = {"vocab_size": 290, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    values = {
        "run": run_section(folder / "sft"),
        "data": data["texts"],
        "eval_data": data["texts"],
        "new_model": shape | {"context": 64},
        "learn": {"max_steps": 8, "batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-2},
    }
    return SFTConfig.model_validate(values | more)


def rm_config(folder: Path, data: dict[str, Any], **more: Any) -> RMConfig:
    values = {
        "run": run_section(folder / "rm"),
        "model": str(folder / "sft" / "actor"),
        "data": data["pairs"],
        "eval_data": data["pairs"],
        "learn": {"max_steps": 8, "batch_size": 4, "micro_batch_size": 3},
        "optimizer": {"lr": 1e-2},
        "center_prompts": 4,
        "max_new_tokens": 8,
    }
    return RMConfig.model_validate(values | more)


def ppo_config(folder: Path, data: dict[str, Any], name: str = "ppo", **more: Any) -> PPOConfig:
    values = {
        "run": run_section(folder / name),
        "models": {"actor": str(folder / "sft" / "actor"), "reward": str(folder / "rm" / "reward_model")},
        "data": data["prompts"],
        "eval_data": data["prompts"],
        "total_steps": 3,
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8, "num_slots": 4},
        "algo": {"num_epochs": 2, "minibatch_size": 4, "micro_batch_size": 4, "kl_target": 5.0, "kl_horizon": 100},
        "eval": {"every": 2, "num_prompts": 3},
        "actor_optimizer": {"lr": 3e-3},
        "critic_optimizer": {"lr": 3e-3},
    }
    return PPOConfig.model_validate(values | more)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(folder, data, summaries) of the three stages, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    data = write_data(folder)
    summaries = {
        "sft": train_sft(sft_config(folder, data), reporter=QUIET),
        "rm": train_rm(rm_config(folder, data), reporter=QUIET),
        "ppo": train_ppo(ppo_config(folder, data), reporter=QUIET),
    }
    return folder, data, summaries


# ---------------------------------------------------------------- what is there at the end


@pytest.mark.parametrize(
    ("stage", "models", "steps"),
    [("sft", ["actor"], 8), ("rm", ["reward_model"], 8), ("ppo", ["actor", "critic", "best"], 3)],
)
def test_the_run_directory_is_complete(pipeline, stage, models, steps):
    folder, _, summaries = pipeline
    path = folder / stage
    assert json.loads((path / "summary.json").read_text()) == summaries[stage]
    assert summaries[stage]["steps"] == steps and summaries[stage]["seed"] == 0
    assert [row["step"] for row in metrics(path)][-1] == steps
    assert (path / "config.toml").exists() and list((path / "checkpoints").glob("step-*"))
    for model in models:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (path / model).iterdir()}
    assert not list(path.rglob("*.partial"))


def test_every_metric_is_finite(pipeline):
    folder, _, _ = pipeline
    for stage in ("sft", "rm", "ppo"):
        for row in metrics(folder / stage):
            assert all(value is not None and math.isfinite(value) for value in row.values()), (stage, row)


def test_sft_learns_its_texts(pipeline):
    rows = metrics(pipeline[0] / "sft")
    assert rows[-1]["train/nll"] < 0.8 * rows[0]["train/nll"]
    assert rows[0]["train/nll"] == pytest.approx(math.log(290), rel=0.1)
    assert rows[-1]["eval/nll"] < rows[0]["train/nll"]


def test_the_reward_model_learns_its_pairs(pipeline):
    _, _, summaries = pipeline
    assert summaries["rm"]["eval/accuracy"] == 1.0
    assert summaries["rm"]["eval/pair_loss"] < math.log(2)


def test_reference_samples_score_0_on_average(pipeline):
    """The very samples that the shift was taken from, scored by the saved model."""
    folder, data, summaries = pipeline
    config = rm_config(folder, data)
    tokenizer = load_run_tokenizer(config.model, config.data)
    reference = load_causal_lm(config.model, "cpu", "float32")
    prompts = load_prompts(config.data, tokenizer, 0, lambda _: None)
    params = SamplingParams(8, stop_token_ids=stop_ids(tokenizer, reference), seed=derive_seed(0, "centering"))
    samples = EmbeddedEngine(reference.hf, num_slots=4).generate(prompts[:4], params)
    model = load_scalar_model(str(folder / "rm" / "reward_model"), "cpu", "float32", tokenizer.pad_token_id)
    scores = raw_scores(samples, ModelReward(model, 4))
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(summaries["rm"]["reference_score_std"], rel=1e-4)
    assert model.shift == pytest.approx(summaries["rm"]["score_shift"]) and model.shift != 0


def test_what_is_saved_loads_with_plain_transformers_and_gives_the_same_numbers(pipeline):
    """Policy, critic and reward model. The scalar models: plain transformers' number is ours + config.score_shift."""
    folder, _, _ = pipeline
    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo" / "actor")
    ids = tokenizer("the cat sat by the sea", return_tensors="pt")["input_ids"]
    ones = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder / "ppo" / "actor").eval()
        theirs = plain(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        ours, _ = load_causal_lm(str(folder / "ppo" / "actor"), "cpu", "float32").logprobs(ids, ones, ones, 1.0)
        torch.testing.assert_close(ours[:, 1:], theirs, atol=2e-5, rtol=1e-5)
        for path in ("ppo/critic", "rm/reward_model"):
            plain = AutoModelForSequenceClassification.from_pretrained(folder / path).eval()
            score = load_scalar_model(str(folder / path), "cpu", "float32", tokenizer.pad_token_id).scores(ids, ones)
            expected = plain(input_ids=ids, attention_mask=ones.long()).logits[:, 0] - plain.config.score_shift
            torch.testing.assert_close(score, expected, atol=2e-5, rtol=1e-5)


def test_first_iteration_of_the_run(pipeline):
    rows = metrics(pipeline[0] / "ppo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    first = rows[1]
    assert first["kl/sequence"] == pytest.approx(0, abs=1e-5)
    assert first["actor/first_ratio_error"] < 1e-4
    assert first["critic/explained_variance"] <= 1
    assert rows[3]["kl/sequence"] != pytest.approx(0, abs=1e-5), "by then the actor has moved"


def test_the_adaptive_coefficient_moved(pipeline):
    first, second = (row["kl/coef"] for row in metrics(pipeline[0] / "ppo")[1:3])
    assert first == 0.05 and second == pytest.approx(0.05 * (1 - 0.2 * 8 / 100))


def test_evaluations_before_between_and_after(pipeline):
    folder, _, summaries = pipeline
    rows = metrics(folder / "ppo")
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 3]
    best = max(row["eval/score"] for row in rows[1:] if "eval/score" in row)
    assert summaries["ppo"]["best eval/score"] == pytest.approx(best)
    written = (folder / "ppo" / "eval" / "step-000000.jsonl").read_text().splitlines()
    row = json.loads(written[0])
    assert len(written) == 3 and {"prompt", "completion", "score", "kl", "tokens", "stop_reason"} == set(row)
    assert row["kl"] == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- determinism


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_run_bitwise(pipeline, tmp_path):
    """All three stages: every metric but the clock, and the final weights."""
    folder, _, _ = pipeline
    data = write_data(tmp_path)
    train_sft(sft_config(tmp_path, data), reporter=QUIET)
    train_rm(rm_config(tmp_path, data), reporter=QUIET)
    train_ppo(ppo_config(tmp_path, data), reporter=QUIET)
    for stage, models in (("sft", ["actor"]), ("rm", ["reward_model"]), ("ppo", ["actor", "critic"])):
        assert metrics(folder / stage) == metrics(tmp_path / stage)
        for model in models:
            assert weights(folder / stage / model) == weights(tmp_path / stage / model), f"{stage}/{model}"


def test_another_seed_gives_another_run(pipeline, tmp_path):
    folder, data, _ = pipeline
    config = ppo_config(folder, data, run=run_section(tmp_path / "ppo", seed=1), total_steps=1)
    train_ppo(config, reporter=QUIET)
    assert metrics(tmp_path / "ppo")[1] != metrics(folder / "ppo")[1]


# ---------------------------------------------------------------- a function as the reward


def test_a_function_trains(pipeline, tmp_path):
    """Towards more of one letter."""
    folder, data, _ = pipeline
    seen: list[Any] = []

    def letters(prompts, completions, answer):
        seen.append(answer)
        return [float(text.count("e")) for text in completions]

    config = ppo_config(
        folder, data,
        run=run_section(tmp_path / "ppo"), models={"actor": str(folder / "sft" / "actor")}, total_steps=7,
        algo={"num_epochs": 4, "minibatch_size": 8, "micro_batch_size": 8, "kl_coef": 0.0},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 8, "max_new_tokens": 8},
        actor_optimizer={"lr": 3e-3, "anneal": False}, critic_optimizer={"lr": 3e-3},
    )  # fmt: skip
    judge = lambda prompts, completions, **_: [len(text) for text in completions]  # noqa: E731
    train_ppo(config, reward=letters, judge=judge, reporter=QUIET)
    rows = metrics(tmp_path / "ppo")
    assert rows[-1]["score/mean"] > rows[1]["score/mean"] + 1.0
    assert "eval/judge" in rows[-1]
    assert sorted(set(seen[0])) == [0, 1, 2]  # the evaluation's three prompts come first


def test_a_function_named_in_the_config_trains(pipeline, tmp_path):
    folder, data, _ = pipeline
    (tmp_path / "mine.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    config = ppo_config(
        folder, data,
        run=run_section(tmp_path / "ppo"), models={"actor": str(folder / "sft" / "actor")}, total_steps=1,
        reward={"function": f"{tmp_path}/mine.py:length"},
        algo={"advantage": "grpo", "kl_in": "loss", "num_epochs": 1, "minibatch_size": 8, "micro_batch_size": 8},
    )  # fmt: skip
    train_ppo(config, reporter=QUIET)
    assert not (tmp_path / "ppo" / "critic").exists()
    assert "critic/value_loss" not in metrics(tmp_path / "ppo")[-1]


def test_a_reward_that_raises_stops_the_run_and_names_the_sample(pipeline, tmp_path):
    folder, data, _ = pipeline
    calls = []

    def flaky(prompts, completions):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("server down")
        return [0.0] * len(prompts)

    config = ppo_config(
        folder,
        data,
        run=run_section(tmp_path / "ppo", checkpoint_every=1),
        models={"actor": str(folder / "sft" / "actor")},
    )
    with pytest.raises(RewardError, match=r"flaky raised ValueError: server down on prompt \d, sample 0, completion"):
        train_ppo(config, reward=flaky, reporter=QUIET)
    assert [p.name for p in (tmp_path / "ppo" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "ppo" / "summary.json").exists()


# ---------------------------------------------------------------- supervised details


def test_micro_batches_and_packing_change_no_supervised_run(pipeline, tmp_path):
    folder, data, _ = pipeline
    learn = {"max_steps": 3, "batch_size": 4}
    results = []
    for i, how in enumerate(
        [{"micro_batch_size": 4}, {"micro_batch_size": 1}, {"packing": True, "micro_batch_size": 3}]
    ):
        path = tmp_path / str(i)
        train_sft(sft_config(path, data, learn=learn | how), reporter=QUIET)
        config = rm_config(folder, data, run=run_section(path / "rm"), learn=learn | how, center_prompts=0)
        train_rm(config, reporter=QUIET)
        results.append((metrics(path / "sft"), metrics(path / "rm")))
    for sft, rm in results[1:]:
        for ours, theirs in zip([*sft, *rm], [*results[0][0], *results[0][1]], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)


def test_ptx_pulls_towards_the_texts(pipeline, tmp_path):
    """A reward that is always 0 leaves the supervised loss alone in the actor's."""
    folder, data, _ = pipeline
    algo = {"advantage": "reinforce_pp", "minibatch_size": 8, "micro_batch_size": 8, "kl_coef": 0.0, "ptx_coef": 1.0}
    config = ppo_config(
        folder, data, run=run_section(tmp_path / "ppo"), models={"actor": str(folder / "sft" / "actor")}, algo=algo,
        ptx_data=data["texts"],
    )  # fmt: skip
    train_ppo(config, reward=lambda prompts, completions: [0.0] * len(prompts), reporter=QUIET)
    losses = [row["actor/ptx_loss"] for row in metrics(tmp_path / "ppo")[1:]]
    assert losses[-1] < losses[0]


def test_fewer_prompts_than_a_step_needs(pipeline, tmp_path):
    folder, data, _ = pipeline
    config = ppo_config(
        folder, data, run=run_section(tmp_path / "ppo"), rollout={"prompts_per_step": 5, "samples_per_prompt": 2}
    )
    with pytest.raises(DataError, match=r"4 prompts are fewer than rollout\.prompts_per_step 5"):
        train_ppo(config, reporter=QUIET)
