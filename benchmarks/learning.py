"""Learning per sample: the same small task, hyper-parameters, weights and prompts, by Pellucid's PPO and by TRL's.

    python -m benchmarks.learning                          writes benchmarks/results/learning.json
    python -m benchmarks.learning --seeds 3 --json other.json
    python -m benchmarks.learning --tiny                   seconds, Pellucid alone; writes nothing unless told to

Speed is not compared here. What is compared is the mean score of each iteration's samples, after the same number of samples.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.environments import python_of
from benchmarks.figures import case, finish
from benchmarks.harness import BenchmarkError, Contestant, Outcome, main

SHAPE = shapes.Shape(
    "learning", vocab_size=64, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=192, context=64
)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 8, 16
ITERATIONS, LAST = 30, 5
"""Iterations of PROMPTS samples; the result of a seed is the mean score of the last ones."""
PELLUCID, TRL = "pellucid", "trl 1.12"
ALGO = {
    "num_epochs": 4,
    "minibatch_size": 16,
    "lr": 1e-3,
    "beta2": 0.999,
    "max_grad_norm": 1e9,  # TRL's PPO clips no gradient
    "clip_eps": 0.2,
    "value_clip_eps": 0.2,
    "kl_coef": 0.02,
    "gamma": 1.0,
    "gae_lambda": 0.95,
}
NOTES = [
    f"The task: {PROMPT_TOKENS} random tokens, {NEW_TOKENS} new ones, and the score is the share of new tokens "
    "whose id is even; a random policy has a half. A two-layer Llama of random weights, trained by PPO alone.",
    "The same in both: initial weights of actor, reference and critic; prompts of every iteration; epochs, minibatches, "
    "learning rate (constant), Adam's betas and epsilon, clip ranges, KL penalty (k1, in the reward), gamma, lambda, "
    "temperature. Neither clips gradients, because TRL does not.",
    "Different by construction: random numbers; TRL whitens advantages with the unbiased variance and divides logits by the "
    "temperature plus 1e-7; it adds policy and value loss under one optimizer, which Adam does not feel.",
    f"The bar: the mean over seeds of the last {LAST} iterations' score is not below TRL's by more than two standard errors "
    "of the difference.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    described = machine.describe(options.threads)
    workload = make_workload(options.seeds, 2 if options.tiny else ITERATIONS)
    outcome = train_in_turn(_contestants(options, workload), workload)
    scores = {name: [run["scores"] for run in runs] for name, runs in outcome.runs.items()}
    bars = [learning_bar(scores)]
    made = case(describe(workload), outcome)
    for name, curves in scores.items():
        made["contestants"][name]["final_scores"] = [round(final(curve), 4) for curve in curves]
        made["contestants"][name]["scores"] = [[round(score, 4) for score in curve] for curve in curves]
    kept = {"notes": NOTES, "hyperparameters": ALGO, "tables": [curve_table(scores)]}
    finish("learning", options, bars, cases={"even tokens": made}, machine=described, **kept)


def train_in_turn(contestants: list[Contestant], workload: dict[str, Any]) -> Outcome:
    """Every seed by every contestant. No warm-up: each run is another seed."""
    outcome = Outcome(runs={c.name: [] for c in contestants})
    try:
        for task in workload["seeds"]:
            for contestant in contestants:
                run = contestant.run()
                _check(contestant.name, run, workload)
                outcome.runs[contestant.name].append(run)
                outcome.versions[contestant.name] = contestant.versions
                print(
                    f"seed {task['seed']}: {contestant.name} ends at {final(run['scores']):.3f}, {run['seconds']:.0f} s"
                )
    finally:
        for contestant in contestants:
            contestant.close()
    return outcome


def make_workload(seeds: int, iterations: int) -> dict[str, Any]:
    """For each seed its models and the prompts of every iteration; token ids from 3 on, which no tokenizer holds special."""
    tasks = []
    for seed in range(seeds):
        chance = random.Random(seed)
        batches = [
            [[chance.randrange(3, SHAPE.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
            for _ in range(iterations)
        ]
        actor, critic = shapes.policy(SHAPE, seed), shapes.scalar(SHAPE, 1000 + seed)
        tasks.append({"seed": seed, "actor": str(actor), "critic": str(critic), "batches": batches})
    return {
        "name": "learning",
        "max_new_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "stop_token_ids": [],
        "samples_per_prompt": 1,
        "seeds": tasks,
    }


def describe(workload: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "even tokens",
        "seeds": len(workload["seeds"]),
        "iterations": len(workload["seeds"][0]["batches"]),
        "samples_per_iteration": PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }


def final(scores: list[float]) -> float:
    """What a seed ends at: the mean score of its last iterations."""
    return statistics.fmean(scores[-LAST:])


def learning_bar(scores: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Pellucid's final score less TRL's, over seeds, plus two standard errors of that difference: not below 0."""
    title = f"score at the end, {PELLUCID} less {TRL}, plus two standard errors"
    made: dict[str, Any] = {"name": title, "value": None, "bar": 0.0, "at_least": True, "holds": None}
    ours, theirs = ([final(curve) for curve in scores.get(name, [])] for name in (PELLUCID, TRL))
    if min(len(ours), len(theirs)) < 2:
        return made | {"why": f"{TRL} was not asked to run" if not theirs else "it needs at least two seeds"}
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    low, high = difference - 2 * error, difference + 2 * error
    return made | {
        "value": round(high, 4),
        "holds": high >= 0,
        "difference": round(difference, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def curve_table(scores: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Mean score over seeds, and its spread, after some numbers of samples."""
    iterations = min(len(curve) for curves in scores.values() for curve in curves)
    shown = sorted({1, *range(5, iterations + 1, 5), iterations})
    rows = []
    for iteration in shown:
        row: list[Any] = [iteration * PROMPTS]
        for curves in scores.values():
            values = [curve[iteration - 1] for curve in curves]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        rows.append(row)
    return {"title": "Mean score, ± its standard deviation over seeds", "columns": ["samples", *scores], "rows": rows}


def _check(name: str, run: dict[str, Any], workload: dict[str, Any]) -> None:
    """BenchmarkError unless every iteration was made, and every token."""
    shape = describe(workload)
    tokens = shape["iterations"] * PROMPTS * NEW_TOKENS
    if len(run["scores"]) != shape["iterations"] or run["tokens"] != tokens:
        raise BenchmarkError(
            f"{name} made {len(run['scores'])} iterations and {run['tokens']} tokens; the workload is "
            f"{shape['iterations']} and {tokens}"
        )


def _contestants(options: argparse.Namespace, workload: dict[str, Any]) -> list[Contestant]:
    spec = {
        "model": "",  # of each seed
        "precision": "float32",
        "threads": options.threads,
        "workload": str(shapes.workload_file(workload)),
        "options": {"algo": ALGO},
    }
    ours = Contestant(PELLUCID, python_of("project"), "learning_pellucid.py", spec)
    if options.tiny:
        return [ours]
    passes = {"micro_batch_size": ALGO["minibatch_size"], "rollout_batch_size": PROMPTS}
    theirs = {**spec, "options": {"algo": ALGO, **passes}}
    return [ours, Contestant(TRL, python_of("trl-1.12"), "learning_trl.py", theirs)]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning")
    parser.add_argument("--seeds", type=int, help="whole trainings of each system (default 5; with --tiny 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant (default 1: the model is tiny)")
    parser.add_argument(
        "--tiny", action="store_true", help="two iterations of Pellucid alone; writes nothing by itself"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds if options.seeds is not None else 1 if options.tiny else 5
    if options.seeds < 1 or options.threads < 1:
        parser.error("--seeds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main(command)
