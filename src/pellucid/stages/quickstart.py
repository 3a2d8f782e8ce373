"""The whole road on the built-in corpus: a small model from scratch, SFT, reward model, PPO, and a verdict.

The run directory is PPO's; sft/ and rm/ inside it are the run directories of the stages before. The verdict comes from
the corpus's gold preference, which no stage was trained on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pellucid.config import (
    AlgoConfig,
    DataConfig,
    LearnConfig,
    ModelsConfig,
    NewModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEvalConfig,
    QuickstartConfig,
    RMConfig,
    RolloutConfig,
    SFTConfig,
    TraceConfig,
)
from pellucid.data import gold_score
from pellucid.files import atomic_directory, atomic_write
from pellucid.metrics import Reporter
from pellucid.stages.evaluation import read_rows
from pellucid.stages.run import train_ppo
from pellucid.stages.supervised import train_rm, train_sft

MAX_NEW_TOKENS = 56


def quickstart(config: QuickstartConfig, resume: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run the three stages; return the summary, also in summary.json.

    reward_model_accuracy: share of held-out pairs on which the reward model agrees with the gold preference.
    gold_win_rate: share of held-out prompts on which the gold preference puts the trained policy's text above the SFT
    policy's, ties counting half. kl_per_sequence: nats from the SFT policy, on those texts. seconds, seed.
    """
    reporter = reporter or Reporter()
    run_dir = config.run.dir
    sft, rm, ppo = stage_configs(config)

    reporter.title("1 of 3 · supervised fine-tuning: a new model learns to write")
    sft_summary = train_sft(sft, resume, reporter)
    reporter.title("2 of 3 · reward model: from preference pairs to one score")
    rm_summary = train_rm(rm, resume, reporter)
    _copy(rm.run.dir / "reward_model", run_dir / "reward_model")
    reporter.title("3 of 3 · PPO: the policy learns what is preferred")
    ppo_summary = train_ppo(ppo, judge=gold_judge, resume=resume, reporter=reporter)

    before, after = read_rows(run_dir, 0), read_rows(run_dir, ppo.total_steps)
    ppo_seconds = ppo_summary.get("ppo_seconds", ppo_summary["seconds"])  # a finished quickstart gives back its own sum
    summary = ppo_summary | {
        "reward_model_accuracy": rm_summary["eval/accuracy"],
        "gold_win_rate": win_rate([row["judge"] for row in after], [row["judge"] for row in before]),
        "kl_per_sequence": sum(row["kl"] for row in after) / len(after),
        "ppo_seconds": ppo_seconds,
        "seconds": round(sft_summary["seconds"] + rm_summary["seconds"] + ppo_seconds, 1),
        "seed": config.run.seed,
    }
    atomic_write(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    _show(summary, before, after, config, reporter)
    return summary


def stage_configs(config: QuickstartConfig) -> tuple[SFTConfig, RMConfig, PPOConfig]:
    """The three stages as ordinary configs: each run directory holds its own as config.toml, to copy and change."""
    run = config.run
    context = 128
    sft = SFTConfig(
        run=run.model_copy(update={"dir": run.dir / "sft", "checkpoint_every": 100}),
        new_model=NewModelConfig(
            vocab_size=768, hidden_size=128, num_layers=3, num_heads=4, intermediate_size=344, context=context
        ),
        data=DataConfig(source="corpus:sft", max_tokens=context),
        learn=LearnConfig(max_steps=config.sft_steps, batch_size=64, micro_batch_size=64, eval_every=0),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20),
    )
    rm = RMConfig(
        run=run.model_copy(update={"dir": run.dir / "rm", "checkpoint_every": 100}),
        model=str(sft.run.dir / "actor"),
        data=DataConfig(source="corpus:preferences", max_tokens=context),
        eval_data=DataConfig(source="corpus:preferences_heldout", max_tokens=context),
        learn=LearnConfig(max_steps=config.rm_steps, batch_size=64, micro_batch_size=64, eval_every=0),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10),
        center_data=DataConfig(source="corpus:prompts", max_tokens=context),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    ppo = PPOConfig(
        run=run,
        models=ModelsConfig(actor=rm.model, reward=str(run.dir / "reward_model")),
        data=DataConfig(source="corpus:prompts", max_tokens=context),
        eval_data=DataConfig(source="corpus:prompts_heldout", max_tokens=context),
        total_steps=config.ppo_steps,
        rollout=RolloutConfig(
            prompts_per_step=64, max_new_tokens=MAX_NEW_TOKENS, num_slots=64, missing_eos_penalty=3.0
        ),
        algo=AlgoConfig(num_epochs=2, minibatch_size=32, micro_batch_size=32, kl_coef=0.1),
        eval=PPOEvalConfig(every=7, num_prompts=128),
        trace=TraceConfig(alternatives=4),
        actor_optimizer=OptimizerConfig(lr=3e-4),
        critic_optimizer=OptimizerConfig(lr=1e-3),
    )
    return sft, rm, ppo


def gold_judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The corpus's hidden preference, as a judge."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """Share of pairs in which ours is higher; a tie counts half."""
    return sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        with atomic_directory(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)


def _show(
    summary: dict[str, Any],
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    config: QuickstartConfig,
    reporter: Reporter,
) -> None:
    rows = [
        [
            a["prompt"].strip(),
            f"{b['completion'].strip()}\n\ngold {b['judge']:.2f}",
            f"{a['completion'].strip()}\n\ngold {a['judge']:.2f}",
        ]
        for b, a in list(zip(before, after, strict=True))[:3]
    ]
    reporter.title("Held-out prompts, before and after")
    reporter.table("", ["prompt", "after SFT", "after PPO"], rows)
    reporter.say(
        f"\nreward model agrees with the gold preference on {summary['reward_model_accuracy']:.1%} of held-out pairs\n"
        f"PPO's text beats SFT's on {summary['gold_win_rate']:.1%} of held-out prompts, by the gold preference\n"
        f"KL from the SFT policy: {summary['kl_per_sequence']:.1f} nats per sequence\n"
        f"{summary['seconds']:.0f} s, seed {summary['seed']}\n"
        f"run directory: {config.run.dir}"
    )
