"""Policy gradients in environments: REINFORCE, A2C and PPO are one loop, and its parts are those of `ppo.py`.

    environments ─▶ policy, step by step ─▶ batch (N environments × T steps)
         ▲                                    ├─▶ critic ─▶ old_values, bootstrap_values ─▶ advantages, returns
         │                                    │                                               │
         │                                    └───────────────── every step a row ◀───────────┤
         └── new weights ◀── actor: clipped loss ◀── num_epochs × minibatches ◀───────────────┤
                             critic: value loss  ◀── num_epochs × minibatches ◀───────────────┘

PPO goes over a rollout several times. A2C goes once, all of it in one minibatch. REINFORCE is A2C without a critic: its
advantages are discounted returns. In one pass the ratio is 1, and there the gradient of the clipped loss is that of
-A * log π.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pellucid.checkpoint import RunDirectory
from pellucid.config import AlgoConfig, GymConfig
from pellucid.core import discounted_returns, explained_variance, masked_mean, masked_whiten
from pellucid.errors import ConfigError, DataError, IntegrityError
from pellucid.execution.local import prepare_process
from pellucid.execution.workers import ActorWorker, CriticWorker
from pellucid.metrics import Metrics, Reporter, require_loggers
from pellucid.models import MLPPolicy, MLPValue
from pellucid.rollout.gym import Rollout, collect, make_environments
from pellucid.stages.advantages import ADVANTAGES, Made
from pellucid.stages.checks import old_logprobs
from pellucid.stages.clock import Clock
from pellucid.types import Batch, StepStats, derive_seed, transitions


def reinforce(batch: Batch, algo: AlgoConfig) -> Made:
    """Discounted returns, whitened if asked. A row may hold several episodes."""
    mask = batch.action_mask
    returns = discounted_returns(batch.get("rewards"), mask, batch.ended, batch.bootstrap_values, algo.gamma)
    return {"advantages": masked_whiten(returns, mask) if algo.whiten_advantages else returns}


GYM_ADVANTAGES: dict[str, Callable[[Batch, AlgoConfig], Made]] = {"gae": ADVANTAGES["gae"], "reinforce": reinforce}
RECENT = 100
"""Episodes that episode/return and episode/length are means of."""
CONSOLE_COLUMNS = {
    "rollout/env_steps": "env steps", "episode/return": "return", "episode/length": "length", "policy/entropy": "entropy",
    "actor/clip_fraction": "clipped", "critic/explained_variance": "expl.var",
}  # fmt: skip


def train_gym(config: GymConfig, resume: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train to the end and return the summary (also in summary.json); the policy ends in run.dir/actor.

    resume: continue the run in config.run.dir from its newest whole checkpoint. Raises PellucidError for whatever a user
    can mend.
    """
    reporter = reporter or Reporter()
    directory = RunDirectory.open(config, resume, reporter.say)
    with directory.running():
        finished = directory.read_summary() if resume else None
        if finished:
            reporter.say(f"{directory.path}: already finished")
            return finished
        require_loggers(config.run.loggers)
        state = GymState(config)
        try:
            return _train(state, directory, reporter, resume)
        except IntegrityError as error:
            raise IntegrityError(
                f"step {state.step + 1}: {str(error).removeprefix(f'step {state.step + 1}: ')}"
            ) from error


class GymState:
    """Environments and workers after `step` iterations. episodes: (return, length) of the RECENT that ended last."""

    def __init__(self, config: GymConfig) -> None:
        device, _ = prepare_process(config.run)
        self.config, self.step, self.env_steps = config, 0, 0
        seed, algo, hidden = config.run.seed, config.algo, config.network.hidden_sizes
        self.environments = make_environments(config.env, derive_seed(seed, "environments"))
        _require_whole_episodes(config, self.environments.limit)
        size, num_actions = self.environments.observation_size, self.environments.num_actions
        updates = config.iterations * algo.num_epochs * math.ceil(config.batch_size / algo.minibatch_size)
        policy = MLPPolicy(size, hidden, num_actions, derive_seed(seed, "actor"), device)
        self.actor = ActorWorker(policy, 1.0, algo, config.actor_optimizer, updates, max_new_tokens=1)
        self.critic: CriticWorker | None = None
        if algo.advantage == "gae":
            value = MLPValue(size, hidden, derive_seed(seed, "critic"), device)
            self.critic = CriticWorker(value, algo, config.critic_optimizer, updates)
        self.episodes: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def iterate(self, clock: Clock) -> tuple[Batch, StepStats]:
        """One iteration: a rollout and num_epochs passes over it. Returns the batch (N,T) with its advantages, and metrics.

        Raises IntegrityError when an invariant breaks, DataError when an environment does not do what it must.
        """
        config, algo, step = self.config, self.config.algo, self.step + 1
        seed = derive_seed(config.run.seed, "minibatches", step)

        rollout = clock("collect", self._collect, step)
        batch = rollout.batch
        batch = batch.having(**clock("old_logprobs", old_logprobs, batch, self.actor, algo, step))
        if self.critic:
            batch = clock("values", with_values, rollout, batch, self.critic)
        else:
            batch = finished(batch)
        batch = batch.having(**GYM_ADVANTAGES[algo.advantage](batch, algo))

        rows = transitions(batch)
        critic_stats = clock("update_critic", self.critic.update, rows, seed)[0] if self.critic else {}
        actor_stats, _ = clock("update_actor", self.actor.update, rows, 0.0, seed)

        self.step, self.env_steps = step, self.env_steps + int(rollout.batch.action_mask.sum())
        self.episodes += rollout.episodes
        return batch, self._metrics(batch, len(rollout.episodes)) | actor_stats | critic_stats | clock.metrics()

    def _collect(self, step: int) -> Rollout:
        seed = derive_seed(self.config.run.seed, "rollout", step)
        return collect(self.environments, self.actor.model, self.config.steps_per_rollout, seed, version=step - 1)

    def _metrics(self, batch: Batch, num_finished: int) -> StepStats:
        mask = batch.action_mask
        lasts = list(zip(*self.episodes, strict=True)) or [(), ()]
        stats = {
            "episode/return": sum(lasts[0]) / len(lasts[0]) if lasts[0] else math.nan,
            "episode/length": sum(lasts[1]) / len(lasts[1]) if lasts[1] else math.nan,
            "episode/finished": float(num_finished),
            "rollout/env_steps": float(self.env_steps),
            "advantages/abs": masked_mean(batch.get("advantages").abs(), mask).item(),
        }
        if batch.entropy is not None:
            stats["policy/entropy"] = masked_mean(batch.entropy, mask).item()
        if batch.old_values is not None:
            values, returns = batch.old_values, batch.get("returns")
            stats |= {
                "critic/value": masked_mean(values, mask).item(),
                "critic/return": masked_mean(returns, mask).item(),
                "critic/explained_variance": explained_variance(values, returns, mask).item(),
            }
        return stats

    def state_dict(self) -> dict[str, Any]:
        critic = {"critic": self.critic.learner.state_dict()} if self.critic else {}
        trainer = {
            "environments": self.environments.state_dict(),
            "episodes": list(self.episodes),
            "env_steps": self.env_steps,
        }
        return {"actor": self.actor.learner.state_dict(), "trainer": trainer} | critic

    def load_state_dict(self, states: dict[str, Any], step: int) -> None:
        self.actor.learner.load_state_dict(states["actor"])
        if self.critic:
            self.critic.learner.load_state_dict(states["critic"])
        trainer = states["trainer"]
        self.environments.load_state_dict(trainer["environments"])
        self.episodes = deque(trainer["episodes"], maxlen=RECENT)
        self.step, self.env_steps = step, trainer["env_steps"]


def _require_whole_episodes(config: GymConfig, limit: int | None) -> None:
    """Without a critic, a policy that learns to live longer than a rollout would leave nothing to learn from."""
    if config.algo.advantage == "reinforce" and limit is not None and config.steps_per_rollout < limit:
        raise ConfigError(
            f"steps_per_rollout {config.steps_per_rollout}: algo.advantage 'reinforce' needs whole episodes, and those of "
            f"{config.env.id} have up to {limit} steps; raise it to that, or lower env.max_episode_steps"
        )


@torch.no_grad()
def with_values(rollout: Rollout, batch: Batch, critic: CriticWorker) -> Batch:
    """old_values, and bootstrap_values: 0 where the episode terminated; V(the observation after) where it was truncated, and
    in the last column where it goes on."""
    wanted = batch.ended.clone()
    wanted[:, -1] = True
    wanted &= ~rollout.terminated
    bootstrap = torch.zeros_like(batch.bootstrap_values)
    bootstrap[wanted] = critic.model.values(rollout.after[wanted].to(critic.model.device)).cpu()
    return replace(batch, bootstrap_values=bootstrap).having(old_values=critic.values(batch))


def finished(batch: Batch) -> Batch:
    """The steps whose episode ends within the rollout. Without a critic nothing stands in for rewards yet to come, so the
    others have no return. A truncated episode counts as ended. Raises DataError when no episode ends."""
    ends_later = batch.ended.flip(1).cummax(1).values.flip(1)
    if not ends_later.any():
        raise DataError(
            f"no episode ended within a rollout of {batch.ended.shape[1]} steps, and REINFORCE needs whole returns; "
            "raise steps_per_rollout, or use algo.advantage = 'gae'"
        )
    return replace(batch, action_mask=batch.action_mask & ends_later)


# ---------------------------------------------------------------- around the loop


def _train(state: GymState, directory: RunDirectory, reporter: Reporter, resume: bool) -> dict[str, Any]:
    config = state.config
    seconds, keep_bytes = _resume(state, directory, reporter) if resume else (0.0, 0)
    metrics = Metrics(directory.path, config.run.loggers, state.step + 1, keep_bytes)
    started = time.perf_counter() - seconds
    try:
        with reporter.progress("gym", config.iterations, state.step):
            while state.step < config.iterations:
                _, stats = state.iterate(Clock())
                metrics.log(state.step, stats)
                reporter.advance()
                if _due(state, max(1, config.iterations // 20)):
                    reporter.row(
                        state.step, {title: stats[name] for name, title in CONSOLE_COLUMNS.items() if name in stats}
                    )
                if _due(state, config.run.checkpoint_every):
                    states = state.state_dict()
                    states["trainer"] |= {"seconds": time.perf_counter() - started, "metrics_bytes": metrics.size()}
                    directory.save_checkpoint(state.step, states)
    finally:
        metrics.close()
    return _finish(state, directory, reporter, time.perf_counter() - started)


def _due(state: GymState, every: int) -> bool:
    return state.step == state.config.iterations or (every > 0 and state.step % every == 0)


def _resume(state: GymState, directory: RunDirectory, reporter: Reporter) -> tuple[float, int]:
    """Restore the newest whole checkpoint. Returns the run's seconds until there, and the bytes of metrics.jsonl."""
    found = directory.newest_checkpoint()
    if found is None:
        return 0.0, 0
    step, states = found
    state.load_state_dict(states, step)
    reporter.say(f"resuming after step {step}")
    return states["trainer"]["seconds"], states["trainer"]["metrics_bytes"]


def _finish(state: GymState, directory: RunDirectory, reporter: Reporter, seconds: float) -> dict[str, Any]:
    path = directory.path
    state.actor.model.save(path / "actor")
    if state.critic:
        state.critic.model.save(path / "critic")
    returns = [total for total, _ in state.episodes]
    summary = {
        "steps": state.step,
        "env_steps": state.env_steps,
        "seconds": round(seconds, 1),
        "seed": state.config.run.seed,
        "episode_return": round(sum(returns) / len(returns), 4) if returns else None,
    }
    directory.write_summary(summary)
    reporter.say(f"{summary['env_steps']} environment steps in {seconds:.0f} s; the policy is in {path / 'actor'}")
    return summary
