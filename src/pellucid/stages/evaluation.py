"""Held-out prompts through the current policy: the score it is trained on, and a judge it is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.core import kl_estimate
from pellucid.execution.local import Workers
from pellucid.files import atomic_write
from pellucid.rewards import RewardSource
from pellucid.stages.scoring import raw_scores
from pellucid.types import Prompt, SamplingParams, StepStats, collate


@dataclass(frozen=True)
class Evaluation:
    """metrics: named eval/…; rows: one dict per sample, as written to eval/step-NNNNNN.jsonl."""

    metrics: StepStats
    rows: list[dict[str, Any]]


def evaluate(
    prompts: list[Prompt],
    params: SamplingParams,
    workers: Workers,
    judge: RewardSource | None,
    tokenizer: Any,
) -> Evaluation:
    """One sample per prompt, with the same seeds every time, so that evaluations differ by the policy alone."""
    samples = workers.engine.generate(prompts, params)
    scores = raw_scores(samples, workers.reward)
    batch = collate(samples, pad_id=0)
    logprobs, _ = workers.actor.logprobs(batch)
    ref_logprobs, _ = workers.reference.logprobs(batch)
    kl = (kl_estimate(logprobs, ref_logprobs, "k1") * batch.action_mask).sum(1)
    rows: list[dict[str, Any]] = [
        {
            "prompt": sample.prompt.text,
            "completion": tokenizer.decode(sample.response_ids, skip_special_tokens=True),
            "score": score,
            "kl": sequence_kl,
            "tokens": len(sample.response_ids),
            "stop_reason": sample.stop_reason,
        }
        for sample, score, sequence_kl in zip(samples, scores.tolist(), kl.tolist(), strict=True)
    ]
    metrics = {
        "eval/score": scores.mean().item(),
        "eval/kl": kl.mean().item(),
        "eval/length": sum(row["tokens"] for row in rows) / len(rows),
        "eval/stopped": sum(row["stop_reason"] == "stop" for row in rows) / len(rows),
    }
    if judge is not None:
        judged = raw_scores(samples, judge)
        metrics["eval/judge"] = judged.mean().item()
        rows = [row | {"judge": value} for row, value in zip(rows, judged.tolist(), strict=True)]
    return Evaluation(metrics, rows)


def write_rows(evaluation: Evaluation, run_dir: Path, step: int) -> None:
    path = run_dir / "eval" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.rows))


def read_rows(run_dir: Path, step: int) -> list[dict[str, Any]]:
    text = (run_dir / "eval" / f"step-{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines would cut at a U+2028 within a text
