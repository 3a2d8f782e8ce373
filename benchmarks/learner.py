"""The learner alone: how near an actor step comes to the machine's matrix products, and what ragged lengths cost.

    python -m benchmarks.learner                        writes benchmarks/results/learner.json
    python -m benchmarks.learner --rounds 3 --json other.json
    python -m benchmarks.learner --tiny                 seconds, a tiny model; writes nothing unless told to

A step is `ActorWorker.update`: one epoch, one minibatch, forward, backward, clipping, Adam and its audits. Its operations are
counted, not estimated: what the mathematics needs, forward once and backward twice that. What the implementation computes
again (the LM head's logits, parts of attention) is its own affair and is not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, memory, shapes
from benchmarks.figures import bar, finish
from benchmarks.harness import main
from benchmarks.peers.worker import versions

SHARE_BOUND, PACKING_BOUND = 0.50, 1.15
FORWARD_AND_BACKWARD = 3
"""Operations of a step over those of its forward pass: the backward pass has two products for each of the forward's."""
LEARNING_RATE = 1e-7
"""So small that a step's work is repeated, not another policy's."""
MICRO_BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)
DENSE, EQUAL, RAGGED, PADDED = "dense", "equal lengths", "ragged", "ragged, padded"
NOTES = [
    "A step is one call of the actor's `update`: 64 sequences, one epoch, one minibatch; dense ones have 32 prompt and 128 "
    "response tokens. Before each, old log-probs come from the current weights, so that the ratio is 1 at the start; that "
    "pass is not timed.",
    "Operations: 2 per weight of a linear layer and token, the LM head on response tokens only, causal attention "
    "4 x width x L(L+1)/2 per layer and sequence of L tokens; three times that for forward and backward. Recomputation is "
    "not counted. The share is that over seconds, over the rate of a large square matrix product measured just before.",
    "Packing: ragged sequences have 16 to 160 tokens, evenly spread, a fifth of each the prompt; equal lengths are as many "
    "sequences with the same tokens in all, so that the ratio of their seconds is that of the times per token. Padded is the "
    "same work with `packing = false`, for information.",
]
Lengths = list[tuple[int, int]]
"""(prompt, response) of each sequence, in tokens."""


def command(arguments: list[str]) -> None:
    options = _parse(arguments)
    from pellucid.models import load_causal_lm, resolve_precision

    described = machine.describe(options.threads)
    print(f"{described['cpu']}, {options.threads} threads; matrix product {described['matrix_gflops']} GFLOP/s")
    shape = shapes.TINY if options.tiny else shapes.S8
    folder = str(shapes.policy(shape))
    precision = resolve_precision(options.precision, "cpu")
    described["precision"] = precision
    works = workloads(options.tiny)
    runs = [
        Steps(name, load_causal_lm(folder, "cpu", precision, packing=name != PADDED), lengths, shape.vocab_size)
        for name, lengths in works.items()
    ]
    rates = rounds(runs, options.rounds, lambda: machine.matrix_gflops(precision, options.threads))
    table = micro_batch_table(shape, works[DENSE], precision, options)
    seconds = {run.name: run.seconds for run in runs}
    bars = bars_of(runs, rates)
    finish(
        "learner",
        options,
        bars,
        machine=described,
        notes=[*NOTES, f"Precision: {precision}."],
        versions={"pellucid": versions()},
        workload={name: {"sequences": len(w), "tokens": sum(map(sum, w))} for name, w in works.items()},
        operations={run.name: run.flops.step for run in runs},
        seconds=seconds,
        matrix_gflops_by_round=rates,
        tables=[step_table(runs, rates), table],
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="measured steps of each kind (default 5; with --tiny 1)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default 2")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.tiny else 5
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


# ---------------------------------------------------------------- workloads


def workloads(tiny: bool) -> dict[str, Lengths]:
    """name -> lengths of its sequences."""
    if tiny:
        ragged, dense = spread(4, 8, 24), [(4, 12)] * 4
    else:
        ragged, dense = spread(64, 16, 160), [(32, 128)] * 64
    return {DENSE: dense, EQUAL: equal(ragged), RAGGED: ragged, PADDED: ragged}


def spread(count: int, shortest: int, longest: int) -> Lengths:
    """Sequences of evenly spaced lengths, shuffled, a fifth of each the prompt."""
    sizes = [round(shortest + (longest - shortest) * i / (count - 1)) for i in range(count)]
    random.Random(0).shuffle(sizes)
    return [(size // 5, size - size // 5) for size in sizes]


def equal(lengths: Lengths) -> Lengths:
    """As many sequences with the same tokens, all of one length; a token more in some where it does not divide."""
    prompts, responses = (_shared(sum(column), len(lengths)) for column in zip(*lengths, strict=True))
    return list(zip(prompts, reversed(responses), strict=True))


def _shared(total: int, count: int) -> list[int]:
    """total in count parts that differ by 1 at most, the larger ones first."""
    small, left = divmod(total, count)
    return [small + (i < left) for i in range(count)]


def random_batch(lengths: Lengths, vocab_size: int, seed: int = 0) -> Any:
    """A Batch of random tokens with these lengths."""
    from pellucid.types import Prompt, Sample, collate

    chance = random.Random(seed)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        ids = [chance.randrange(1, vocab_size) for _ in range(prompt + response)]
        mask = [False] * prompt + [True] * response
        samples.append(Sample(Prompt(i, ids[:prompt], ""), i, 0, ids, mask, [0.0] * len(ids), "length", 0))
    return collate(samples, pad_id=0)


# ---------------------------------------------------------------- operations


class Flops(NamedTuple):
    """Operations of a forward pass, by what does them."""

    linear: int
    head: int
    attention: int

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def step(self) -> int:
        return FORWARD_AND_BACKWARD * self.forward


def count_flops(hf: Any, lengths: Lengths, head: bool = True) -> Flops:
    """What a pass of the causal LM `hf` over these sequences needs, without padding and without logits of prompts."""
    from torch import nn

    weights = sum(module.weight.numel() for module in hf.base_model.modules() if isinstance(module, nn.Linear))
    config = hf.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 2 * 2 * config.num_attention_heads * dim * config.num_hidden_layers  # scores, and what they weigh
    totals = [prompt + response for prompt, response in lengths]
    responses = sum(response for _, response in lengths)
    return Flops(
        linear=2 * weights * sum(totals),
        head=2 * hf.get_output_embeddings().weight.numel() * responses if head else 0,
        attention=per_pair * sum(n * (n + 1) // 2 for n in totals),
    )


# ---------------------------------------------------------------- steps


class Steps:
    """An actor and a batch to train it on, again and again. seconds: of the measured steps."""

    def __init__(
        self, name: str, model: Any, lengths: Lengths, vocab_size: int, micro_batch_tokens: int | None = None
    ) -> None:
        self.name, self.lengths = name, lengths
        self.flops = count_flops(model.hf, lengths)
        self.actor = actor_of(model, len(lengths), max(r for _, r in lengths), micro_batch_tokens)
        self.batch = random_batch(lengths, vocab_size)
        self.seconds: list[float] = []

    def run(self) -> float:
        """One step, timed. Its old log-probs are made before, untimed."""
        batch = with_old(self.batch, self.actor)
        started = clock(self.actor.model.device)
        self.actor.update(batch, kl_coef=0.0, seed=len(self.seconds))
        return clock(self.actor.model.device) - started


def clock(device: Any) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def actor_of(model: Any, minibatch_size: int, max_new_tokens: int, micro_batch_tokens: int | None = None) -> Any:
    """An ActorWorker of one epoch. micro_batch_tokens: None for the default."""
    from pellucid.config import AlgoConfig, OptimizerConfig
    from pellucid.execution.workers import ActorWorker

    chosen = {} if micro_batch_tokens is None else {"micro_batch_tokens": micro_batch_tokens}
    algo = AlgoConfig(num_epochs=1, minibatch_size=minibatch_size, **chosen)
    optimizer = OptimizerConfig(lr=LEARNING_RATE, anneal=False)
    return ActorWorker(model, 1.0, algo, optimizer, 1, max_new_tokens)


def with_old(batch: Any, actor: Any) -> Any:
    """The batch with what an update reads: old log-probs and entropies of the current weights, and advantages."""
    import torch

    logprobs, entropy = actor.logprobs(batch, entropy=True)
    advantages = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) * batch.action_mask
    return batch.having(old_logprobs=logprobs, entropy=entropy, advantages=advantages)


def rounds(
    runs: Sequence[Steps], count: int, rate: Callable[[], float], say: Callable[[str], None] = print
) -> list[float]:
    """One warm-up each, then `count` rounds: the matrix rate, then each in turn. Returns the rates, in GFLOP/s."""
    rates = []
    for run in runs:
        run.run()
    for number in range(count):
        rates.append(rate())
        for run in runs:
            run.seconds.append(run.run())
        took = ", ".join(f"{run.name} {run.seconds[-1]:.2f} s" for run in runs)
        say(f"round {number + 1}: matrix product {rates[-1]:,.1f} GFLOP/s; {took}")
    return rates


def shares(run: Steps, rates: Sequence[float]) -> list[float]:
    """Of the matrix-product rate, round by round."""
    return [run.flops.step / took / 1e9 / rate for took, rate in zip(run.seconds, rates, strict=True)]


# ---------------------------------------------------------------- results


def bars_of(runs: Sequence[Steps], rates: Sequence[float]) -> list[dict[str, Any]]:
    by_name = {run.name: run for run in runs}
    ragged, same = by_name[RAGGED].seconds, by_name[EQUAL].seconds
    ratios = [a / b for a, b in zip(ragged, same, strict=True)]
    return [
        bar("actor step: share of the matrix-product rate", shares(by_name[DENSE], rates), SHARE_BOUND),
        bar("packing: time per real token, ragged over equal lengths", ratios, PACKING_BOUND, at_least=False),
    ]


def step_table(runs: Sequence[Steps], rates: Sequence[float]) -> dict[str, Any]:
    columns = ["sequences", "tokens", "GFLOP", "seconds", "µs a token", "share of the matrix rate"]
    rows = []
    for run in runs:
        tokens, median = sum(map(sum, run.lengths)), statistics.median(run.seconds)
        share = statistics.median(shares(run, rates))
        spread = f"{median:.2f} ({min(run.seconds):.2f} to {max(run.seconds):.2f})"
        row = [run.name, f"{tokens:,}", f"{run.flops.step / 1e9:,.0f}", spread, f"{median / tokens * 1e6:.0f}"]
        rows.append([*row, f"{share:.2f}"])
    return {"title": "Actor step", "columns": columns, "rows": rows}


def micro_batch_table(
    shape: shapes.Shape, lengths: Lengths, precision: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and memory of the dense step, each size in a process of its own."""
    sizes = MICRO_BATCH_TOKENS[:2] if options.tiny else MICRO_BATCH_TOKENS
    common = {"shape": shape, "lengths": lengths, "precision": precision, "threads": options.threads}
    runs = 1 if options.tiny else 3
    cases = [memory.Case(update_memory, {**common, "tokens": size, "runs": runs}) for size in sizes]
    rows = []
    for size, found in zip(sizes, memory.measure(cases), strict=True):
        seconds = statistics.median(found["seconds"])
        print(
            f"micro-batches of {size} tokens: {seconds:.2f} s, {found['above'] / 2**20:.0f} MiB above the level before"
        )
        rows.append([f"{size:,}", f"{seconds:.2f}", *(f"{found[key] / 2**20:,.0f}" for key in ("above", "peak"))])
    columns = ["micro_batch_tokens", "seconds", "MiB above the level before", "MiB in all"]
    return {
        "title": f"Actor step, {DENSE}: how many tokens go through the model at once",
        "columns": columns,
        "rows": rows,
    }


def update_memory(
    shape: shapes.Shape, lengths: Lengths, precision: Any, threads: int, tokens: int, runs: int
) -> dict[str, Any]:
    """In a process of its own: one step that makes Adam's state, then `runs` more with micro-batches of `tokens`."""
    import torch

    from pellucid.models import load_causal_lm

    torch.set_num_threads(threads)
    model = load_causal_lm(str(shapes.policy(shape)), "cpu", precision)
    steps = Steps("", model, lengths, shape.vocab_size, tokens)
    steps.run()
    steps.actor.learner.zero_grad()
    with memory.Watch() as watch:
        seconds = [steps.run() for _ in range(runs)]
    return {"seconds": seconds, **watch.figures()}


if __name__ == "__main__":
    main(command)
