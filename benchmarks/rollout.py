"""Rollout: how fast a policy's samples are made, by Pellucid and by what a user would take instead.

    python -m benchmarks.rollout                        writes benchmarks/results/rollout.json
    python -m benchmarks.rollout --only dense --rounds 3 --json other.json
    python -m benchmarks.rollout --tiny                 seconds, in this environment alone; writes nothing unless told to

Each peer is first tried with the settings in `VARIANTS`, on this machine and this workload; its best takes part in the
alternating rounds.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.environments import preloads, python_of
from benchmarks.figures import case, finish, names, speedup_bar
from benchmarks.harness import BenchmarkError, Contestant, Outcome, alternate, main

CASES = ("dense", "ragged")
PELLUCID, GENERATE, CONTINUOUS, VLLM = "pellucid", "generate", "continuous batching", "vllm"
VLLM_BARE = "vllm without log-probs"
BOUNDS = {("dense", VLLM): 2.0, ("dense", GENERATE): 3.5, ("ragged", VLLM): 2.0, ("ragged", GENERATE): 5.0}
NOTES = [
    "A run samples every prompt of the workload once, at temperature 1, and ends when the last response is there. "
    "Loading and one warm-up run are not counted. Contestants run in turn, one at a time, with as many threads each.",
    "Rates are sampled tokens per second. Every run's token count is checked against the workload.",
    "Pellucid, continuous batching and vLLM return the log-probability of each sampled token, which PPO needs; vLLM also "
    "runs without. `generate` is tried with and without, and the faster counts.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    threads = options.threads
    described = machine.describe(threads)
    print(f"{described['cpu']}, {threads} threads; matrix product {described['matrix_gflops']} GFLOP/s")
    cases: dict[str, Any] = {}
    bars: list[dict[str, Any]] = []
    for name in options.only:
        workload, model = _workload(name, options.tiny)
        print(f"{name}: {len(workload['prompts'])} prompts, {workload['expected_tokens']} tokens")
        outcome = _measure(options, workload, model, machine.fast_bfloat16(described))
        for contestant, runs in outcome.runs.items():
            for run in runs:
                shapes.check_tokens(workload, contestant, run["tokens"])
        cases[name] = case(shapes.describe(workload), outcome)
        bars += _bars(name, outcome, options.contestants)
    finish("rollout", options, bars, cases=cases, machine=described, notes=NOTES)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=(__doc__ or "").splitlines()[0])
    systems = tuple(SYSTEMS)
    parser.add_argument("--rounds", type=int, default=None, help="measured runs of each (default 5; with --tiny 1)")
    parser.add_argument("--only", type=names(CASES), default=list(CASES), metavar="CASES", help=",".join(CASES))
    parser.add_argument("--contestants", type=names(systems), default=None, metavar="NAMES", help=",".join(systems))
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each contestant (default 2)"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model and workload, in this environment alone")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 5
    options.contestants = options.contestants or ([PELLUCID, GENERATE] if options.tiny else list(systems))
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.tiny and set(options.contestants) - {PELLUCID, GENERATE}:
        raise BenchmarkError("--tiny builds no environments, so it has pellucid and generate only")
    return options


def _workload(name: str, tiny: bool) -> tuple[dict[str, Any], Path]:
    """The workload and the folder of the model that samples it."""
    shape = shapes.TINY if tiny else shapes.S8
    if name == "dense":
        made = shapes.dense(shape, prompts=4, prompt_tokens=8, new_tokens=8) if tiny else shapes.dense(shape)
        return made, shapes.policy(shape)
    made = shapes.ragged(shape, prompts=64, new_tokens=(2, 16)) if tiny else shapes.ragged(shape)
    return made, shapes.stopping_policy(shape)


def _measure(options: argparse.Namespace, workload: dict[str, Any], model: Path, bfloat16: bool) -> Outcome:
    """Every system asked for, in each of its settings, then its best in turn with the others'."""
    spec = {"model": str(model), "threads": options.threads, "workload": str(shapes.workload_file(workload))}
    precisions = ["float32", "bfloat16"] if bfloat16 else ["float32"]
    entries, not_built = [], {}
    for name in options.contestants:
        try:
            python, script, env, variants = SYSTEMS[name](workload["name"], options.tiny)
        except BenchmarkError as error:  # its environment could not be made
            print(f"{name} is left out: {error}")
            not_built[name] = str(error)
            continue
        settings = [(p, words, chosen) for p in precisions for words, chosen in variants.items()]
        entries.append(
            [
                Contestant(name, python, script, {**spec, "precision": p, "options": chosen}, f"{p}, {words}", env)
                for p, words, chosen in settings
            ]
        )
    outcome = alternate(entries, options.rounds, required=(PELLUCID,))
    outcome.failures |= not_built
    return outcome


Entry = tuple[Path | str, str, dict[str, str], dict[str, dict[str, Any]]]
"""(interpreter, script, environment variables, {settings in words: options})."""


def _pellucid(workload: str, tiny: bool) -> Entry:
    return python_of("project"), "rollout_pellucid.py", {}, {"64 slots": {"num_slots": 64}}


def _generate(workload: str, tiny: bool) -> Entry:
    python = python_of("project" if tiny else "transformers")
    if tiny:
        return python, "rollout_generate.py", {}, {"one batch": {"batch_size": 64}}
    if workload == "ragged":
        by_length = "batches of 64, sorted by prompt length"
        variants: dict[str, dict[str, Any]] = {
            "batches of 64, in the given order": {},
            by_length: {"sort": True},
            f"{by_length}, eager attention": {"sort": True, "attention": "eager"},
            f"{by_length}, static cache": {"sort": True, "cache": "static"},
        }
    else:
        variants = {
            "one batch": {},
            "one batch, with log-probs": {"logprobs": True},
            "one batch, eager attention": {"attention": "eager"},
            "one batch, static cache": {"cache": "static"},
        }
    return python, "rollout_generate.py", {}, variants


def _continuous(workload: str, tiny: bool) -> Entry:
    variants = {f"{requests} requests at once, with log-probs": {"max_requests": requests} for requests in (16, 64)}
    return python_of("transformers"), "rollout_continuous.py", {}, variants


def _vllm(workload: str, tiny: bool, logprobs: bool = True) -> Entry:
    """By itself vLLM leaves a core to its scheduler, which on two cores is slower than computing on both."""
    variants = {name: {"interface": name, "logprobs": logprobs} for name in ("server", "offline")}
    python = python_of("vllm")
    return python, "rollout_vllm.py", preloads(Path(python)), variants


SYSTEMS = {
    PELLUCID: _pellucid,
    GENERATE: _generate,
    CONTINUOUS: _continuous,
    VLLM: _vllm,
    VLLM_BARE: partial(_vllm, logprobs=False),
}


def _bars(name: str, outcome: Outcome, asked: list[str]) -> list[dict[str, Any]]:
    return [
        speedup_bar(f"{name}: tokens per second, pellucid over {peer}", outcome, peer, bound)
        for (workload, peer), bound in BOUNDS.items()
        if workload == name and peer in asked
    ]


if __name__ == "__main__":
    main(command)
