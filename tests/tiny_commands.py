"""Tiny runs of the real commands: models and data of a few kilobytes, configs of a few steps, processes that start fast.

A run in a process of its own is forked from a server that has imported everything, so that it starts in milliseconds
and a test can kill dozens of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

CONTEXT = 96
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "context": CONTEXT}
RUN = {"threads": 1, "device": "cpu", "precision": "float32"}

WORDS = ["tea", "soup", "bread", "salad", "cake", "fish", "rice", "plate", "spoon", "guest", "table", "window"]
SUPERVISED = [
    {"prompt": f"The {a} was", "completion": f" good with {b} and {a}."} for a in WORDS[:6] for b in WORDS[6:10]
]
PAIRS = [
    {"prompt": f"The {a}", "chosen": f" is good, {b}.", "rejected": " is bad."} for a in WORDS[:6] for b in WORDS[6:9]
]
PROMPTS = [{"prompt": f"The {a} was", "mark": i} for i, a in enumerate(WORDS)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_toml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(config), encoding="utf-8")
    return path


def make_models(folder: Path) -> tuple[Path, Path]:
    """(policy, reward model): Llamas of two layers with one byte-level tokenizer between them."""
    from pellucid.data import train_bpe
    from pellucid.execution.local import save_model
    from pellucid.models import load_scalar_model, new_causal_lm

    tokenizer = train_bpe([row["prompt"] + row["completion"] for row in SUPERVISED], vocab_size=300)
    policy = new_causal_lm(
        **SHAPE, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, seed=0,
        device="cpu", precision="float32",
    )  # fmt: skip
    save_model(policy, tokenizer, folder / "policy")
    reward = load_scalar_model(str(folder / "policy"), "cpu", "float32", tokenizer.pad_token_id, seed=1)
    save_model(reward, tokenizer, folder / "reward")
    return folder / "policy", folder / "reward"


def make_data(folder: Path) -> Path:
    write_jsonl(folder / "supervised.jsonl", SUPERVISED)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    return folder


def sft_config(home: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "run": RUN | {"dir": str(run_dir), "checkpoint_every": 2},
        "model": str(home / "policy"),
        "data": {"source": str(home / "supervised.jsonl"), "max_tokens": CONTEXT},
        "eval_data": {"source": str(home / "supervised.jsonl"), "max_tokens": CONTEXT, "limit": 4},
        "learn": {"max_steps": 5, "batch_size": 5, "micro_batch_size": 3, "eval_every": 3},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
    }


def rm_config(home: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "run": RUN | {"dir": str(run_dir), "checkpoint_every": 2},
        "model": str(home / "policy"),
        "data": {"source": str(home / "pairs.jsonl"), "max_tokens": CONTEXT},
        "eval_data": {"source": str(home / "pairs.jsonl"), "max_tokens": CONTEXT, "limit": 4},
        "learn": {"max_steps": 5, "batch_size": 5, "micro_batch_size": 3, "eval_every": 3},
        "optimizer": {"lr": 1e-2},
        "center_prompts": 4,
        "max_new_tokens": 5,
    }


def ppo_config(home: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Everything that a checkpoint has to carry is on: critic, adaptive KL, ptx, evaluation, best/."""
    config: dict[str, Any] = {
        "run": RUN | {"dir": str(run_dir), "checkpoint_every": 2},
        "models": {"actor": str(home / "policy"), "reward": str(home / "reward")},
        "data": {"source": str(home / "prompts.jsonl"), "max_tokens": 32},
        "eval_data": {"source": str(home / "prompts.jsonl"), "max_tokens": 32},
        "ptx_data": {"source": str(home / "supervised.jsonl"), "max_tokens": CONTEXT},
        "total_steps": 5,
        "rollout": {"prompts_per_step": 6, "max_new_tokens": 6, "num_slots": 4},
        "algo": {
            "num_epochs": 2, "minibatch_size": 4, "micro_batch_size": 3, "kl_target": 0.5, "kl_horizon": 50, "ptx_coef": 0.1,
        },
        "eval": {"every": 2, "num_prompts": 4},
        "actor_optimizer": {"lr": 1e-3},
        "critic_optimizer": {"lr": 1e-3},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = config[name] | section if isinstance(section, dict) and name in config else section
    return {name: section for name, section in config.items() if section is not None}


# ---------------------------------------------------------------- processes

PRELOAD = ["pellucid.stages.quickstart", "pellucid.stages.generate", "transformers.models.llama.modeling_llama"]
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Process:
    """`pellucid ARGUMENTS` in a process of its own.

    die_at: SIGKILL itself right before the n-th time (from 1) that it opens, renames, makes or removes something under
    `folder`. Its output goes to the file `log`, beside the folder; with die_at = 0 the events are listed there.
    setup: called in the process before anything else.
    """

    def __init__(
        self, arguments: list[str], folder: Path, die_at: int | None = None, setup: Callable[[], None] | None = None
    ) -> None:
        self.log = folder.parent / f"{folder.name}.log"
        self.log.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, __name__])
        self._process = context.Process(target=_main, args=(arguments, str(folder), str(self.log), die_at, setup))
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = 120) -> int:
        """The exit code; -9 when it was killed."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.log.read_text()}")
        self._process.close()
        return code

    def kill_when(self, happened: Callable[[], bool]) -> int:
        """Poll, and kill as soon as it happened. The exit code: -9, or that of a process that ended before."""
        while self.running:
            if happened():
                self.kill()
                break
            time.sleep(0.0005)
        return self.wait()


def _main(arguments: list[str], folder: str, log: str, die_at: int | None, setup: Callable[[], None] | None) -> None:
    from pellucid.cli import main

    if setup is not None:
        setup()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if die_at is not None:
        _die_at_file_event(folder, die_at)
    sys.exit(main(arguments))


def shrink_quickstart() -> None:
    """The three stages of the quickstart, with models and data of this file's size."""
    from pellucid.stages import quickstart

    whole = quickstart.stage_configs

    def tiny(config: Any) -> tuple[Any, ...]:
        small = {
            "run": RUN | {"checkpoint_every": 1},
            "new_model": SHAPE | {"vocab_size": 300, "context": 160},
            "data": {"limit": 20, "max_tokens": 150, "too_long": "truncate"},
            "eval_data": {"limit": 6, "max_tokens": 150, "too_long": "truncate"},
            "center_data": {"limit": 4, "max_tokens": 150},
            "center_prompts": 4,
            "learn": {"batch_size": 4, "micro_batch_size": 4},
            "max_new_tokens": 5,
            "rollout": {"prompts_per_step": 4, "max_new_tokens": 5},
            "algo": {"minibatch_size": 4, "micro_batch_size": 4},
            "eval": {"every": 1, "num_prompts": 4},
        }
        return tuple(_with(stage, small) for stage in whole(config))

    quickstart.stage_configs = tiny


def _with(config: Any, changes: dict[str, Any]) -> Any:
    tree = config.model_dump()
    for name, change in changes.items():
        if tree.get(name) is not None:
            tree[name] = tree[name] | change if isinstance(change, dict) else change
    return type(config).model_validate(tree)


def _die_at_file_event(folder: str, number: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(folder):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0:
            os.write(1, f"file event {seen}: {event} {arguments[0]}\n".encode())

    sys.addaudithook(hook)
