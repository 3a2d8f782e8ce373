"""The four roles in this process: which are loaded, from where, and that they are checked together."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_runs import padded, ppo_config, ragged_rows, random_batch, save_models, tokenizer

from pellucid.errors import ConfigError, DataError
from pellucid.execution.local import build_workers, save_model
from pellucid.rewards import FunctionReward, ModelReward


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def build(models, tmp_path, reward=None, **overrides):
    return build_workers(ppo_config(models, tmp_path / "run", **overrides), reward, pad_id=0, total_updates=4)


def constant(prompts, completions):
    return [1.0] * len(prompts)


def test_the_critic_starts_as_the_reward_model(models, tmp_path):
    workers = build(models, tmp_path)
    assert isinstance(workers.reward, ModelReward) and workers.critic is not None
    ids, mask = padded(ragged_rows())
    theirs = workers.reward.model.values(ids, mask, mask)
    assert workers.critic.model.values(ids, mask, mask).equal(theirs)
    assert workers.critic.model.hf is not workers.reward.model.hf


def test_actor_and_reference_start_alike_and_share_nothing(models, tmp_path):
    workers = build(models, tmp_path)
    pairs = list(zip(workers.actor.model.hf.parameters(), workers.reference.model.hf.parameters(), strict=True))
    assert all(a.equal(b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_the_engine_samples_from_the_actors_own_weights(models, tmp_path):
    workers = build(models, tmp_path)
    assert workers.engine.model is workers.actor.model.hf
    assert workers.engine.num_slots == 3


@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo"])
def test_the_critic_exists_for_gae_only(models, tmp_path, advantage):
    workers = build(models, tmp_path, algo__advantage=advantage, algo__kl_coef=0)
    assert (workers.critic is not None) == (advantage == "gae")
    assert ("critic" in workers.state_dict()) == (advantage == "gae")


def test_with_a_function_the_critic_starts_from_the_actor_with_a_head_of_the_seed(models, tmp_path):
    reward = FunctionReward(constant, tokenizer())
    one, two, other = (
        build(models, tmp_path, reward, models__reward=None, run__seed=seed).critic.model.hf for seed in (0, 0, 1)
    )
    assert one.score.weight.equal(two.score.weight) and not one.score.weight.equal(other.score.weight)
    actor = build(models, tmp_path, reward, models__reward=None).actor.model.hf
    assert one.base_model.embed_tokens.weight.equal(actor.base_model.embed_tokens.weight)


def test_one_reward_exactly(models, tmp_path):
    with pytest.raises(ConfigError, match=r"give models\.reward or a reward function .*; there is neither"):
        build(models, tmp_path, models__reward=None)
    with pytest.raises(ConfigError, match="there is both"):
        build(models, tmp_path, FunctionReward(constant, tokenizer()))


def test_a_policy_as_reward_model_is_refused(models, tmp_path):
    with pytest.raises(DataError, match="not a model with one scalar output"):
        build(models, tmp_path, models__reward=str(models / "actor"))


def test_state_dict_round_trip(models, tmp_path):
    one, other = build(models, tmp_path), build(models, tmp_path)
    batch = random_batch(4).having(rewards=torch.zeros(4, random_batch(4).input_ids.shape[1]))
    one.critic.update(batch, seed=0)
    other.load_state_dict(copy.deepcopy(one.state_dict()), version=5)
    assert other.engine.version == 5 and other.critic.learner.updates == one.critic.learner.updates > 0
    for a, b in zip(one.critic.model.hf.parameters(), other.critic.model.hf.parameters(), strict=True):
        assert a.equal(b)


def test_save_model_replaces_a_folder_whole(models, tmp_path):
    workers = build(models, tmp_path)
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "leftover").write_text("old")
    save_model(workers.actor.model, tokenizer(), tmp_path / "actor")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "actor").iterdir()}
    assert not (tmp_path / "actor" / "leftover").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
