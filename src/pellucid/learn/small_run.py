"""Plumbing of chapters 7 and 8: a small policy and reward model on the built-in corpus, PPO over them, and its record."""

from __future__ import annotations

import time
from pathlib import Path

from pellucid.config import PPOConfig, QuickstartConfig, RunConfig
from pellucid.data import token_bytes
from pellucid.learn.lesson import Lesson
from pellucid.metrics import Reporter
from pellucid.stages.clock import Clock
from pellucid.stages.quickstart import stage_configs
from pellucid.stages.state import PPOState
from pellucid.stages.supervised import train_rm, train_sft
from pellucid.trace.record import Recorder, Vocabulary, step_spans

QUIET = Reporter(quiet=True)


def small_run(lesson: Lesson, folder: Path, sft_steps: int, rm_steps: int, ppo_steps: int, pairs: int = 0) -> PPOConfig:
    """Train both models as the quickstart does, in float32, and return the config of its third stage.

    pairs: preference pairs that the reward model may learn from; 0 takes all 4,000. The models lie in folder, and must stay
    there as long as the config is used.
    """
    run = RunConfig(dir=folder, seed=lesson.seed, device="cpu", precision="float32", checkpoint_every=0)
    steps = QuickstartConfig(run=run, sft_steps=sft_steps, rm_steps=rm_steps, ppo_steps=ppo_steps)
    sft, rm, ppo = stage_configs(steps)
    rm = rm.model_copy(update={"data": rm.data.model_copy(update={"limit": pairs})})
    with lesson.progress("policy and reward model", 2) as advance:
        train_sft(sft, reporter=QUIET)
        advance()
        train_rm(rm, reporter=QUIET)
        advance()
    models = ppo.models.model_copy(update={"reward": str(rm.run.dir / "reward_model")})
    return ppo.model_copy(update={"models": models})


def recorded_iterations(lesson: Lesson, config: PPOConfig, folder: Path) -> list[float]:
    """All iterations of the config, each with its record in folder. Returns the wall seconds of each iteration, by a clock
    outside of it."""
    state, walls = PPOState(config, None, None, QUIET), []
    folder.mkdir(exist_ok=True)
    vocabulary = Vocabulary(token_bytes(state.tokenizer), frozenset(state.tokenizer.all_special_ids))
    recorder = Recorder(folder, config, vocabulary, state.workers.actor.model.device)
    with lesson.progress("iterations", config.total_steps) as advance:
        for step in range(1, config.total_steps + 1):
            clock, began = Clock(), time.perf_counter()
            batch, samples, stats = state.iterate(clock)
            walls.append(time.perf_counter() - began)
            recorder.record(step, batch, samples, stats, state.workers.trained(step) + state.workers.frozen())
            recorder.spans.append(step, step_spans(clock.phases, batch, config.algo.num_epochs))
            advance()
    return walls
