"""One GPU: rollout, learner and a whole PPO iteration on Qwen2.5-0.5B's shape with random weights, in bfloat16.

    python -m benchmarks.gpu                            writes benchmarks/results/gpu.json; under ten minutes on an H200
    python -m benchmarks.gpu --tiny --device cpu        a rehearsal of seconds without a GPU; writes nothing unless told to

Needs PyTorch with CUDA, Transformers, and what else Pellucid imports; Pellucid itself is taken from this checkout if it is
not installed. Everything runs in this process, `generate` included, in turn.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import learner, machine
from benchmarks.figures import bar, finish
from benchmarks.gpu_setup import FULL, TINY, Generate, Scale, new_policy, new_workers, ppo_config, random_prompts
from benchmarks.harness import BenchmarkError, main
from benchmarks.peers.worker import versions
from benchmarks.training import phases

SOURCE = Path(__file__).resolve().parent.parent / "src"
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tomli_w": "tomli-w",
}
"""Modules that are imported here -> the packages that they come in."""
CACHE_DEADLINE = 150
"""Seconds for the first run of `generate` with one cache, compilation included."""
LATEST_ITERATION = 450.0
"""Seconds after the start at which no further iteration begins, so that the command ends within ten minutes."""
ROLLOUT_BOUND, BANDWIDTH_BOUND, LEARNER_BOUND = 8.0, 0.40, 0.40
NOTES = [
    "The model has Qwen2.5-0.5B's shape and random weights: float32 masters for training, bfloat16 in the engine, in the "
    "products of training, and in `generate`.",
    "Rollout: every response has exactly as many tokens as asked for. `generate` samples from a bfloat16 model with SDPA, "
    "without log-probs, once with its default cache and once with a static one; the faster takes part in the rounds.",
    "Bandwidth bound: all weights in bfloat16 once a step, and every sequence's keys and values at every step, over the "
    "bytes read and written per second by a copy within the GPU's memory, measured in the same run.",
    "Learner: one actor step (forward, backward, Adam) on sequences of the rollout's lengths in one minibatch; operations "
    "are counted as in `benchmarks.learner`, the matrix rate is that of a large square product measured just before each.",
    "Iteration: four models of this shape, four epochs of minibatches of a quarter of the batch.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    check_environment(options.device)
    import torch

    try:
        _measure(options, TINY if options.tiny else FULL, torch.device(options.device))
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise BenchmarkError(f"benchmarks.gpu needs about 60 GiB of free GPU memory, and ran out: {reason}") from None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="measured runs of each (default 3; with --tiny 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --tiny only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 3
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device == "cpu" and not options.tiny:
        raise BenchmarkError("on a CPU benchmarks.gpu is a rehearsal only: give --tiny --device cpu")
    return options


def check_environment(device: str) -> None:
    """BenchmarkError, in a sentence, for what this Python or machine lacks. Puts the checkout's Pellucid on the path."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BenchmarkError(f"benchmarks.gpu needs {', '.join(missing)}, which {sys.executable} does not have")
    if int(metadata.version("transformers").split(".")[0]) < 5:
        raise BenchmarkError(f"benchmarks.gpu needs transformers 5 or newer, not {metadata.version('transformers')}")
    if importlib.util.find_spec("pellucid") is None:
        sys.path.insert(0, str(SOURCE))
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            f"benchmarks.gpu needs a CUDA device, and PyTorch {torch.__version__} sees none; for a rehearsal without one "
            "give --tiny --device cpu"
        )
    try:
        importlib.import_module("pellucid.stages.ppo")
    except ImportError as error:
        raise BenchmarkError(f"benchmarks.gpu cannot import Pellucid: {error}") from None


def _measure(options: argparse.Namespace, scale: Scale, device: Any) -> None:
    until = time.monotonic() + LATEST_ITERATION
    described = describe(device, scale)
    print(f"{described['cpu']}; {described['matrix_gflops']} GFLOP/s; copy {described['copy_gb_per_second']} GB/s")
    model, prompts = new_policy(scale, device), random_prompts(scale)

    rolled, tried, samples, graphs = rollout(model, prompts, scale, options.rounds)
    least = bandwidth_seconds(model.hf, scale, described["copy_gb_per_second"] * 1e9)
    steps, rates = actor_steps(model, scale, options.rounds, device)
    del steps.actor  # its optimizer's state, before four models come
    turns = iterations(model, prompts, scale, options.rounds, until)

    tokens = scale.prompts * scale.new_tokens
    bars = [
        bar("rollout: tokens per second, pellucid over generate", ratios(rolled), ROLLOUT_BOUND),
        bar("rollout: share of the bandwidth bound", [least / s for s in rolled["pellucid"]], BANDWIDTH_BOUND),
        bar("learner: share of the matrix-product rate", learner.shares(steps, rates), LEARNER_BOUND),
    ]
    finish(
        "gpu",
        options,
        bars,
        machine=described,
        notes=NOTES,
        versions={"pellucid": versions()},
        workload={"prompts": scale.prompts, "prompt_tokens": scale.prompt_tokens, "new_tokens": scale.new_tokens},
        model=scale.model,
        rollout={
            "seconds": rolled,
            "generate_tried_seconds": tried,
            "bandwidth_bound_seconds": least,
            "cuda_graphs": graphs,
        },
        rollout_tokens=sum(len(sample.response_ids) for sample in samples),
        learner={"seconds": steps.seconds, "operations": steps.flops.step, "matrix_gflops_by_round": rates},
        iterations=turns,
        tables=[rollout_table(rolled, tried, least, tokens), phase_table(turns)],
    )


# ---------------------------------------------------------------- the machine


def describe(device: Any, scale: Scale) -> dict[str, Any]:
    """As `machine.describe`, with the device's name, its bfloat16 rate, and what a copy moves."""
    import torch

    found = machine.describe(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["cpu"] = (
            f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}); {found['cpu']}"
        )
    found["matrix_gflops"] = {"bfloat16": matrix_gflops(device, scale.matrix)}
    found["copy_gb_per_second"] = copy_gb_per_second(device, scale.copied)
    return found


def matrix_gflops(device: Any, size: int) -> float:
    """The greatest rate of a square product in bfloat16, 2 n^3 operations each."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / _best(device, lambda: a @ b) / 1e9, 1)


def copy_gb_per_second(device: Any, count: int) -> float:
    """The greatest rate of a copy within the device's memory: bytes read and written."""
    import torch

    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2 * count / _best(device, lambda: target.copy_(source)) / 1e9, 1)


def _best(device: Any, work: Callable[[], Any], repeats: int = 10, inside: int = 5) -> float:
    """Seconds of one `work`: the least of `repeats` means over `inside` calls, after as many that do not count."""
    best = math.inf
    for _ in range(repeats + 1):
        started = learner.clock(device)
        for _ in range(inside):
            work()
        best = min(best, (learner.clock(device) - started) / inside)
    return best


# ---------------------------------------------------------------- rollout


def rollout(
    model: Any, prompts: list[Any], scale: Scale, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any], list[Any], str | None]:
    """Pellucid and `generate` in turn. Returns (seconds of each, what each cache of `generate` took or why it failed, the
    last samples, what came of Pellucid's CUDA graphs)."""
    from pellucid.rollout.embedded import EmbeddedEngine
    from pellucid.types import SamplingParams

    device = model.device
    engine = EmbeddedEngine(model.hf, num_slots=scale.prompts, precision="bfloat16")
    samples: list[Any] = []

    def ours(step: int) -> int:
        samples[:] = engine.generate(prompts, SamplingParams(scale.new_tokens, step=step))
        return sum(len(sample.response_ids) for sample in samples)

    peer = Generate(model, prompts, scale)
    tried: dict[str, Any] = {}
    for cache in ("default", "static"):
        try:
            with deadline(CACHE_DEADLINE):
                _timed(device, lambda cache=cache: peer.run(cache), scale)
            tried[cache] = _timed(device, lambda cache=cache: peer.run(cache), scale)
        except (
            Exception
        ) as error:  # a cache that this machine cannot have (no compiler, say) is not the one that takes part
            tried[cache] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        print(f"generate, {cache} cache: {tried[cache]}")
    fit = {cache: seconds for cache, seconds in tried.items() if isinstance(seconds, float)}
    if not fit:
        raise BenchmarkError(f"generate does not run here: {tried}")
    best = min(fit, key=lambda cache: fit[cache])
    seconds: dict[str, list[float]] = {"pellucid": [], "generate": []}
    _timed(device, lambda: ours(0), scale)
    for number in range(rounds):
        seconds["pellucid"].append(_timed(device, lambda number=number: ours(number + 1), scale))
        seconds["generate"].append(_timed(device, lambda: peer.run(best), scale))
        took = ", ".join(f"{name} {each[-1]:.2f} s" for name, each in seconds.items())
        print(f"rollout, round {number + 1}: {took}")
    print(f"CUDA graphs: {engine.graphs}")
    return seconds, tried, samples, engine.graphs


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """TimeoutError in the block when it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _timed(device: Any, work: Callable[[], int], scale: Scale) -> float:
    """Seconds of a rollout, which must have made every token."""
    started = learner.clock(device)
    made = work()
    seconds = learner.clock(device) - started
    if made != scale.prompts * scale.new_tokens:
        raise BenchmarkError(f"a rollout made {made} tokens; the workload is {scale.prompts * scale.new_tokens}")
    return seconds


def bandwidth_seconds(hf: Any, scale: Scale, bytes_per_second: float) -> float:
    """Of the rollout's reading alone: each step all weights, tied ones once, and what every sequence has cached."""
    config, element = hf.config, 2  # bytes of a bfloat16
    dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * dim * config.num_hidden_layers * element
    weights = sum(p.numel() for p in hf.parameters()) * element
    cached = sum(scale.prompt_tokens + step for step in range(scale.new_tokens)) * scale.prompts
    return (weights * scale.new_tokens + cached * per_token) / bytes_per_second


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    return [theirs / ours for ours, theirs in zip(seconds["pellucid"], seconds["generate"], strict=True)]


# ---------------------------------------------------------------- learner and iteration


def actor_steps(model: Any, scale: Scale, rounds: int, device: Any) -> tuple[learner.Steps, list[float]]:
    """Steps on sequences of the rollout's lengths, and the matrix rate before each."""
    lengths = [(scale.prompt_tokens, scale.new_tokens)] * scale.prompts
    steps = learner.Steps("actor step", model, lengths, scale.model["vocab_size"], scale.micro_batch_tokens)
    return steps, learner.rounds([steps], rounds, lambda: matrix_gflops(device, scale.matrix))


def iterations(model: Any, prompts: list[Any], scale: Scale, rounds: int, until: float) -> list[dict[str, Any]]:
    """Whole PPO iterations after one that does not count: seconds, phases, and the greatest GPU memory in bytes. One at
    least is measured, and none begins after `until` (of time.monotonic)."""
    import torch

    from pellucid.core import FixedKL
    from pellucid.stages.ppo import iterate, sampling_params

    device, config = model.device, ppo_config(scale)
    workers = new_workers(model, scale, config, device)
    made = []
    for step in range(1, rounds + 2):
        if len(made) > 1 and time.monotonic() > until:
            break
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = learner.clock(device)
        params = sampling_params(config, step, ())
        _, _, stats = iterate(step, prompts, params, workers, FixedKL(config.algo.kl_coef), config)
        seconds = learner.clock(device) - started
        split = {name.removeprefix("time/"): value for name, value in stats.items() if name.startswith("time/")}
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        print(f"iteration {step}{' (warm-up)' if step == 1 else ''}: {seconds:.2f} s, {peak / 2**30:.1f} GiB")
        made.append({"seconds": seconds, "phases": split, "peak_gpu_bytes": peak})
    return made[1:]


# ---------------------------------------------------------------- tables


def rollout_table(seconds: dict[str, list[float]], tried: dict[str, Any], least: float, tokens: int) -> dict[str, Any]:
    def row(name: str, each: Sequence[float]) -> list[str]:
        median = statistics.median(each)
        return [name, f"{median:.2f} ({min(each):.2f} to {max(each):.2f})", f"{tokens / median:,.0f}"]

    rows = [row(name, each) for name, each in seconds.items()]
    for cache, found in tried.items():
        name = f"generate, {cache} cache, tried once"
        rows.append(row(name, [found]) if isinstance(found, float) else [name, found, ""])
    rows.append(row("bandwidth bound", [least]))
    return {"title": "Rollout", "columns": ["", "seconds", "tokens/s"], "rows": rows}


def phase_table(turns: list[dict[str, Any]]) -> dict[str, Any]:
    whole = statistics.median(turn["seconds"] for turn in turns)
    rows = [[phase, f"{median:.2f}", f"{median / whole:.0%}"] for phase, median in phases(turns).items()]
    rows.append(["the whole iteration", f"{whole:.2f}", "100%"])
    return {"title": "One PPO iteration", "columns": ["phase", "seconds", "share"], "rows": rows}


if __name__ == "__main__":
    main(command)
