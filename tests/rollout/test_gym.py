"""Batches from environments, against scripts, against single environments, and against everything that they may get wrong."""

from __future__ import annotations

import importlib.util
import io
import sys
from typing import Any

import numpy as np
import pytest
import tiny_gym
import torch

from pellucid.config import EnvConfig
from pellucid.errors import CheckpointError, ConfigError, DataError, IntegrityError
from pellucid.models import MLPPolicy
from pellucid.rollout.gym import (
    Environments,
    JointEnvironments,
    Rollout,
    SeparateEnvironments,
    collect,
    make_environments,
)

gymnasium = pytest.importorskip("gymnasium")
tiny_gym.register()


def environments(name: str = "Scripted-v0", num_envs: int = 2, seed: int = 0, **config: Any) -> Environments:
    return make_environments(EnvConfig(id=name, num_envs=num_envs, **config), seed)


def policy_for(made: Environments, scale: float = 1.0) -> MLPPolicy:
    """A random policy, far from uniform where scale is large."""
    policy = MLPPolicy(made.observation_size, (8,), made.num_actions, seed=3, device="cpu")
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(scale)
    return policy


def run(made: Environments, steps: int = 10, seed: int = 0) -> Rollout:
    return collect(made, policy_for(made, 3.0), steps, seed, version=7)


# ---------------------------------------------------------------- what is in a batch


def test_the_batch_is_the_script():
    """Ten steps: episodes of 3 (terminated), 2 (truncated), 4 (terminated) and the first step of the next."""
    rollout = run(environments())
    batch, row = rollout.batch, 1
    observations = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    after = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1)]
    assert batch.get("observations")[row].tolist() == [list(pair) for pair in observations]
    assert rollout.after[row].tolist() == [list(pair) for pair in after]  # the final ones, not those after a reset
    assert batch.position_ids[row].tolist() == [k for _, k in observations]
    assert batch.ended[row].nonzero()[:, 0].tolist() == [2, 4, 8]
    assert rollout.terminated[row].nonzero()[:, 0].tolist() == [2, 8]
    actions = batch.input_ids[row].tolist()
    assert set(actions) == {0, 1}
    rewards = [10 * e + k + action for (e, k), action in zip(observations, actions, strict=True)]
    assert batch.get("rewards")[row].tolist() == rewards
    # Both environments play the same script, so the odd entries are the second one's.
    assert rollout.episodes[1::2] == [(sum(rewards[:3]), 3), (sum(rewards[3:5]), 2), (sum(rewards[5:9]), 4)]
    assert batch.action_mask.all() and batch.attention_mask.all()
    assert batch.group_ids.tolist() == [0, 1] and batch.policy_version.tolist() == [7, 7]
    assert not batch.bootstrap_values.any()


def test_an_episode_goes_on_over_the_edge_of_a_rollout():
    made = environments()
    pieces = [run(made, 4, seed) for seed in range(3)]
    observations = torch.cat([piece.batch.get("observations") for piece in pieces], 1)
    assert observations[0, :, 0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert torch.cat([piece.batch.position_ids for piece in pieces], 1)[0].tolist() == [
        0,
        1,
        2,
        0,
        1,
        0,
        1,
        2,
        3,
        0,
        1,
        2,
    ]
    assert [length for piece in pieces for _, length in piece.episodes] == [3, 3, 2, 2, 4, 4, 3, 3]


def test_actions_are_drawn_from_the_policy_and_its_logprobs_are_recorded():
    made = environments(num_envs=40)
    policy = policy_for(made)
    with torch.no_grad():
        policy.module[-1].weight.zero_()
        policy.module[-1].bias.copy_(torch.tensor([0.3, -0.9]))
    batch = collect(made, policy, 500, seed=1, version=0).batch
    probabilities = torch.tensor([0.3, -0.9]).softmax(0)
    share = batch.input_ids.float().mean().item()
    assert abs(share - probabilities[1].item()) < 4 * (probabilities.prod().item() / batch.input_ids.numel()) ** 0.5
    torch.testing.assert_close(batch.rollout_logprobs, probabilities.log()[batch.input_ids])
    by_place = batch.input_ids.float().mean(1)  # the noise differs from environment to environment
    assert by_place.std() > 0


def test_the_seed_settles_the_actions():
    first, again, other = (run(environments("Walk-v0", 5), 60, seed).batch for seed in (1, 1, 2))
    assert first.input_ids.equal(again.input_ids) and first.get("observations").equal(again.get("observations"))
    assert not first.input_ids.equal(other.input_ids)
    assert not first.get("observations").equal(run(environments("Walk-v0", 5, seed=1), 60, 1).batch.get("observations"))


def test_actions_start_where_the_space_does_and_observations_are_flattened():
    batch = run(environments("Walk-v0", 3), 40).batch  # Walk asserts that its actions are 5 and 6
    assert batch.get("observations").shape == (3, 40, 4) and set(batch.input_ids.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["Walk-v0", "CartPole-v1"])
def test_no_two_episodes_start_alike(name):
    batch = run(environments(name, 3), 150).batch
    starts = batch.get("observations")[batch.action_mask & (batch.position_ids == 0)]
    assert len(starts) > 6 and len(starts.unique(dim=0)) == len(starts)


def test_a_limit_of_steps_truncates():
    rollout = run(environments(max_episode_steps=1), 6)
    assert rollout.batch.ended.all() and not rollout.terminated.any()


# ---------------------------------------------------------------- the vector implementation


def test_the_vector_implementation_does_what_single_environments_do():
    """The same starts and the same actions, step by step, over terminations, truncations and resets."""
    made = environments("CartPole-v1", 6, max_episode_steps=25)
    assert isinstance(made, JointEnvironments)
    rollout = collect(made, policy_for(made, 2.0), 200, seed=0, version=0)
    batch, observations = rollout.batch, rollout.batch.get("observations")
    assert rollout.terminated.any() and (batch.ended & ~rollout.terminated).any()
    single = gymnasium.make("CartPole-v1", max_episode_steps=25)
    for row in range(6):
        fresh = True
        for t in range(200):
            if not batch.action_mask[row, t]:  # the reset: the action counts for nothing, and what follows is a start
                assert fresh and batch.get("rewards")[row, t] == 0 and not batch.ended[row, t]
                continue
            if fresh:
                single.reset()
                assert observations[row, t].abs().max() <= 0.05 and batch.position_ids[row, t] == 0
                single.unwrapped.state = observations[row, t].double().numpy()
            after, reward, terminated, truncated, _ = single.step(int(batch.input_ids[row, t]))
            np.testing.assert_allclose(rollout.after[row, t].numpy(), after, atol=2e-5)
            assert reward == batch.get("rewards")[row, t]
            assert (terminated, terminated or truncated) == (rollout.terminated[row, t], batch.ended[row, t])
            fresh = terminated or truncated
    assert (~batch.action_mask).sum() == batch.ended[:, :-1].sum()  # each end but one in the last step has its reset
    assert sum(length for _, length in rollout.episodes) + made.lengths.sum() == batch.action_mask.sum()


def test_a_vector_implementation_with_a_state_that_cannot_be_read_is_not_used(monkeypatch):
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    assert JointEnvironments.serves(CartPoleVectorEnv(2))
    vector = CartPoleVectorEnv(2)
    vector.worlds = [object()]
    assert not JointEnvironments.serves(vector)
    monkeypatch.setitem(CartPoleVectorEnv.metadata, "autoreset_mode", gymnasium.vector.AutoresetMode.SAME_STEP)
    assert not JointEnvironments.serves(CartPoleVectorEnv(2))
    assert isinstance(environments("CartPole-v1"), SeparateEnvironments)


# ---------------------------------------------------------------- taken up again


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "Walk-v0"])
@pytest.mark.parametrize("steps", [50, 8])
def test_environments_go_on_bitwise_from_their_state(name, steps):
    """From the middle of episodes, and from the step that ends one."""
    made = environments(name, 3, max_episode_steps=8)
    ended = run(made, steps, seed=0).batch.ended
    assert ended[:, -1].all() if (name, steps) == ("CartPole-v1", 8) else ended.any()
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    going_on = [run(made, 50, seed) for seed in (1, 2)]
    file.seek(0)
    restored = environments(name, 3, max_episode_steps=8)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for expected in going_on:
        found = run(restored, 50, seed=1 if expected is going_on[0] else 2)
        assert found.episodes == expected.episodes and found.after.equal(expected.after)
        for field in ("input_ids", "observations", "rewards", "ended", "position_ids", "action_mask"):
            assert found.batch.get(field).equal(expected.batch.get(field)), field


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_box2d_goes_on_bitwise_from_its_state():
    pytest.importorskip("Box2D")
    made, restored = (environments("LunarLander-v3", 2) for _ in range(2))
    run(made, 120, seed=0)
    restored.load_state_dict(made.state_dict())
    assert run(restored, 60, seed=1).after.equal(run(made, 60, seed=1).after)


def test_an_environment_that_does_not_repeat_itself_is_not_resumed():
    made = environments("Forgetful-v0")
    run(made, 20)
    with pytest.raises(CheckpointError, match=r"^env.id Forgetful-v0: from the same seeds and actions it gives other"):
        environments("Forgetful-v0").load_state_dict(made.state_dict())


# ---------------------------------------------------------------- what they get wrong


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "NanObservation-v0",
            IntegrityError,
            "environment 0 returned an observation that is not finite in step 3 of its",
        ),
        ("NanReward-v0", IntegrityError, "environment 0 returned a reward that is not finite in step 3 of its episode"),
        ("Raises-v0", DataError, "a step raised RuntimeError: out of fuel"),
    ],
)
def test_a_step_that_goes_wrong_is_named(name, error, message):
    made = environments(name)
    with pytest.raises(error, match=f"env.id {name}: {message}"):
        run(made)


def test_an_episode_without_an_end_is_an_error():
    made = environments("Endless-v0", longest_episode=15)
    run(made, 15)
    with pytest.raises(
        IntegrityError, match=r"env.id Endless-v0: an episode has not ended after 15 steps .*max_episode_steps"
    ):
        run(made, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ContinuousActions-v0", r"its actions are Box\(.*\); only Discrete ones are supported"),
        ("DictObservations-v0", r"its observations are Dict\(.*\); only a Box is supported"),
        ("CartPoel-v1", "Environment `CartPoel` doesn't exist"),
        ("CartPole", "CartPole"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line(name, message):
    with pytest.raises(ConfigError, match=f"^env.id {name}: .*{message}") as caught:
        environments(name)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(DataError, match=r"env.id LunarLander-v3: .*Box2D.*pip install 'pellucid\[gym\]'"):
        environments("LunarLander-v3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"environments need the package gymnasium: pip install 'pellucid\[gym\]'"):
        environments()
