"""The loop over environments: its numbers against plain loops and calculus, its runs against themselves, and its learning."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gym
import torch
from torch import Tensor

from pellucid.checkpoint import RunDirectory
from pellucid.cli import main
from pellucid.config import GymAlgoConfig, GymConfig, OptimizerConfig, load_config, to_tree
from pellucid.errors import ConfigError, DataError
from pellucid.execution.workers import ActorWorker
from pellucid.metrics import Reporter
from pellucid.models import MLPPolicy
from pellucid.rollout.gym import collect
from pellucid.stages.clock import Clock
from pellucid.stages.gym import GYM_ADVANTAGES, GymState, finished, train_gym, with_values
from pellucid.types import Batch, transitions

pytest.importorskip("gymnasium")
tiny_gym.register()

ROOT = Path(__file__).parents[2]
QUIET = Reporter(quiet=True)
ONE_PASS = {"num_epochs": 1, "minibatch_size": 40}
"""Of the whole rollout of `config`."""


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """A run sets the thread count of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def config(run_dir: Path | str = "unused", name: str = "Scripted-v0", **sections: Any) -> GymConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "checkpoint_every": 1},
        "env": {"id": name, "num_envs": 2},
        "total_steps": 240,
        "steps_per_rollout": 20,
        "algo": {"num_epochs": 2, "minibatch_size": 16},
        "network": {"hidden_sizes": [8]},
        "actor_optimizer": {"lr": 1e-2},
        "critic_optimizer": {"lr": 1e-2},
    }
    for key, section in sections.items():
        tree[key] = tree[key] | section if isinstance(section, dict) else section
    return GymConfig.model_validate(tree)


def rollout_of(state: GymState, seed: int = 0) -> Any:
    return collect(state.environments, state.actor.model, state.config.steps_per_rollout, seed, version=0)


# ---------------------------------------------------------------- advantages against a plain loop


def plain_gae(rows: list[dict[str, Any]], gamma: float, lam: float) -> list[float]:
    """Of one environment's steps, in order: reward, value, next_value (of the observation after), terminated, ended."""
    advantages, following = [0.0] * len(rows), 0.0
    for t in reversed(range(len(rows))):
        step = rows[t]
        delta = step["reward"] + gamma * (0.0 if step["terminated"] else step["next_value"]) - step["value"]
        following = delta + (0.0 if step["ended"] else gamma * lam * following)
        advantages[t] = following
    return advantages


@pytest.mark.parametrize(("env", "limit"), [("Scripted-v0", None), ("CartPole-v1", 15)])
def test_gae_over_a_rollout_is_the_plain_loop(env: str, limit: int | None) -> None:
    """Terminations, truncations, and episodes cut by the rollout's edge; in CartPole's vector implementation resets, too."""
    made = config(name=env, steps_per_rollout=110, env={"max_episode_steps": limit})
    state = GymState(made)
    rollout = rollout_of(state)
    assert state.critic is not None
    batch = with_values(rollout, rollout.batch, state.critic)
    gamma, lam = 0.9, 0.8
    algo = made.algo.model_copy(update={"gamma": gamma, "gae_lambda": lam, "whiten_advantages": False})
    found = GYM_ADVANTAGES["gae"](batch, algo)
    values, after = (state.critic.model.module(x)[..., 0].detach() for x in (batch.get("observations"), rollout.after))
    ended, terminated, taken = batch.ended, rollout.terminated, batch.action_mask
    assert terminated.any() and (ended & ~terminated).any() and not ended[:, -1].all()
    assert taken.all() == (env == "Scripted-v0")
    for i in range(2):
        columns = [t for t in range(110) if taken[i, t]]
        rows = [
            {
                "reward": batch.get("rewards")[i, t].item(), "value": values[i, t].item(), "next_value": after[i, t].item(),
                "terminated": terminated[i, t].item(), "ended": ended[i, t].item(),
            }
            for t in columns
        ]  # fmt: skip
        expected = torch.tensor(plain_gae(rows, gamma, lam))
        torch.testing.assert_close(found["advantages"][i, columns], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["returns"][i, columns], expected + values[i, columns], atol=1e-4, rtol=1e-4)


def test_what_lies_beyond_an_episode() -> None:
    """0 where it terminated, V(final observation) where it was truncated, V(next observation) at the edge."""
    state = GymState(config(steps_per_rollout=10))
    rollout = rollout_of(state)
    batch = with_values(rollout, rollout.batch, state.critic)
    ends = [3, 5, 9]  # after so many steps; the second is a truncation, and the tenth step belongs to the next episode
    final = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    expected = torch.zeros(10)
    expected[[ends[1] - 1, 9]] = state.critic.model.module(final)[:, 0].detach()
    torch.testing.assert_close(batch.bootstrap_values[0], expected)


def test_reinforce_trains_on_whole_episodes_alone() -> None:
    state = GymState(config(steps_per_rollout=10, algo={"advantage": "reinforce"}))
    batch = rollout_of(state).batch
    whole = finished(batch)
    assert whole.action_mask.tolist() == [[True] * 9 + [False]] * 2
    algo = state.config.algo.model_copy(update={"gamma": 0.5, "whiten_advantages": False})
    found = GYM_ADVANTAGES["reinforce"](whole, algo)["advantages"][0].tolist()
    rewards = batch.get("rewards")[0].tolist()
    pieces = [rewards[:3], rewards[3:5], rewards[5:9]]
    expected = [sum(r * 0.5**k for k, r in enumerate(piece[t:])) for piece in pieces for t in range(len(piece))]
    assert found == pytest.approx([*expected, 0.0])
    with pytest.raises(
        ConfigError, match=r"steps_per_rollout 20: .* needs whole episodes, .* CartPole-v1 have up to 500"
    ):
        GymState(config(name="CartPole-v1", algo={"advantage": "reinforce"}))
    with pytest.raises(DataError, match=r"no episode ended within a rollout of 2 steps, .* raise steps_per_rollout"):
        finished(replace(batch, **{name: getattr(batch, name)[:, :2] for name in ("ended", "action_mask")}))


# ---------------------------------------------------------------- gradients


def gradient(actor: ActorWorker, rows: Batch) -> list[Tensor]:
    """What the actor's update would step along, without clipping its norm."""
    actor.learner.step = dict  # type: ignore[method-assign]
    actor.update(rows, 0.0, seed=0)
    return [parameter.grad.clone() for parameter in actor.model.module.parameters()]


@pytest.mark.parametrize("policy_loss", ["ppo", "cispo"])
def test_with_one_pass_the_gradient_is_reinforce_s(policy_loss: str) -> None:
    """−A ∇ log π, by autograd over a network of our own making."""
    algo = {**ONE_PASS, "advantage": "reinforce", "policy_loss": policy_loss}
    state = GymState(config(algo=algo))
    batch = finished(rollout_of(state).batch)
    batch = batch.having(old_logprobs=batch.rollout_logprobs, **GYM_ADVANTAGES["reinforce"](batch, state.config.algo))
    plain = copy.deepcopy(state.actor.model.module)
    found = gradient(state.actor, transitions(batch))
    taken, advantages = batch.action_mask, batch.get("advantages")
    log_pi = plain(batch.get("observations")).log_softmax(-1).gather(-1, batch.input_ids[..., None])[..., 0]
    (-(advantages * log_pi)[taken].mean()).backward()
    torch.testing.assert_close(found, [p.grad for p in plain.parameters()], atol=1e-6, rtol=1e-4)
    assert max(g.abs().max() for g in found) > 1e-3


REWARD = [[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]]
"""Of a tiny problem: [state][action]. From state 0, action a leads to state 1 + a, and the second action ends the episode."""
GAMMA = 0.8


def observation(place: int) -> Tensor:
    return torch.eye(3)[place]


def trajectories() -> list[tuple[list[int], list[int]]]:
    """(states, actions) of each of the four."""
    return [([0, 1 + first], [first, second]) for first, second in itertools.product((0, 1), repeat=2)]


def expected_return(module: Any) -> Tensor:
    """J: the sum over trajectories of their probability times their discounted return."""
    log_pi = module(torch.eye(3, dtype=torch.float64)).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for states, actions in trajectories():
        probability = sum(log_pi[s, a] for s, a in zip(states, actions, strict=True)).exp()
        total = total + probability * sum(
            GAMMA**t * REWARD[s][a] for t, (s, a) in enumerate(zip(states, actions, strict=True))
        )
    return total


def test_the_gradient_climbs_the_expected_return() -> None:
    """Over all trajectories of a tiny problem, each weighed by its probability, the update's direction is −∇J. ∇J here is by
    finite differences of J, which no policy-gradient formula enters."""
    algo = GymAlgoConfig(advantage="reinforce", num_epochs=1, minibatch_size=8, gamma=GAMMA, whiten_advantages=False)
    actor = ActorWorker(
        MLPPolicy(3, (4,), 2, 1, "cpu"), 1.0, algo, OptimizerConfig(), total_updates=1, max_new_tokens=1
    )
    with torch.no_grad():
        actor.model.module[-1].weight.mul_(50)
    paths = trajectories()
    ids = torch.tensor([actions for _, actions in paths])
    ones, last = torch.ones(4, 2, dtype=torch.bool), torch.tensor([[False, True]] * 4)
    batch = Batch(
        input_ids=ids, attention_mask=ones, position_ids=torch.tensor([[0, 1]] * 4), response_mask=ones, action_mask=ones,
        rollout_logprobs=torch.zeros(4, 2), ended=last, bootstrap_values=torch.zeros(4, 2), group_ids=torch.arange(4),
        policy_version=torch.zeros(4, dtype=torch.int64), stop_reason=(),
        observations=torch.stack([torch.stack([observation(s) for s in states]) for states, _ in paths]),
        rewards=torch.tensor([[REWARD[s][a] for s, a in zip(*path, strict=True)] for path in paths]),
    )  # fmt: skip
    returns = GYM_ADVANTAGES["reinforce"](batch, algo)["advantages"]
    old = actor.logprobs(batch)[0]
    # A sample of n trajectories has each one n * probability times; and the policy gradient theorem discounts from the start.
    weights = old.sum(1, keepdim=True).exp() * torch.tensor([1.0, GAMMA])
    found = gradient(actor, transitions(batch.having(old_logprobs=old, advantages=returns * weights)))

    module = copy.deepcopy(actor.model.module).double()
    step = 1e-5
    for parameter, grad in zip(module.parameters(), found, strict=True):
        flat = parameter.data.view(-1)
        for k in range(flat.numel()):
            kept = flat[k].item()
            ahead, behind = (
                flat.__setitem__(k, kept + sign * step) or expected_return(module).item() for sign in (1, -1)
            )
            flat[k] = kept
            slope = (ahead - behind) / (2 * step)
            assert -8 * grad.view(-1)[k].item() == pytest.approx(slope, abs=2e-5)  # the loss is a mean over 8 steps


# ---------------------------------------------------------------- an iteration


def test_an_iteration_is_on_policy_and_moves_everything() -> None:
    state = GymState(config(name="CartPole-v1"))
    before = copy.deepcopy(state.actor.model.module)
    batch, stats = state.iterate(Clock())
    assert (
        stats["actor/first_ratio_error"] < 1e-5 and stats["actor/tensors_moved"] == stats["critic/tensors_moved"] == 1
    )
    log_pi = before(batch.get("observations")).log_softmax(-1).gather(-1, batch.input_ids[..., None])[..., 0]
    torch.testing.assert_close(batch.get("old_logprobs"), (log_pi * batch.action_mask).detach(), atol=1e-6, rtol=1e-5)
    assert state.step == 1 and stats["rollout/env_steps"] == batch.action_mask.sum()
    advantages = batch.get("advantages")[batch.action_mask]
    assert advantages.mean().abs() < 1e-5 and advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_each_iteration_draws_its_own_actions() -> None:
    """The policy hardly moves here and is nearly uniform, so two rollouts share half of their actions."""
    state = GymState(config(steps_per_rollout=200, actor_optimizer={"lr": 1e-6}))
    first, second = (state.iterate(Clock())[0].input_ids for _ in range(2))
    assert 0.3 < (first == second).float().mean() < 0.7


def test_returns_are_those_of_the_episodes_that_ended() -> None:
    state = GymState(config(steps_per_rollout=9))
    batch, stats = state.iterate(Clock())
    total = batch.get("rewards").sum().item()  # of two environments with three whole episodes each
    assert stats["episode/return"] == pytest.approx(total / 6) and stats["episode/length"] == 3
    assert stats["episode/finished"] == 6
    state = GymState(config(steps_per_rollout=2, algo={"minibatch_size": 4}))
    assert math.isnan(state.iterate(Clock())[1]["episode/return"])


# ---------------------------------------------------------------- runs


def lines(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "Walk-v0"])
@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
def test_a_run_that_was_cut_off_goes_on_bitwise(env: str, advantage: str, tmp_path: Path, monkeypatch: Any) -> None:
    algo = {"advantage": advantage}
    limit = {"max_episode_steps": 15}
    whole = train_gym(config(tmp_path / "whole", env, env=limit, algo=algo), reporter=QUIET)
    save = RunDirectory.save_checkpoint

    def save_and_die(self: Any, step: int, states: dict[str, Any]) -> Path:
        path = save(self, step, states)
        if step == 3:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(RunDirectory, "save_checkpoint", save_and_die)
    again = config(tmp_path / "cut", env, env=limit, algo=algo)
    with pytest.raises(KeyboardInterrupt):
        train_gym(again, reporter=QUIET)
    monkeypatch.setattr(RunDirectory, "save_checkpoint", save)
    resumed = train_gym(again, resume=True, reporter=QUIET)
    assert len(lines(tmp_path / "whole")) == whole["steps"] == 6
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert resumed["episode_return"] == whole["episode_return"]
    for role in ("actor", "critic") if advantage == "gae" else ("actor",):
        files = [(tmp_path / name / role / "model.safetensors").read_bytes() for name in ("whole", "cut")]
        assert files[0] == files[1]


def test_seeds_make_different_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        train_gym(config(tmp_path / str(seed), "CartPole-v1", run={"seed": seed}), reporter=QUIET)
    assert lines(tmp_path / "0") != lines(tmp_path / "1")


def test_every_metric_is_documented(tmp_path: Path) -> None:
    """docs/metrics.md has a row in its section of gym, or one in ppo's to which that section refers."""
    pages = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0]: part for part in re.split(r"^## ", pages, flags=re.MULTILINE)[1:]}
    own, actor, critic = (
        set(re.findall(r"^\| `([a-z_]+/[a-z0-9_]+)` \|", sections[title], re.MULTILINE))
        for title in ("gym", "ppo: the actor", "ppo: the critic")
    )
    names = {}
    for advantage in ("gae", "reinforce"):
        made = config(tmp_path / advantage, "CartPole-v1", env={"max_episode_steps": 20}, algo={"advantage": advantage})
        train_gym(made, reporter=QUIET)
        names[advantage] = {name for line in (tmp_path / advantage / "metrics.jsonl").read_text().splitlines()
                            for name in json.loads(line)} - {"step"}  # fmt: skip
    shared = (actor | critic) - {"actor/kl_loss", "actor/ptx_loss"}
    assert names["gae"] == own | shared
    assert names["gae"] - names["reinforce"] == critic | {"time/values", "time/update_critic"}


def test_the_command_runs_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--total-steps", "600", "--steps-per-rollout", "32", "--run.dir", str(tmp_path / "run")]
    assert main(["gym", *small]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 3 and summary["env_steps"] <= 3 * 8 * 32 and summary["episode_return"] > 5
    assert main(["gym", *small, "--resume"]) == 0
    capsys.readouterr()
    assert main(["gym", "--env.id", "CartPole-v9", "--run.dir", str(tmp_path / "other")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("pellucid: error: env.id CartPole-v9: ") and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algo": {"minibatch_size": 41}}, "algo.minibatch_size 41 is larger than a rollout of 40 steps"),
        ({"algo": {"kl_coef": 0.1}}, "algo.kl_coef 0.1: an environment has neither a reference model nor text"),
        ({"algo": {"ptx_coef": 0.1}}, "algo.ptx_coef 0.1: an environment has neither"),
        ({"algo": {"advantage": "grpo"}}, "gae"),
        ({"algo": {"dual_clip": 3.0, "policy_loss": "cispo"}}, "algo.dual_clip is part of"),
        ({"run": {"precision": "bfloat16"}}, "float32"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    tree = to_tree(config())
    for name, section in sections.items():
        tree[name] |= section
    with pytest.raises(ConfigError, match=message):
        load_config(GymConfig, None, [], tree)


# ---------------------------------------------------------------- it learns


def test_ppo_learns_cartpole(tmp_path: Path) -> None:
    """A random policy's return is about 20."""
    settings = {"num_epochs": 4, "minibatch_size": 256}
    made = config(tmp_path / "ppo", "CartPole-v1", env={"num_envs": 8}, total_steps=25_000, steps_per_rollout=64,
                  algo=settings, network={"hidden_sizes": [64, 64]}, actor_optimizer={"lr": 3e-3, "anneal": False},
                  run={"checkpoint_every": 0})  # fmt: skip
    assert train_gym(made, reporter=QUIET)["episode_return"] > 150


@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
def test_one_pass_learns_cartpole_too(advantage: str, tmp_path: Path) -> None:
    """A2C and REINFORCE: one optimizer step a rollout."""
    made = config(tmp_path / advantage, "CartPole-v1", env={"num_envs": 8, "max_episode_steps": 200}, total_steps=60_000,
                  steps_per_rollout=200,
                  algo={"num_epochs": 1, "minibatch_size": 1600, "advantage": advantage}, network={"hidden_sizes": [64, 64]},
                  actor_optimizer={"lr": 1e-2, "anneal": False}, run={"checkpoint_every": 0})  # fmt: skip
    assert train_gym(made, reporter=QUIET)["episode_return"] > 80
