"""Memory: what one PPO iteration needs above the models, and whether the cache's size is predicted right.

    python -m benchmarks.memory                         writes benchmarks/results/memory.json
    python -m benchmarks.memory --tiny                  seconds, a tiny model; writes nothing unless told to

Every case runs in a process of its own, for memory that was once taken stays with a process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, shapes
from benchmarks.figures import bar, finish
from benchmarks.harness import PEERS, BenchmarkError, main
from benchmarks.peers.worker import die_with_parent, versions

CACHE_BOUND, LOGITS_BOUND = 0.05, 1.0
DEADLINE = 600
PRELOADED = ["torch", "transformers", "pellucid.execution.local", "pellucid.stages.ppo"]
ALGO = {
    "num_epochs": 1,
    "lr": 1e-6,
    "beta2": 0.95,
    "max_grad_norm": 1.0,
    "clip_eps": 0.2,
    "value_clip_eps": 0.2,
    "kl_coef": 0.05,
    "gamma": 1.0,
    "gae_lambda": 0.95,
}
NOTES = [
    "One PPO iteration: prompts of 32 tokens, 128 new ones each, four models of one shape, one epoch, one minibatch, passes "
    "of 2,048 tokens. Each case runs in a process of its own.",
    "Above: the greatest resident memory during the iteration, less what was resident before it (interpreter, libraries, "
    "four models). It includes gradients and Adam's state of actor and critic, which the first iteration makes and the next "
    "ones keep. In all: the greatest since the process began.",
    "Logits whole: what the logits of the response tokens would take in float32, once.",
    "Cache: the bytes that the engine predicts before it allocates, against how much resident memory grew when such a cache "
    "was made and written to.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    shape = shapes.TINY if options.tiny else shapes.S8
    described = machine.describe(options.threads)
    samples = (4, 8) if options.tiny else (16, 64, 256)
    vocabularies = (512,) if options.tiny else (16384, 32768)
    slots = (2,) if options.tiny else (8, 32, 128)
    base = samples[1]

    by_tokens = {n: Case(iteration_memory, {"shape": shape, "samples": n}) for n in samples}
    by_vocabulary = {
        n: Case(iteration_memory, {"shape": replace(shape, name=f"{shape.name}-v{n}", vocab_size=n), "samples": base})
        for n in vocabularies
    }
    by_slots = {
        n: Case(iteration_memory, {"shape": shape, "samples": 2 * base, "num_slots": n, "rollout_only": True})
        for n in slots
    }
    cache = Case(cache_memory, {"shape": shape, "slots": (64, 128, 256), "length": 512})
    cases = [*by_tokens.values(), *by_vocabulary.values(), *by_slots.values(), cache]
    for case in cases:
        case.arguments.update(threads=options.threads)
    print(f"{len(cases)} processes, one after the other")
    *found, cached = measure(cases, say=print)
    tokens = dict(zip(by_tokens, found, strict=False))
    vocabulary = {shape.vocab_size: tokens[base]} | dict(zip(by_vocabulary, found[len(samples) :], strict=False))
    tables = [
        _table("Samples of an iteration", "samples", tokens),
        _table(f"Vocabulary, {base} samples", "vocabulary", vocabulary),
        _table(f"Rollout alone, {2 * base} samples", "num_slots", dict(zip(slots, found[-len(slots) :], strict=True))),
        cache_table(cached["caches"]),
    ]
    bars = [cache_bar(cached["caches"]), logits_bar(vocabulary)]
    finish(
        "memory",
        options,
        bars,
        machine=described,
        notes=NOTES,
        versions={"pellucid": versions()},
        measured=[{"case": case.words(), **figures} for case, figures in zip(cases, [*found, cached], strict=True)],
        tables=tables,
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default 2")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if not Path("/proc/self/status").exists():
        raise BenchmarkError("benchmarks.memory reads /proc/self/status, which this system has not; it runs on Linux")
    return options


# ---------------------------------------------------------------- processes


class Case(NamedTuple):
    """A function of a module, and what it is called with, in a process of its own. It returns a dict."""

    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    def words(self) -> dict[str, Any]:
        plain = {k: v.name if isinstance(v, shapes.Shape) else v for k, v in self.arguments.items()}
        return {"what": self.function.__name__, **plain}


def measure(cases: Sequence[Case], say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """What each case returns. One runs at a time. Raises BenchmarkError when a process dies or takes too long."""
    # Each is forked from a process that has imported the libraries and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    found = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for case in cases:
            try:
                found.append(pool.submit(_alone, *case).result(timeout=DEADLINE))
            except BrokenProcessPool:
                raise BenchmarkError(
                    f"{case.words()}: the process was killed, most likely for lack of memory"
                ) from None
            except TimeoutError:
                raise BenchmarkError(f"{case.words()}: not done within {DEADLINE} s") from None
            say(f"{case.words()}: {found[-1]}")
    return found


def _alone(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    die_with_parent()
    return function(**arguments)


class Watch:
    """Resident memory over a block: before, peak (since the process began), and above (the block's own peak over before)."""

    def __enter__(self) -> Watch:
        give_back()
        self.earlier = resident("VmHWM")
        with suppress(OSError):  # forgets the peak so far; where that is forbidden, loading counts as well
            Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.within = resident("VmHWM")

    def figures(self) -> dict[str, int]:
        return {
            "before": self.before,
            "above": self.within - self.before,
            "peak": max(self.within, self.earlier),
        }


def give_back() -> None:
    """Return to the system what has been freed, so that it is not taken for used."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the greatest so far) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {name}")


# ---------------------------------------------------------------- cases


def iteration_memory(
    shape: shapes.Shape, samples: int, threads: int, num_slots: int = 64, rollout_only: bool = False
) -> dict[str, Any]:
    """One PPO iteration on `samples` prompts, or its rollout alone, as `ppo_iteration` has it."""
    sys.path.append(str(PEERS))
    from ppo_pellucid import iteration, make_state, to_prompts

    from pellucid.rollout.embedded_cache import cache_bytes
    from pellucid.rollout.embedded_models import measure_layers
    from pellucid.stages.ppo import sampling_params

    new_tokens, prompt_tokens = (8, 8) if shape.name.startswith(shapes.TINY.name) else (128, 32)
    workload = shapes.dense(shape, samples, prompt_tokens, new_tokens)
    models = {"reward_model": str(shapes.scalar(shape, 1)), "critic": str(shapes.scalar(shape, 2))}
    options = {"algo": {**ALGO, "minibatch_size": samples}, "config": {"rollout": {"num_slots": num_slots}}, **models}
    spec = {"model": str(shapes.policy(shape)), "precision": "float32", "threads": threads, "options": options}
    state, prompts = make_state(spec, workload, None), to_prompts(workload["prompts"])
    hf = state.workers.actor.model.hf
    layers = measure_layers(hf, hf.dtype)
    with Watch() as watch:
        if rollout_only:
            state.workers.engine.generate(prompts, sampling_params(state.config, 1, ()))
        else:
            iteration(state, prompts)
    trained = [state.workers.actor.learner, state.workers.critic.learner]
    weights = sum(p.numel() * p.element_size() for learner in trained for p in learner.module.parameters())
    return {
        **watch.figures(),
        "tokens": samples * (prompt_tokens + new_tokens),
        "gradients_and_adam": 0 if rollout_only else 3 * weights,
        "logits_whole": samples * new_tokens * shape.vocab_size * 4,
        "cache": cache_bytes(layers, min(num_slots, samples), prompt_tokens + new_tokens),
    }


def cache_memory(shape: shapes.Shape, slots: Sequence[int], length: int, threads: int) -> dict[str, Any]:
    """Caches of `slots` x `length` tokens, one after the other: predicted, held by tensors, and resident once written."""
    import torch

    from pellucid.models import load_causal_lm
    from pellucid.rollout.embedded_cache import SlotCache, cache_bytes
    from pellucid.rollout.embedded_models import measure_layers

    torch.set_num_threads(threads)
    model = load_causal_lm(str(shapes.policy(shape)), "cpu", "float32")
    layers = measure_layers(model.hf, torch.float32)
    caches = []
    for count in slots:
        with Watch() as watch:
            cache = SlotCache(layers, count, length, torch.device("cpu"))
            tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            for tensor in tensors:
                tensor.fill_(1.0)  # zeros take no memory until they are written to
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        predicted = cache_bytes(layers, count, length)
        caches.append({"slots": count, "length": length, "predicted": predicted, "held": held, **watch.figures()})
        del cache, tensors
    return {"caches": caches}


# ---------------------------------------------------------------- results


def cache_bar(caches: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(abs(cache[kind] / cache["predicted"] - 1) for cache in caches for kind in ("held", "above"))
    return bar("KV cache: predicted bytes off what was allocated, as a share", worst, CACHE_BOUND, at_least=False)


def logits_bar(by_vocabulary: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Everything together, weights' gradients and Adam included, grows by less than one copy of the logits would."""
    least, most = by_vocabulary[min(by_vocabulary)], by_vocabulary[max(by_vocabulary)]
    growth = (most["above"] - least["above"]) / (most["logits_whole"] - least["logits_whole"])
    name = "growth of memory with the vocabulary, over that of the logits if they were held whole"
    return bar(name, growth, LOGITS_BOUND, at_least=False)


def _table(title: str, key: str, found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    columns = {
        "tokens": "tokens",
        "above": "above, MiB",
        "gradients_and_adam": "of it gradients and Adam",
        "cache": "cache, MiB",
        "logits_whole": "logits whole, MiB",
        "peak": "in all, MiB",
    }

    def cell(name: str, value: int) -> str:
        return f"{value:,}" if name == "tokens" else f"{value / 2**20:,.0f}"

    rows = [[f"{value:,}", *(cell(name, figures[name]) for name in columns)] for value, figures in found.items()]
    return {"title": title, "columns": [key, *columns.values()], "rows": rows}


def cache_table(caches: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [c["slots"], c["length"], *(f"{c[kind] / 2**20:,.1f}" for kind in ("predicted", "held", "above"))]
        for c in caches
    ]
    columns = ["slots", "tokens each", "predicted, MiB", "held by tensors, MiB", "resident, MiB"]
    return {"title": "KV cache", "columns": columns, "rows": rows}


if __name__ == "__main__":
    main(command)
