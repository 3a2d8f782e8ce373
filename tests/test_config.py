"""Config: TOML and flags become one checked tree, and whatever is wrong is said in a line that names the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pellucid.config import (
    GenerateConfig,
    PPOConfig,
    QuickstartConfig,
    RMConfig,
    Section,
    SFTConfig,
    differences,
    dump_toml,
    help_text,
    load_config,
    read_toml,
    validate,
)
from pellucid.errors import ConfigError

RUN = {"run": {"dir": "runs/x"}}
DATA = {"data": {"source": "corpus:sft"}}
PPO: dict[str, Any] = RUN | DATA | {"models": {"actor": "policy", "reward": "reward"}}
SFT: dict[str, Any] = RUN | DATA | {"model": "policy"}
RM: dict[str, Any] = RUN | DATA | {"model": "policy"}


def load(tmp_path: Path, tree: dict[str, Any], *flags: str, model: type[Section] = PPOConfig) -> Any:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tree))
    return load_config(model, path, list(flags))


def refused(tree: dict[str, Any], model: type[Section] = PPOConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(model, tree, "run.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        (["--algo.gae-lambda", "0.9"], "algo", "gae_lambda", 0.9),
        (["--algo.gae_lambda=0.9"], "algo", "gae_lambda", 0.9),
        (["--algo.packing"], "algo", "packing", True),
        (["--algo.packing", "true"], "algo", "packing", True),
        (["--algo.whiten-advantages", "false"], "algo", "whiten_advantages", False),
        (["--algo.whiten-advantages=no"], "algo", "whiten_advantages", False),
        (["--algo.packing", "--run.seed", "3"], "run", "seed", 3),
        (["--algo.value-clip-eps", "none"], "algo", "value_clip_eps", None),
        (["--algo.dual-clip", "3"], "algo", "dual_clip", 3.0),
        (["--run.loggers", "tensorboard,wandb"], "run", "loggers", ("tensorboard", "wandb")),
        (["--run.loggers", "tensorboard", "--run.loggers", "wandb"], "run", "loggers", ("tensorboard", "wandb")),
        (["--run.loggers", "none"], "run", "loggers", ()),
        (["--run.dir", "somewhere/else"], "run", "dir", Path("somewhere/else")),
        (["--models.critic", "none"], "models", "critic", None),
        (["--models.actor", "12"], "models", "actor", "12"),
        (["--models.actor=a=b"], "models", "actor", "a=b"),
        (["--data.columns.prompt", "question"], "data", "columns", {"prompt": "question"}),
        (["--actor-optimizer.lr", "1e-6"], "actor_optimizer", "lr", 1e-6),
        (["--run.seed", "1", "--run.seed", "2"], "run", "seed", 2),
    ],
)
def test_a_flag_takes_every_form(tmp_path: Path, flags: list[str], section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load(tmp_path, PPO, *flags), section), key) == value


def test_a_flag_overrides_the_file_and_leaves_its_neighbours(tmp_path: Path) -> None:
    config = load(tmp_path, PPO | {"algo": {"gamma": 0.5, "kl_coef": 0.3}}, "--algo.gamma", "0.7")
    assert (config.algo.gamma, config.algo.kl_coef) == (0.7, 0.3)


def test_none_removes_an_optional_section_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, PPO | {"eval_data": {"source": "corpus:prompts_heldout"}}, "--eval-data", "none")
    assert config.eval_data is None


def test_a_flag_reaches_into_an_optional_section_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert (
        load(tmp_path, PPO, "--eval-data.source", "corpus:prompts_heldout").eval_data.source == "corpus:prompts_heldout"
    )


def test_free_text_may_hold_commas_and_is_given_several_times(tmp_path: Path) -> None:
    flags = ["--prompt", "Hello, world", "--prompt", "-1 is"]
    config = load(tmp_path, {"model": "m"}, *flags, model=GenerateConfig)
    assert config.prompt == ("Hello, world", "-1 is")


def test_a_negative_number_is_a_value_and_not_a_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.seed = -1: input should be greater than or equal to 0"):
        load(tmp_path, PPO, "--run.seed", "-1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo.gamme", "1"], r"unknown key 'algo.gamme' in \[algo\]; did you mean 'gamma'\?"),
        (["--alga.gamma", "1"], "unknown key 'alga' in the top level; did you mean 'algo'"),
        (["--resum"], "did you mean 'resume'"),
        (["--run.seed.x", "1"], "unknown key 'run.seed.x'"),
        (["--algo.gamma"], "--algo.gamma needs a value"),
        (["--algo.gamma", "--run.seed"], "--algo.gamma needs a value; .* --algo.gamma=--run.seed"),
        (["--algo", "5"], "--algo is a section; set its keys, as in --algo.micro-batch-tokens VALUE"),
        (["--data", "x", "--data.source", "y"], "--data is a section"),
        (["--eval-data", "none", "--eval-data.source", "y"], "contradicts"),
        (["other.toml"], "'other.toml' is not a flag; the config file comes first"),
        (["5"], "'5' is not a flag; write --section.key value"),
        (["--algo.gamma", "high"], "algo.gamma = 'high': input should be a valid number"),
        (["--algo.packing", "perhaps"], "algo.packing = 'perhaps': input should be a valid boolean"),
        (
            ["--run.loggers", "tensorboard,wandbb"],
            "run.loggers.1 = 'wandbb': input should be 'tensorboard', 'wandb' or",
        ),
        (["--algo.clip-eps-low", "none"], "algo.clip_eps_low = 'none'"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, PPO, *flags)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[run]\nseed = 1\nseed 2\n", "not valid TOML: .*line 3"),
        (b"seed = \xff", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"run.toml: {message}"):
        load_config(PPOConfig, path, [])


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(PPOConfig, tmp_path / "run.toml", [])
    with pytest.raises(ConfigError, match="is a folder; a TOML file is needed"):
        load_config(PPOConfig, tmp_path, [])


def test_an_unknown_key_has_its_section_and_the_nearest_name() -> None:
    assert "unknown key 'algo.gae_lamda' in [algo]; did you mean 'gae_lambda'?" in refused(
        PPO | {"algo": {"gae_lamda": 1}}
    )
    assert "unknown key 'modles' in the top level; did you mean 'models'?" in refused(PPO | {"modles": {}})
    assert "unknown key 'eval_data.sorce' in [eval_data]; did you mean 'source'" in refused(
        PPO | {"eval_data": {"source": "x", "sorce": "y"}}
    )


def test_a_missing_key_and_the_number_of_further_faults() -> None:
    message = refused({"run": {"dir": "x"}, "algo": {"gamma": 2}})
    assert "models is missing" in message and "(and 2 more)" in message


@pytest.mark.parametrize(
    ("model", "tree", "message"),
    [
        (PPOConfig, PPO | {"rollout": {"prompts_per_step": 8}, "algo": {"minibatch_size": 16, "micro_batch_size": 4}},
         "algo.minibatch_size 16 is larger than the batch of 8 samples"),
        (PPOConfig, PPO | {"algo": {"minibatch_size": 16, "micro_batch_size": 32}},
         "algo.micro_batch_size 32 is larger than algo.minibatch_size 16"),
        (SFTConfig, SFT | {"learn": {"batch_size": 4, "micro_batch_size": 8}},
         "learn.micro_batch_size 8 is larger than learn.batch_size 4"),
        *[(PPOConfig, PPO | {"algo": {"advantage": name}}, f"'{name}' compares samples of one prompt")
          for name in ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")],
        (PPOConfig, PPO | {"algo": {"ptx_coef": 0.1}}, r"algo.ptx_coef 0.1 needs \[ptx_data\]"),
        (PPOConfig, PPO | {"algo": {"kl_target": 1.0, "kl_coef": 0}}, "algo.kl_target cannot steer algo.kl_coef 0"),
        (PPOConfig, PPO | {"models": {"actor": "a", "critic": "c"}, "algo": {"advantage": "reinforce_pp"}},
         "'reinforce_pp' has no critic"),
        (PPOConfig, PPO | {"algo": {"dual_clip": 0.5}}, "algo.dual_clip = 0.5: input should be greater than 1"),
        (PPOConfig, PPO | {"algo": {"advantage": "gea"}}, "algo.advantage = 'gea': input should be 'gae', "),
        (PPOConfig, PPO | {"total_steps": "many"}, "total_steps = 'many'"),
        (PPOConfig, PPO | {"rollout": 5}, "rollout = 5"),
        (SFTConfig, SFT | {"new_model": {}}, "give exactly one of model and new_model"),
        (SFTConfig, RUN | DATA, "give exactly one of model and new_model"),
        (SFTConfig, RUN | DATA | {"new_model": {"hidden_size": 30, "num_heads": 4}},
         "new_model: hidden_size 30 is not a multiple of num_heads 4"),
        (GenerateConfig, {"model": "m"}, "give either prompt or"),
        (GenerateConfig, {"model": "m", "prompt": ["a"], **DATA}, "give either prompt or"),
        (QuickstartConfig, RUN | {"ppo_steps": 0}, "ppo_steps = 0: input should be greater than 0"),
    ],
)  # fmt: skip
def test_a_contradiction_is_named(model: type[Section], tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(model, tree, "run.toml")


# ---------------------------------------------------------------- what is kept


def test_a_config_is_not_edited_after_parsing() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        validate(PPOConfig, PPO, "x").total_steps = 3


@pytest.mark.parametrize(
    ("model", "tree"),
    [
        (PPOConfig, PPO),
        (SFTConfig, SFT),
        (RMConfig, RM),
        (SFTConfig, RUN | DATA | {"new_model": {}}),
        (QuickstartConfig, RUN),
    ],
)
def test_the_recorded_config_reads_back_the_same(tmp_path: Path, model: type[Section], tree: dict[str, Any]) -> None:
    config = validate(model, tree, "x")
    path = tmp_path / "config.toml"
    path.write_text(dump_toml(config))
    assert load_config(model, path, []) == config
    assert differences(read_toml(path), config.model_dump(mode="json", exclude_none=True)) == []


@given(
    gamma=st.floats(0, 1),
    lr=st.floats(1e-30, 1e30),
    source=st.text(min_size=1).filter(lambda text: "\x7f" not in text),
    columns=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_any_value_survives_the_recorded_config(gamma: float, lr: float, source: str, columns: dict[str, str]) -> None:
    tree = PPO | {
        "algo": {"gamma": gamma},
        "critic_optimizer": {"lr": lr},
        "data": {"source": source, "columns": columns},
    }
    config = validate(PPOConfig, tree, "x")
    assert validate(PPOConfig, tomllib.loads(dump_toml(config)), "x") == config


def test_differences_name_the_keys() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]


# ---------------------------------------------------------------- help


def leaves(model: type[Section], prefix: str = "") -> list[tuple[str, Any]]:
    from pellucid.config.load import section_of

    found: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        found += leaves(section, f"{prefix}{name}.") if section else [(f"{prefix}{name}", field)]
    return found


@pytest.mark.parametrize("model", [PPOConfig, SFTConfig, RMConfig, GenerateConfig, QuickstartConfig])
def test_help_lists_every_key_or_the_section_whose_keys_it_shares(model: type[Section]) -> None:
    text = help_text(model, {})
    for key, _ in leaves(model):
        flag = "--" + key.replace("_", "-")
        shared = f"--{key.rpartition('.')[0].replace('_', '-')}.KEY"
        assert f"{flag} " in text or f"{flag}.NAME" in text or shared in text, key


@pytest.mark.parametrize("model", [PPOConfig, SFTConfig, RMConfig, GenerateConfig, QuickstartConfig])
def test_every_key_has_a_description(model: type[Section]) -> None:
    assert [key for key, field in leaves(model) if not field.description] == []


def test_help_shows_the_default_of_the_command() -> None:
    text = help_text(PPOConfig, {"run": {"dir": "runs/ppo"}})
    assert (
        "[runs/ppo]" in text and "[required]" in text and "[0.95]" in text and "[absent]" in text and "[true]" in text
    )
