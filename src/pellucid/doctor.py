"""`pellucid doctor`: what this machine and this installation can do, and one small proof that they do it right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from pellucid import __version__
from pellucid.data.sources import hub_offline, hub_reachable
from pellucid.models import native, new_causal_lm, resolve_device, resolve_precision
from pellucid.rollout import EmbeddedEngine
from pellucid.rollout.embedded_checks import available_bytes
from pellucid.stages.checks import check_parity, parity_gap
from pellucid.types import Prompt, SamplingParams, collate

EXTRAS = {
    "hub": "datasets", "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "imdb": "scikit-learn",
}  # fmt: skip
"""Extra -> the distribution that it installs."""
HUB_TIMEOUT = 3.0
"""Seconds to wait for the Hub's first answer."""
LOW_MEMORY, LOW_DISK = 2 << 30, 2 << 30
"""Bytes below which the quickstart may not get through."""


def doctor(say: Callable[[str], None] = print) -> int:
    """Print a table, then a line for each problem. Returns 0, or 2 when there is a problem."""
    problems: list[str] = []
    for name, look in CHECKS.items():
        try:
            say(f"{name:<12} {look(problems)}")
        except Exception as error:  # whatever is broken, the other lines are still of use
            say(f"{name:<12} failed")
            problems.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for problem in problems:
        say(f"problem: {problem}")
    say(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "all fine")
    return 2 if problems else 0


def _versions(_: list[str]) -> str:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "pydantic")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return f"pellucid {__version__}, Python {platform.python_version()}, {', '.join(found)}"


def _cpu(_: list[str]) -> str:
    capabilities = torch.cpu.get_capabilities()
    known = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    units = ", ".join(name for name in known if capabilities.get(name))
    return (
        f"{os.cpu_count()} cores, run.threads 0 takes {torch.get_num_threads()} of them; {units or platform.machine()}"
    )


def _memory(problems: list[str]) -> str:
    free = available_bytes(torch.device("cpu"))
    if free is None:
        return "unknown"
    if free < LOW_MEMORY:
        problems.append(f"memory: {_gib(free)} are free, the quickstart needs about {_gib(LOW_MEMORY)}")
    return f"{_gib(free)} free"


def _disk(problems: list[str]) -> str:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if free < LOW_DISK:
        problems.append(f"disk: {_gib(free)} are free in {here}; checkpoints need room, choose another run.dir")
    if not os.access(here, os.W_OK):
        problems.append(f"disk: {here} is not writable; choose another run.dir")
    return f"{_gib(free)} free in {here}"


def _auto(_: list[str]) -> str:
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {_gib(memory)}"
    else:
        where = "PyTorch sees no CUDA device"
    fast = "has" if precision == "bfloat16" else "has no"
    units = "bfloat16 arithmetic" if device == "cuda" else "AVX512-BF16 or AMX"
    return f"device {device} ({where}), precision {precision} (it {fast} {units})"


def _extras(_: list[str]) -> str:
    found, absent = [], []
    for extra, distribution in EXTRAS.items():
        try:
            found.append(f"{extra} ({distribution} {importlib.metadata.version(distribution)})")
        except importlib.metadata.PackageNotFoundError:
            absent.append(extra)
    missing = f"; absent: {', '.join(absent)} (pip install 'pellucid[NAME]')" if absent else ""
    return (", ".join(found) or "none") + missing


def _hub(_: list[str]) -> str:
    if hub_offline():
        return "offline by HF_HUB_OFFLINE: cached models and data only"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    # A resolver that hangs does not heed the timeout of a connection, so the question waits in a thread.
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(hub_reachable(HUB_TIMEOUT)), daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    if any(answers):
        return f"{endpoint} answers"
    return f"{endpoint} cannot be reached: local folders, files and the built-in corpus work"


def _kernels(_: list[str]) -> str:
    reason = native.why_not()
    return "compiled for this CPU" if reason is None else f"none: {reason}; sampling on a CPU is slower without"


def _self_test(_: list[str]) -> str:
    """Sample from a new two-layer model, then score the samples as the trainer does: the log-probs must agree.

    Raises IntegrityError when they do not.
    """
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    model = new_causal_lm(
        vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, context=64, eos_id=0, pad_id=1,
        seed=0, device=device, precision=precision,
    )  # fmt: skip
    prompts = [Prompt(i, list(range(2, 5 + 3 * i)), "") for i in range(4)]
    params = SamplingParams(max_new_tokens=16, stop_token_ids=(0,), samples_per_prompt=2)
    batch = collate(EmbeddedEngine(model.hf, num_slots=3).generate(prompts, params), pad_id=1)
    on_device = batch.to(device)
    with torch.no_grad():
        logprobs, _entropy = model.logprobs(
            on_device.input_ids, on_device.attention_mask, on_device.action_mask, temperature=1.0
        )
    logprobs = logprobs.cpu()
    check_parity(batch, logprobs, precision, step=0)
    gap = parity_gap(batch, logprobs)
    return f"engine against trainer on {len(gap)} sampled tokens: log-probs differ by {gap.max():.1e} nats at most"


CHECKS: dict[str, Callable[[list[str]], str]] = {
    "versions": _versions,
    "cpu": _cpu,
    "memory": _memory,
    "disk": _disk,
    "auto": _auto,
    "extras": _extras,
    "hub": _hub,
    "kernels": _kernels,
    "self-test": _self_test,
}


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
