"""Every role in this process: the actor shares its weights with the embedded engine, nothing is copied or sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pellucid.config import PPOConfig, RunConfig
from pellucid.data import locate
from pellucid.errors import ConfigError
from pellucid.execution.learner import fingerprint
from pellucid.execution.workers import ActorWorker, CriticWorker, ReferenceWorker, limits_of
from pellucid.files import atomic_directory
from pellucid.models import (
    CausalLM,
    Precision,
    ScalarModel,
    load_causal_lm,
    load_scalar_model,
    quiet_transformers,
    resolve_device,
    resolve_precision,
)
from pellucid.rewards import ModelReward, RewardSource
from pellucid.rollout import RolloutEngine, local_engine
from pellucid.types import derive_seed


@dataclass(frozen=True)
class Workers:
    """The four roles and the engine. critic is None where the advantage needs none."""

    actor: ActorWorker
    reference: ReferenceWorker
    critic: CriticWorker | None
    reward: RewardSource
    engine: RolloutEngine

    def trained(self, version: int) -> list[dict[str, Any]]:
        """For the record: the weights that training moves, after the update that made this version of them."""
        roles = {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})
        return [_weights(role, w.model, version, w.learner.fingerprint()) for role, w in roles.items()]

    def frozen(self) -> list[dict[str, Any]]:
        """The same for the weights that stay as they are. Reads all of them."""
        models: dict[str, CausalLM | ScalarModel] = {"reference": self.reference.model}
        if isinstance(self.reward, ModelReward):
            models["reward"] = self.reward.model
        return [_weights(role, model, 0, fingerprint(model.hf)) for role, model in models.items()]

    def state_dict(self) -> dict[str, Any]:
        critic = {"critic": self.critic.learner.state_dict()} if self.critic else {}
        return {"actor": self.actor.learner.state_dict()} | critic

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        self.actor.learner.load_state_dict(state["actor"])
        if self.critic:
            self.critic.learner.load_state_dict(state["critic"])
        self.engine.load_weights(None, version)


def _weights(role: str, model: CausalLM | ScalarModel, version: int, digits: str) -> dict[str, Any]:
    parameters = list(model.hf.parameters())
    return {
        "role": role,
        "version": version,
        "hash": digits,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "precision": model.precision,
    }


def prepare_process(run: RunConfig) -> tuple[str, Precision]:
    """Set the thread count, if one is asked for; resolve (device, precision)."""
    if run.threads:
        torch.set_num_threads(run.threads)
    device = resolve_device(run.device)
    return device, resolve_precision(run.precision, device)


def build_workers(config: PPOConfig, reward: RewardSource | None, pad_id: int, total_updates: int) -> Workers:
    """Load the models of a PPO run. reward: a reward function's source; None loads config.models.reward.

    Raises DataError when a model cannot be loaded, ConfigError when there is no reward or there are two.
    """
    device, precision = prepare_process(config.run)
    models, algo, rollout = config.models, config.algo, config.rollout
    if (reward is None) == (models.reward is None):
        found = "neither" if reward is None else "both"
        raise ConfigError(f"give models.reward or a reward function (reward.function); there is {found}")

    for role, path in models.model_dump().items():
        if path is not None:
            locate(path, f"models.{role}", ("config.json",))
    actor = load_causal_lm(models.actor, device, precision, algo.packing)
    reference = load_causal_lm(models.reference or models.actor, device, precision, algo.packing)
    if reward is None:
        scorer = load_scalar_model(str(models.reward), device, precision, pad_id)
        reward = ModelReward(scorer, config.reward.batch_size)
    critic = None
    if algo.advantage == "gae":
        start = models.critic or models.reward or models.actor
        seed = derive_seed(config.run.seed, "critic head")
        model = load_scalar_model(start, device, precision, pad_id, algo.packing, seed)
        critic = CriticWorker(model, algo, config.critic_optimizer, total_updates)
    return Workers(
        actor=ActorWorker(
            actor, rollout.temperature, algo, config.actor_optimizer, total_updates, rollout.max_new_tokens
        ),
        reference=ReferenceWorker(reference, rollout.temperature, limits_of(algo)),
        critic=critic,
        reward=reward,
        engine=local_engine(rollout.engine, actor.hf, rollout.num_slots, precision),
    )


def save_model(model: CausalLM | ScalarModel, tokenizer: Any, path: Path) -> None:
    """Hugging Face layout, the tokenizer beside the weights; the folder is whole or absent."""
    quiet_transformers()
    with atomic_directory(path) as folder:
        model.hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
