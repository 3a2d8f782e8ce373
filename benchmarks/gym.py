"""Environments: what PPO reaches in them, and environment steps per second beside Stable-Baselines3's PPO.

    python -m benchmarks.gym                                 writes benchmarks/results/gym.json
    python -m benchmarks.gym --parts returns --json benchmarks/results/gym_returns.json   half an hour, load is no matter
    python -m benchmarks.gym --tiny                          seconds, Pellucid alone; writes nothing unless told to

The hyper-parameters are those of configs/gym. Speed is that of a whole training loop: rollouts and updates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.environments import python_of
from benchmarks.figures import bar, case, finish, names, speedup_bar
from benchmarks.harness import BenchmarkError, Contestant, Outcome, alternate, main

ROOT = Path(__file__).resolve().parent.parent
RETURNS = {"cartpole": 490.0, "acrobot": -86.0, "lunarlander": 200.0}
"""Config -> the return to reach."""
FASTER = 1.5
STEPS_A_RUN = 32_768
SB3 = "stable-baselines3"
PARTS = ("speed", "returns")
NOTES = [
    "A token, in the tables here, is an environment step. Both take the steps of a rollout, the minibatches, the epochs, "
    "the network (64-64 tanh, actor and critic apart), gamma, lambda, the clip range and the bound on the gradient from the "
    "same file in configs/gym; one thread each.",
    "Different by construction: Stable-Baselines3 has one optimizer for actor and critic, and whitens advantages in each "
    "minibatch. Pellucid steps CartPole in Gymnasium's vector implementation, which Stable-Baselines3 cannot use; the other "
    "two have none. Stable-Baselines3 is tried with its environments in one process and in a process each; the faster takes "
    "part.",
    "Where an environment has a vector implementation, the step in which it resets counts as a step.",
    "Returns: the mean over the last 100 episodes of training, sampled actions, median over the seeds.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    described = machine.describe(1)
    bars: list[dict[str, Any]] = []
    cases: dict[str, Any] = {}
    tables: list[dict[str, Any]] = []
    if "speed" in options.parts:
        for name in options.only:
            work = workload(name, 2 if options.tiny else None)
            outcome = _race(work, options)
            bars.append(speedup_bar(f"{name}: environment steps per second against {SB3}", outcome, SB3, FASTER))
            cases[name] = case({k: v for k, v in work.items() if k != "name"}, outcome)
    if "returns" in options.parts:
        rows = []
        for name in options.only:
            summaries = train(name, options)
            reached = [summary["episode_return"] for summary in summaries]
            bars.append(bar(f"{name}: return of the last 100 episodes", reached, RETURNS[name]))
            rows.append(_row(name, summaries))
        columns = ["", "environment steps", "return, seed by seed", "mean", "seconds a run"]
        tables.append({"title": "Returns", "columns": columns, "rows": rows})
    finish("gym", options, bars, cases=cases, machine=described, notes=NOTES, tables=tables)


def workload(name: str, iterations: int | None = None) -> dict[str, Any]:
    """What both contestants do in a run; the learning rate is held, so that the training can go on from run to run."""
    config = tomllib.loads((ROOT / f"configs/gym/{name}.toml").read_text())
    config.pop("run")
    for role in ("actor_optimizer", "critic_optimizer"):
        config[role] |= {"anneal": False}
    batch = config["env"]["num_envs"] * config["steps_per_rollout"]
    return {"name": f"gym-{name}", "config": config, "iterations": iterations or -(-STEPS_A_RUN // batch)}


def train(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The summaries of whole runs of configs/gym/NAME.toml, one a seed, options.jobs at a time."""
    with tempfile.TemporaryDirectory(prefix="gym-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(_train_once, name, seed, Path(folder), options.tiny) for seed in range(options.seeds)]
        return [run.result() for run in runs]


def _train_once(name: str, seed: int, folder: Path, tiny: bool) -> dict[str, Any]:
    run_dir = folder / f"{name}-{seed}"
    flags = ["--run.dir", str(run_dir), "--run.seed", str(seed), "--run.checkpoint-every", "0"]
    line = [sys.executable, "-m", "pellucid.cli", "gym", str(ROOT / f"configs/gym/{name}.toml"), *flags]
    line += ["--total-steps", "16384"] if tiny else []
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise BenchmarkError(f"{' '.join(line)} failed: {done.stderr.strip()}")
    summary = json.loads((run_dir / "summary.json").read_text())
    print(f"{name}, seed {seed}: {summary['episode_return']} in {summary['seconds']:.0f} s", flush=True)
    return summary


def _race(work: dict[str, Any], options: argparse.Namespace) -> Outcome:
    spec = {"model": "none", "precision": "float32", "threads": 1, "workload": str(shapes.workload_file(work))}
    ours = Contestant("pellucid", python_of("project"), "gym_pellucid.py", {**spec, "options": {}})
    if options.tiny:
        return alternate([ours], options.rounds)
    theirs = [
        Contestant(
            SB3, python_of("sb3"), "gym_sb3.py", {**spec, "options": {"vectors": kind}}, variant=f"{kind} vectors"
        )
        for kind in ("dummy", "subprocess")
    ]
    return alternate([ours, theirs], options.rounds)


def _row(name: str, summaries: list[dict[str, Any]]) -> list[Any]:
    reached = [summary["episode_return"] for summary in summaries]
    seconds = statistics.median(summary["seconds"] for summary in summaries)
    steps = max(summary["env_steps"] for summary in summaries)
    listed = ", ".join(f"{value:.1f}" for value in reached)
    return [name, f"{steps:,}", listed, f"{statistics.fmean(reached):.1f}", f"{seconds:.0f}"]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gym")
    parser.add_argument("--only", type=names(tuple(RETURNS)), default=list(RETURNS), metavar="CONFIGS")
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), metavar="PARTS", help=",".join(PARTS))
    parser.add_argument("--rounds", type=int, help="measured runs of each (default 5; with --tiny 1)")
    parser.add_argument("--seeds", type=int, help="whole trainings (default 5; with --tiny 1)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--tiny", action="store_true", help="some iterations of Pellucid; writes nothing by itself")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    for key in ("rounds", "seeds"):
        if getattr(options, key) is None:
            setattr(options, key, 1 if options.tiny else 5)
    if min(options.rounds, options.seeds, options.jobs) < 1:
        raise BenchmarkError("--rounds, --seeds and --jobs must be at least 1")
    return options


if __name__ == "__main__":
    main(command)
