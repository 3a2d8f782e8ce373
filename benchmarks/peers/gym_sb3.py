"""Stable-Baselines3's PPO in environments: as `gym_pellucid.py`, whose config's keys are taken for its own.

options: vectors, "dummy" or "subprocess", how it steps its environments.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import serve


@dataclass
class State:
    model: Any
    steps: int


def prepare(spec: dict[str, Any]) -> State:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    torch.set_num_threads(spec["threads"])
    workload = json.loads(Path(spec["workload"]).read_text())
    config = workload["config"]
    algo, env = config["algo"], config["env"]
    kind = {"dummy": DummyVecEnv, "subprocess": SubprocVecEnv}[spec["options"]["vectors"]]
    model = PPO(
        "MlpPolicy",
        make_vec_env(env["id"], env["num_envs"], seed=0, vec_env_cls=kind),
        learning_rate=config["actor_optimizer"]["lr"],
        n_steps=config["steps_per_rollout"],
        batch_size=algo["minibatch_size"],
        n_epochs=algo["num_epochs"],
        gamma=algo["gamma"],
        gae_lambda=algo["gae_lambda"],
        clip_range=0.2,
        max_grad_norm=0.5,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
        device="cpu",
        seed=0,
    )
    return State(model, workload["iterations"] * config["steps_per_rollout"] * env["num_envs"])


def measure(state: State) -> dict[str, Any]:
    before, started = state.model.num_timesteps, time.perf_counter()
    state.model.learn(state.steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": state.model.num_timesteps - before}


if __name__ == "__main__":
    serve(prepare, measure)
