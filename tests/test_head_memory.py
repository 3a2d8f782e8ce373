"""Peak memory of an actor step does not grow with vocabulary x tokens: measured, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from dataclasses import replace
from pellucid import models
from pellucid.config import AlgoConfig, OptimizerConfig
from pellucid.execution.workers import ActorWorker
from pellucid.types import Prompt, Sample, collate

if sys.argv[1] == "whole":
    models.CHUNK_ELEMENTS = 1 << 40  # as if nobody had cut the logits into chunks
torch.set_num_threads(1)
LENGTH = 128


def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024


def peak(vocabulary, tokens):
    '''Bytes that one actor step needs beyond what stands before it.'''
    model = models.new_causal_lm(
        vocab_size=vocabulary, hidden_size=16, num_layers=1, num_heads=1, intermediate_size=16, context=LENGTH,
        eos_id=0, pad_id=0, seed=0, device="cpu", precision="float32",
    )
    n = tokens // LENGTH
    algo = AlgoConfig(num_epochs=1, minibatch_size=n, micro_batch_size=n)
    worker = ActorWorker(model, 1.0, algo, OptimizerConfig(), 2, LENGTH)
    ids = torch.randint(vocabulary, (n, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    mask = [False] + [True] * (LENGTH - 1)
    batch = collate([Sample(Prompt(0, row[:1], ""), 0, 0, row, mask, [0.0] * LENGTH, "stop", 0) for row in ids], 0)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    old, entropy = worker.logprobs(batch, entropy=True)
    worker.update(batch.having(old_logprobs=old, advantages=old.sin()), 0.0, 0)
    return status("VmHWM") - before


peak(256, 2 * LENGTH)  # warm up: libraries allocate on first use
print(json.dumps({f"{v}x{n}": peak(v, n) for v, n in ((4096, 1024), (8192, 1024), (4096, 2048), (8192, 2048))}))
"""


def measure(how: str) -> dict[str, int]:
    """Peak bytes by "vocabulary x tokens"."""
    source = Path(__file__).parents[1] / "src"
    # Freed memory goes back to the system at once, so that the high-water mark is that of live tensors.
    environment = os.environ | {
        "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def growth(peaks: dict[str, int]) -> float:
    """What doubling both adds beyond what doubling each adds: the part that is vocabulary x tokens, in logits."""
    crossed = peaks["8192x2048"] - peaks["8192x1024"] - peaks["4096x2048"] + peaks["4096x1024"]
    return crossed / (4 * 4096 * 1024)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_an_actor_step_does_not_grow_with_vocabulary_times_tokens():
    peaks = measure("chunks")
    logits = 4 * 8192 * 2048  # bytes of one (B,T,V) tensor at the largest
    assert abs(growth(peaks)) < 0.3, peaks
    assert peaks["8192x2048"] - peaks["4096x1024"] < 0.5 * logits, peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_measurement_sees_logits_that_are_held_whole():
    peaks = measure("whole")
    assert growth(peaks) > 2, peaks
