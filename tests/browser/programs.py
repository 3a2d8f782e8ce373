"""The command line in processes of its own, and what several workers make once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def pellucid(*arguments: str | Path) -> str:
    """What the command printed; it must end well."""
    command = [sys.executable, "-m", "pellucid.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def served(*arguments: Path | str) -> Iterator[str]:
    """The address of `pellucid view`, with these run directories and options, which serves meanwhile."""
    command = [sys.executable, "-m", "pellucid.cli", "view", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("http://"), process.stderr.read()
            yield line.split()[0]
        finally:
            process.kill()


def shared(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker makes, and all use; not to be changed."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with _locked(root / f"{name}.lock"):
        if not (root / f"{name}.done").exists():
            shutil.rmtree(root / name, ignore_errors=True)  # of a worker that failed
            make(root / name)
            (root / f"{name}.done").touch()
    return root / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    import fcntl  # not everywhere where Python is

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
