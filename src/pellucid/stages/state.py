"""Everything that an iteration of PPO needs, and what changes from one to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from pellucid.config import PPOConfig
from pellucid.core import AdaptiveKL, FixedKL
from pellucid.data import Loader
from pellucid.errors import DataError, IntegrityError
from pellucid.execution.local import Workers, build_workers
from pellucid.metrics import Reporter
from pellucid.rewards import FunctionReward, RewardSource, load_function
from pellucid.stages.checks import check_start
from pellucid.stages.clock import Clock
from pellucid.stages.inputs import (
    load_prompts,
    load_run_tokenizer,
    load_supervised,
    require_context,
    require_room,
    stop_ids,
)
from pellucid.stages.ppo import KLController, iterate, sampling_params
from pellucid.types import Batch, Prompt, Sample, StepStats, SupervisedBatch, derive_seed

RewardFunction = Callable[..., Any]


class PPOState:
    """The prompts, the workers and the controllers of a run, after `step` iterations. Reads files and writes none."""

    def __init__(
        self, config: PPOConfig, reward: RewardFunction | None, judge: RewardFunction | None, reporter: Reporter
    ) -> None:
        self.config, self.reporter = config, reporter
        self.step = 0
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
        self._require_served()
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

    def iterate(self, clock: Clock) -> tuple[Batch, list[Sample], StepStats]:
        """The next iteration, as `ppo.iterate` returns it, and the checks of the very first one."""
        step = self.step + 1
        params = sampling_params(self.config, step, self.stop_ids)
        prompts, ptx = next(self.loader), self._ptx_batches()
        try:
            batch, samples, stats = iterate(step, prompts, params, self.workers, self.kl, self.config, ptx, clock)
        except IntegrityError as error:
            raise IntegrityError(f"step {step}: {str(error).removeprefix(f'step {step}: ')}") from error
        if step == 1 and self.config.models.reference in (None, self.config.models.actor):
            check_start(batch.get("kl"), self.workers.actor.model.precision)
            self.reporter.say(
                f"first iteration: KL to the reference {stats['kl/sequence']:.1e}, log ratio before the first update "
                f"{stats['actor/first_ratio_error']:.1e}, engine against trainer {stats['rollout/parity_max']:.1e} nats"
            )
        self.step = step
        return batch, samples, stats

    def state_dict(self) -> dict[str, Any]:
        trainer = {
            "kl": self.kl.state_dict(),
            "loader": self.loader.state_dict(),
            "ptx": self.ptx.state_dict() if self.ptx else None,
        }
        return self.workers.state_dict() | {"trainer": trainer}

    def load_state_dict(self, states: dict[str, Any], step: int) -> None:
        trainer = states["trainer"]
        self.workers.load_state_dict(states, step)
        self.kl.load_state_dict(trainer["kl"])
        self.loader.load_state_dict(trainer["loader"])
        if self.ptx:
            self.ptx.load_state_dict(trainer["ptx"])
        self.step = step

    def _require_served(self) -> None:
        """Raises what could only be said at the first rollout, or the first evaluation, otherwise."""
        config, params = self.config, sampling_params(self.config, 0, self.stop_ids)
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
