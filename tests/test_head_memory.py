"""Peak memory of an actor step does not grow with vocabulary x tokens: measured, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pellucid.models import native

SCRIPT = """
import json
import torch
from pellucid import models
from pellucid.config import AlgoConfig, OptimizerConfig
from pellucid.execution.workers import ActorWorker
from pellucid.types import Prompt, Sample, collate

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


def doubled(vocabulary, tokens):
    return [peak(v, n) for v, n in ((vocabulary, tokens), (2 * vocabulary, tokens), (vocabulary, 2 * tokens),
                                    (2 * vocabulary, 2 * tokens))]


peak(256, 2 * LENGTH)  # warm up: libraries allocate on first use
chunks = doubled(4096, 1024)
models.head.CHUNK_ELEMENTS = 1 << 40  # as if nobody had cut the logits into chunks
print(json.dumps({"chunks": chunks, "whole": doubled(4096, 1024)}))
"""


@pytest.fixture(scope="module", params=["PyTorch", "kernels"])
def head(request: pytest.FixtureRequest) -> str:
    """Which of the two LM heads runs."""
    if request.param == "kernels" and native.load() is None:
        pytest.skip(f"no kernels here: {native.why_not()}")
    return request.param


@pytest.fixture(scope="module")
def peaks(head: str) -> dict[str, list[int]]:
    """Peak bytes of a step, with and without chunks: of V x N, 2V x N, V x 2N, 2V x 2N."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    # Freed memory goes back to the system at once, so that the high-water mark is that of live tensors.
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1",
        "PELLUCID_NATIVE": str(int(head == "kernels")),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def crossed(one: int, more_vocabulary: int, more_tokens: int, both: int) -> int:
    """Bytes that doubling both adds beyond what doubling each adds: the part that grows with their product."""
    return both - more_vocabulary - more_tokens + one


def test_peak_memory_of_an_actor_step_does_not_grow_with_vocabulary_times_tokens(peaks):
    logits = 4 * 4096 * 1024  # bytes of the smallest (B,T,V) tensor
    assert abs(crossed(*peaks["chunks"])) < 0.3 * logits, peaks
    assert peaks["chunks"][3] - peaks["chunks"][0] < logits, peaks  # of one (B,T,V) tensor it would be 3 times that


def test_the_measurement_sees_logits_that_are_held_whole(peaks, head):
    logits = 4 * 4096 * 1024
    copies = 1.5 if head == "kernels" else 2  # of which the kernels hold two, logits and gradient, and PyTorch more
    assert crossed(*peaks["whole"]) > copies * logits, peaks
