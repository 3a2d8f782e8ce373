"""How cost grows with response length, batch and parameters: rollout, actor step, forward pass.

    python -m benchmarks.scaling                        writes benchmarks/results/scaling.json
    python -m benchmarks.scaling --only length --repeats 1 --json other.json
    python -m benchmarks.scaling --tiny                 seconds, a tiny model; writes nothing unless told to

Seconds are fitted by size ** exponent (least squares of the logarithms). What the mathematics demands is beside it: 1 in
batch and parameters; in length the exponent of the counted work, for attention makes it more than 1.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import machine, shapes
from benchmarks.figures import bar, finish
from benchmarks.harness import main
from benchmarks.learner import Flops, Lengths, actor_of, count_flops, with_old
from benchmarks.peers.worker import versions
from benchmarks.training import names

TOLERANCE = 0.1
"""How far a fitted exponent may lie above what is demanded."""
PROMPT_TOKENS, NUM_SLOTS = 32, 64
KINDS = ("rollout", "actor step", "forward pass")
NOTES = [
    "Prompts of 32 tokens; the engine has 64 slots. A forward pass gives the log-probs of a batch, an actor step trains on "
    "it once in one minibatch. Every figure is a median; one run of each beforehand is not counted.",
    "Exponents are fitted to all sizes of a table: seconds = c x size^exponent. Demanded: 1 in batch and in parameters. In "
    "length, the exponent that the same fit gives for the counted work: operations for passes (linear layers and causal "
    "attention); for the rollout the bytes that it must read, weights and keys and values in every step.",
]


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    import torch

    torch.set_num_threads(options.threads)
    described = machine.describe(options.threads)
    print(f"{described['cpu']}, {options.threads} threads; matrix product {described['matrix_gflops']} GFLOP/s")
    measured = {
        axis: [measure(point, options.repeats) for point in points]
        for axis, points in axes(options.tiny).items()
        if axis in options.only
    }
    fits = {axis: fit(axis, points) for axis, points in measured.items()}
    bars = [
        bar(
            f"exponent of {kind} against {axis}, demanded {fits[axis][kind]['demanded']:.2f}",
            **bound_of(fits[axis][kind]),
        )
        for axis in fits
        for kind in KINDS
    ]
    finish(
        "scaling",
        options,
        bars,
        machine=described,
        notes=NOTES,
        versions={"pellucid": versions()},
        measured={axis: [point.as_dict() for point in points] for axis, points in measured.items()},
        exponents=fits,
        tables=[table(axis, points, fits[axis]) for axis, points in measured.items()],
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    every = tuple(axes(tiny=True))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=names(every), default=list(every), metavar="AXES", help=",".join(every))
    parser.add_argument("--repeats", type=int, help="measured runs of each figure (default 3; with --tiny 1)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default 2")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats if options.repeats is not None else 1 if options.tiny else 3
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Point:
    """One size on one axis. size: what the axis counts, or None for the parameters, which the model says."""

    shape: shapes.Shape
    batch: int
    new_tokens: int
    size: int | None

    @property
    def lengths(self) -> Lengths:
        return [(PROMPT_TOKENS, self.new_tokens)] * self.batch


def axes(tiny: bool) -> dict[str, list[Point]]:
    """Axis -> its points, in order of size."""
    base = shapes.TINY if tiny else shapes.S8
    lengths, batches = ((8, 16), (2, 4)) if tiny else ((64, 128, 256, 512, 1024), (16, 32, 64, 128, 256))
    widths = ((16, 1), (32, 2)) if tiny else ((192, 4), (288, 6), (384, 8), (480, 10))
    batch, new_tokens, samples = (2, 8, 2) if tiny else (8, 32, 16)
    return {
        "length": [Point(base, batch, n, n) for n in lengths],
        "batch": [Point(base, n, new_tokens, n) for n in batches],
        "parameters": [Point(_scaled(base, *width), samples, 2 * new_tokens, None) for width in widths],
    }


def _scaled(base: shapes.Shape, width: int, layers: int) -> shapes.Shape:
    """The base's proportions: as wide a head, an MLP as many times the width."""
    if (width, layers) == (base.hidden_size, base.num_layers):
        return base
    head = base.hidden_size // base.num_heads
    return replace(
        base,
        name=f"{base.name}-{width}x{layers}",
        hidden_size=width,
        num_layers=layers,
        num_heads=width // head,
        intermediate_size=width * base.intermediate_size // base.hidden_size,
    )


@dataclass(frozen=True)
class Measured:
    """seconds: kind -> those of each run. flops: of a forward pass. bytes_read: by the rollout, at least."""

    size: int
    seconds: dict[str, list[float]]
    flops: Flops
    bytes_read: int

    def median(self, kind: str) -> float:
        return statistics.median(self.seconds[kind])

    def work(self, kind: str) -> float:
        return float(self.bytes_read if kind == "rollout" else self.flops.forward)

    def as_dict(self) -> dict[str, Any]:
        flops = self.flops._asdict()
        return {"size": self.size, "seconds": self.seconds, "forward_flops": flops, "bytes_read": self.bytes_read}


def measure(point: Point, repeats: int, say: Callable[[str], None] = print) -> Measured:
    """One run of each kind that is not counted, then `repeats` of each."""
    from pellucid.models import load_causal_lm
    from pellucid.rollout.embedded import EmbeddedEngine
    from pellucid.types import Prompt, SamplingParams, collate

    model = load_causal_lm(str(shapes.policy(point.shape)), "cpu", "float32")
    rows = shapes.dense(point.shape, point.batch, PROMPT_TOKENS, point.new_tokens)["prompts"]
    prompts = [Prompt(i, ids, "") for i, ids in enumerate(rows)]
    engine = EmbeddedEngine(model.hf, num_slots=NUM_SLOTS)
    actor = actor_of(model, point.batch, point.new_tokens)
    batch = collate(engine.generate(prompts, SamplingParams(point.new_tokens)), pad_id=0)
    trained = with_old(batch, actor)
    work: dict[str, Callable[[], Any]] = {
        "rollout": lambda: engine.generate(prompts, SamplingParams(point.new_tokens)),
        "actor step": lambda: actor.update(trained, 0.0, 0),
        "forward pass": lambda: actor.logprobs(batch),
    }
    actor.update(trained, 0.0, 0)
    seconds = {kind: [] for kind in work}
    for _ in range(repeats):
        for kind, run in work.items():
            if kind == "actor step":
                trained = with_old(batch, actor)
            started = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - started)
    parameters = sum(p.numel() for p in model.hf.parameters())
    size = parameters if point.size is None else point.size
    found = Measured(size, seconds, count_flops(model.hf, point.lengths), rollout_bytes(model.hf, point))
    medians = ", ".join(f"{kind} {found.median(kind):.2f} s" for kind in KINDS)
    say(f"{point.shape.name}, {point.batch} x ({PROMPT_TOKENS} + {point.new_tokens}): {medians}")
    return found


def rollout_bytes(hf: Any, point: Point) -> int:
    """What decoding reads at least: all weights once a step for as many sequences as there are slots, and each sequence's
    keys and values at every token."""
    config = hf.config
    dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * dim * config.num_hidden_layers * hf.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    seen = sum(PROMPT_TOKENS + i for i in range(point.new_tokens))
    return weights * point.new_tokens * math.ceil(point.batch / NUM_SLOTS) + per_token * seen * point.batch


# ---------------------------------------------------------------- fits


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The e of cost = c * size ** e, by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def fit(axis: str, points: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """kind -> {"fitted", "demanded"}."""
    sizes = [float(point.size) for point in points]
    return {
        kind: {
            "fitted": exponent(sizes, [point.median(kind) for point in points]),
            "demanded": exponent(sizes, [point.work(kind) for point in points]) if axis == "length" else 1.0,
        }
        for kind in KINDS
    }


def bound_of(fitted: dict[str, float]) -> dict[str, Any]:
    return {"values": fitted["fitted"], "bound": round(fitted["demanded"] + TOLERANCE, 3), "at_least": False}


def table(axis: str, points: Sequence[Measured], fits: dict[str, dict[str, float]]) -> dict[str, Any]:
    columns = [axis, *(f"{kind}, s" for kind in KINDS), "GFLOP a forward pass"]
    rows = [
        [f"{point.size:,}", *(f"{point.median(kind):.3f}" for kind in KINDS), f"{point.flops.forward / 1e9:,.1f}"]
        for point in points
    ]
    for name in ("fitted", "demanded"):
        rows.append([f"exponent, {name}", *(f"{fits[kind][name]:.2f}" for kind in KINDS), ""])
    return {"title": f"Against {axis}", "columns": columns, "rows": rows}


if __name__ == "__main__":
    main(command)
