"""Around the loop of `ppo.py`: load, resume, iterate, evaluate, checkpoint, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pellucid.checkpoint import RunDirectory
from pellucid.config import PPOConfig
from pellucid.core import AdaptiveKL, FixedKL
from pellucid.data import Loader
from pellucid.errors import ConfigError, DataError, IntegrityError
from pellucid.execution.local import Workers, build_workers, save_model
from pellucid.metrics import Metrics, Reporter, require_loggers
from pellucid.rewards import FunctionReward, RewardSource, load_function
from pellucid.stages.checks import check_start
from pellucid.stages.evaluation import Evaluation, evaluate, write_rows
from pellucid.stages.inputs import (
    load_prompts,
    load_run_tokenizer,
    load_supervised,
    require_context,
    require_room,
    stop_ids,
)
from pellucid.stages.ppo import KLController, iterate, sampling_params
from pellucid.types import Prompt, StepStats, SupervisedBatch, derive_seed

CONSOLE_COLUMNS = {
    "score/mean": "score", "kl/sequence": "kl", "policy/entropy": "entropy", "rollout/length": "length",
    "actor/clip_fraction": "clipped", "critic/explained_variance": "expl.var", "eval/score": "eval", "eval/judge": "judge",
}  # fmt: skip

RewardFunction = Callable[..., Any]


def train_ppo(
    config: PPOConfig,
    reward: RewardFunction | None = None,
    judge: RewardFunction | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run PPO to the end and return the summary (also in summary.json).

    reward: f(prompts, completions, **columns) -> list of floats, instead of config.reward.function or
    config.models.reward. judge: the same form, evaluated on held-out prompts and never trained on. resume: continue the
    run in config.run.dir from its newest whole checkpoint. Raises PellucidError for whatever a user can mend.
    """
    reporter = reporter or Reporter()
    directory = RunDirectory.open(config, resume, reporter.say)
    with directory.running():
        finished = directory.read_summary() if resume else None
        if finished:
            reporter.say(f"{directory.path}: already finished")
            return finished
        require_loggers(config.run.loggers)
        return _PPORun(config, reward, judge, directory, reporter).train(resume)


@dataclass
class _Position:
    """What changes from step to step beside the weights; saved in every checkpoint."""

    step: int = 0
    best: float = -math.inf
    seconds: float = 0.0


class _PPORun:
    def __init__(
        self,
        config: PPOConfig,
        reward: RewardFunction | None,
        judge: RewardFunction | None,
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        self.config, self.directory, self.reporter = config, directory, reporter
        self.tokenizer = load_run_tokenizer(config.models.actor, config.data)
        self.prompts = load_prompts(config.data, self.tokenizer, config.run.seed, reporter.say)
        self.eval_prompts = self._eval_prompts()
        self.judge = self._source(judge, config.eval.judge)
        updates_per_epoch = math.ceil(config.batch_size / config.algo.minibatch_size)
        self.workers: Workers = build_workers(
            config,
            self._source(reward, config.reward.function),
            self.tokenizer.pad_token_id,
            config.total_steps * config.algo.num_epochs * updates_per_epoch,
        )
        self.stop_ids = stop_ids(self.tokenizer, self.workers.actor.model)
        params = sampling_params(config, 0, self.stop_ids)
        for data, prompts in ((config.data, self.prompts), (config.eval_data, self.eval_prompts)):
            if data:
                require_room(prompts, params, self.workers.actor.model, data)
        if config.rollout.prompts_per_step > len(self.prompts):
            raise DataError(
                f"{config.data.source}: {len(self.prompts)} prompts are fewer than rollout.prompts_per_step "
                f"{config.rollout.prompts_per_step}; lower it and raise rollout.samples_per_prompt instead"
            )
        longest = sorted(self.prompts, key=lambda prompt: len(prompt.input_ids))[-config.rollout.prompts_per_step :]
        self.workers.engine.check(longest, params)
        self.loader: Loader[Prompt] = Loader(self.prompts, config.run.seed, config.rollout.prompts_per_step)
        self.ptx: Loader[Any] | None = None
        if config.ptx_data and config.algo.ptx_coef > 0:
            examples = load_supervised(config.ptx_data, self.tokenizer, config.run.seed, reporter.say)
            require_context([len(e.input_ids) for e in examples], self.workers.actor.model, config.ptx_data)
            self.ptx = Loader(examples, derive_seed(config.run.seed, "ptx"), config.algo.minibatch_size)
        algo = config.algo
        self.kl: KLController = (
            AdaptiveKL(algo.kl_coef, algo.kl_target, algo.kl_horizon) if algo.kl_target else FixedKL(algo.kl_coef)
        )
        self.position = _Position()

    # -- the run

    def train(self, resume: bool) -> dict[str, Any]:
        keep_bytes = self._resume() if resume else 0
        config, position = self.config, self.position  # after _resume, which makes a new position
        first_step = position.step + 1 if position.step else 0
        metrics = Metrics(self.directory.path, config.run.loggers, first_step, keep_bytes)
        started = time.perf_counter() - position.seconds
        try:
            if position.step == 0 and self.eval_prompts:
                metrics.log(0, self._evaluate(0))
            with self.reporter.progress("ppo", config.total_steps, position.step):
                while position.step < config.total_steps:
                    stats = self._step(position.step + 1)
                    position.step += 1
                    position.seconds = time.perf_counter() - started
                    metrics.log(position.step, stats)
                    self._show(position.step, stats)
                    if self._due(config.run.checkpoint_every) or position.step == config.total_steps:
                        self._checkpoint(metrics)
            return self._finish(time.perf_counter() - started)
        finally:
            metrics.close()

    def _step(self, step: int) -> StepStats:
        params = sampling_params(self.config, step, self.stop_ids)
        try:
            batch, _, stats = iterate(
                step, next(self.loader), params, self.workers, self.kl, self.config, self._ptx_batches()
            )
        except IntegrityError as error:
            raise IntegrityError(f"step {step}: {str(error).removeprefix(f'step {step}: ')}") from error
        if step == 1 and self.config.models.reference in (None, self.config.models.actor):
            check_start(batch.get("kl"), self.workers.actor.model.precision)
            self.reporter.say(
                f"first iteration: KL to the reference {stats['kl/sequence']:.1e}, log ratio before the first update "
                f"{stats['actor/first_ratio_error']:.1e}, engine against trainer {stats['rollout/parity_max']:.1e} nats"
            )
        if self._due(self.config.eval.every, step) or step == self.config.total_steps:
            stats |= self._evaluate(step)
        self._keep_best(stats)
        return stats

    def _evaluate(self, step: int) -> StepStats:
        if not self.eval_prompts:
            return {}
        params = replace(
            sampling_params(self.config, 0, self.stop_ids),
            samples_per_prompt=1,
            seed=derive_seed(self.config.run.seed, "evaluation"),
        )
        evaluation: Evaluation = evaluate(self.eval_prompts, params, self.workers, self.judge, self.tokenizer)
        best_metric = self.config.eval.best_metric
        if best_metric not in evaluation.metrics:
            raise ConfigError(
                f"eval.best_metric {best_metric!r} is not evaluated; there is {', '.join(evaluation.metrics)}"
            )
        write_rows(evaluation, self.directory.path, step)
        return evaluation.metrics

    def _keep_best(self, stats: StepStats) -> None:
        name = self.config.eval.best_metric
        if name in stats and stats[name] > self.position.best:
            self.position.best = stats[name]
            save_model(self.workers.actor.model, self.tokenizer, self.directory.path / "best")

    def _finish(self, seconds: float) -> dict[str, Any]:
        path = self.directory.path
        save_model(self.workers.actor.model, self.tokenizer, path / "actor")
        if self.workers.critic:
            save_model(self.workers.critic.model, self.tokenizer, path / "critic")
        summary = {
            "steps": self.position.step,
            "seconds": round(seconds, 1),
            "seed": self.config.run.seed,
            f"best {self.config.eval.best_metric}": self.position.best if math.isfinite(self.position.best) else None,
        }
        self.directory.write_summary(summary)
        self.reporter.say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; the policy is in {path / 'actor'}")
        return summary

    # -- checkpoints

    def _checkpoint(self, metrics: Metrics) -> None:
        position = self.position
        trainer = {
            "kl": self.kl.state_dict(),
            "loader": self.loader.state_dict(),
            "ptx": self.ptx.state_dict() if self.ptx else None,
            "best": position.best,
            "seconds": position.seconds,
            "metrics_bytes": metrics.size(),
        }
        self.directory.save_checkpoint(position.step, self.workers.state_dict() | {"trainer": trainer})

    def _resume(self) -> int:
        """Restore the newest whole checkpoint; returns the bytes of metrics.jsonl that it had seen."""
        found = self.directory.newest_checkpoint()
        if found is None:
            return 0
        step, states = found
        trainer = states.pop("trainer")
        self.workers.load_state_dict(states, step)
        self.kl.load_state_dict(trainer["kl"])
        self.loader.load_state_dict(trainer["loader"])
        if self.ptx:
            self.ptx.load_state_dict(trainer["ptx"])
        self.position = _Position(step, trainer["best"], trainer["seconds"])
        self.reporter.say(f"resuming after step {step}")
        return trainer["metrics_bytes"]

    # -- small things

    def _due(self, every: int, step: int | None = None) -> bool:
        return every > 0 and (step or self.position.step) % every == 0

    def _eval_prompts(self) -> list[Prompt]:
        if self.config.eval_data is None:
            return []
        prompts = load_prompts(self.config.eval_data, self.tokenizer, self.config.run.seed, self.reporter.say)
        return prompts[: self.config.eval.num_prompts]

    def _source(self, function: RewardFunction | None, spec: str | None) -> RewardSource | None:
        function = function or (load_function(spec) if spec else None)
        return FunctionReward(function, self.tokenizer) if function else None

    def _ptx_batches(self) -> Iterator[SupervisedBatch] | None:
        from pellucid.stages.supervised import collate_examples

        return (collate_examples(examples) for examples in self.ptx) if self.ptx else None

    def _show(self, step: int, stats: StepStats) -> None:
        self.reporter.advance()
        shown = {title: stats.get(name, math.nan) for name, title in CONSOLE_COLUMNS.items() if self._has(name)}
        seconds = sum(value for name, value in stats.items() if name.startswith("time/"))
        self.reporter.row(step, shown | {"seconds": seconds})

    def _has(self, name: str) -> bool:
        if name.startswith("critic/"):
            return self.workers.critic is not None
        return bool(self.eval_prompts) if name == "eval/score" else name != "eval/judge" or self.judge is not None
