"""Around the loop of `ppo.py`: resume, iterate, evaluate, record, checkpoint, save."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from pellucid.checkpoint import RunDirectory
from pellucid.config import PPOConfig
from pellucid.data import token_bytes
from pellucid.errors import ConfigError
from pellucid.execution.local import save_model
from pellucid.metrics import Metrics, Reporter, require_loggers
from pellucid.stages.clock import Clock
from pellucid.stages.evaluation import Evaluation, evaluate, write_rows
from pellucid.stages.ppo import sampling_params
from pellucid.stages.state import PPOState, RewardFunction
from pellucid.trace.record import Recorder, Vocabulary, step_spans
from pellucid.types import StepStats, derive_seed

CONSOLE_COLUMNS = {
    "score/mean": "score", "kl/sequence": "kl", "policy/entropy": "entropy", "rollout/length": "length",
    "actor/clip_fraction": "clipped", "critic/explained_variance": "expl.var", "eval/score": "eval", "eval/judge": "judge",
}  # fmt: skip


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
        return _PPORun(PPOState(config, reward, judge, reporter), directory, reporter).train(resume)


class _PPORun:
    """A run in its directory. best and seconds are its own beside the state: the best evaluation, and the time so far."""

    def __init__(self, state: PPOState, directory: RunDirectory, reporter: Reporter) -> None:
        self.state, self.directory, self.reporter = state, directory, reporter
        self.config, self.workers = state.config, state.workers
        self.best, self.seconds = -math.inf, 0.0
        self.recorder: Recorder | None = None
        self.frozen = self.workers.frozen() if self.config.trace.record else []

    def train(self, resume: bool) -> dict[str, Any]:
        keep_bytes = self._resume() if resume else 0
        config, state = self.config, self.state
        metrics = Metrics(self.directory.path, config.run.loggers, state.step + 1 if state.step else 0, keep_bytes)
        if config.trace.record:
            device = self.workers.actor.model.device
            vocabulary = Vocabulary(token_bytes(state.tokenizer), frozenset(state.tokenizer.all_special_ids))
            self.recorder = Recorder(self.directory.path, config, vocabulary, device, state.step)
        started = time.perf_counter() - self.seconds
        try:
            if state.step == 0 and state.eval_prompts:
                metrics.log(0, self._evaluate(0))
            with self.reporter.progress("ppo", config.total_steps, state.step):
                while state.step < config.total_steps:
                    stats = self._step()
                    self.seconds = time.perf_counter() - started
                    metrics.log(state.step, stats)
                    self._show(state.step, stats)
                    if self._due(config.run.checkpoint_every):
                        self._checkpoint(metrics)
            return self._finish(time.perf_counter() - started)
        finally:
            metrics.close()

    def _step(self) -> StepStats:
        clock = Clock()
        batch, samples, stats = self.state.iterate(clock)
        step = self.state.step
        if self.recorder and self.recorder.due(step):
            weights = self.workers.trained(step) + self.frozen
            clock("record", self.recorder.record, step, batch, samples, stats, weights)
        if self.state.eval_prompts and self._due(self.config.eval.every):
            stats |= clock("evaluate", self._evaluate, step)
        if self.recorder:
            self.recorder.spans.append(step, step_spans(clock.phases, batch, self.config.algo.num_epochs))
        self._keep_best(stats)
        return stats | clock.metrics()

    def _evaluate(self, step: int) -> StepStats:
        state = self.state
        params = replace(
            sampling_params(self.config, 0, state.stop_ids),
            samples_per_prompt=1,
            seed=derive_seed(self.config.run.seed, "evaluation"),
        )
        evaluation: Evaluation = evaluate(state.eval_prompts, params, self.workers, state.judge, state.tokenizer)
        best_metric = self.config.eval.best_metric
        if best_metric not in evaluation.metrics:
            raise ConfigError(
                f"eval.best_metric {best_metric!r} is not evaluated; there is {', '.join(evaluation.metrics)}"
            )
        write_rows(evaluation, self.directory.path, step)
        return evaluation.metrics

    def _keep_best(self, stats: StepStats) -> None:
        name = self.config.eval.best_metric
        if name in stats and stats[name] > self.best:
            self.best = stats[name]
            save_model(self.workers.actor.model, self.state.tokenizer, self.directory.path / "best")

    def _finish(self, seconds: float) -> dict[str, Any]:
        path, tokenizer = self.directory.path, self.state.tokenizer
        save_model(self.workers.actor.model, tokenizer, path / "actor")
        if self.workers.critic:
            save_model(self.workers.critic.model, tokenizer, path / "critic")
        summary = {
            "steps": self.state.step,
            "seconds": round(seconds, 1),
            "seed": self.config.run.seed,
            f"best {self.config.eval.best_metric}": self.best if math.isfinite(self.best) else None,
        }
        self.directory.write_summary(summary)
        self.reporter.say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; the policy is in {path / 'actor'}")
        return summary

    # -- checkpoints

    def _checkpoint(self, metrics: Metrics) -> None:
        clock, step, states = Clock(), self.state.step, self.state.state_dict()
        states["trainer"] |= {"best": self.best, "seconds": self.seconds, "metrics_bytes": metrics.size()}
        clock("checkpoint", self.directory.save_checkpoint, step, states)
        if self.recorder:
            self.recorder.spans.append(step, step_spans(clock.phases))

    def _resume(self) -> int:
        """Restore the newest whole checkpoint; returns the bytes of metrics.jsonl that it had seen."""
        found = self.directory.newest_checkpoint()
        if found is None:
            return 0
        step, states = found
        self.state.load_state_dict(states, step)
        trainer = states["trainer"]
        self.best, self.seconds = trainer["best"], trainer["seconds"]
        self.reporter.say(f"resuming after step {step}")
        return trainer["metrics_bytes"]

    # -- small things

    def _due(self, every: int) -> bool:
        """At every every-th step, 0 meaning never, and at the last."""
        step = self.state.step
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def _show(self, step: int, stats: StepStats) -> None:
        self.reporter.advance()
        shown = {title: stats.get(name, math.nan) for name, title in CONSOLE_COLUMNS.items() if self._has(name)}
        seconds = sum(value for name, value in stats.items() if name.startswith("time/"))
        self.reporter.row(step, shown | {"seconds": seconds})

    def _has(self, name: str) -> bool:
        if name.startswith("critic/"):
            return self.workers.critic is not None
        return (
            bool(self.state.eval_prompts)
            if name == "eval/score"
            else name != "eval/judge" or self.state.judge is not None
        )
