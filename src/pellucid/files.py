"""Files that are whole or absent: everything is written beside its final name, synced, and renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pellucid.errors import CheckpointError

WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)
"""Errors of the operating system that are about the disk, not about this code."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error.errno, error.strerror or str(error)) from error
    except SafetensorError as error:  # written in Rust, which wraps the system's error in text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise unwritable(path, int(number[1]), os.strerror(int(number[1]))) from error


def unwritable(path: Path, number: int | None, reason: str | None) -> CheckpointError:
    """What a user reads when path cannot be written."""
    advice = {
        errno.ENOSPC: "; free some space",
        errno.EDQUOT: "; free some space",
        errno.EACCES: "; choose another folder, or change its permissions",
        errno.EROFS: "; choose another folder",
    }.get(number or 0, "")
    reason = reason or "unknown reason"
    return CheckpointError(f"{path}: cannot be written: {reason}{advice}")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a scratch folder beside path that takes its name, whole, when the block ends without an exception."""
    scratch, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with writing(path):
        for leftover in (scratch, old):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
            for file in scratch.rglob("*"):
                sync(file)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        scratch.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a scratch file's path beside path; the file takes path's name, whole, when the block ends."""
    scratch = path.with_name(f".{path.name}.partial")
    with writing(path):
        yield scratch
        sync(scratch)
        scratch.replace(path)


def atomic_write(path: Path, text: str) -> None:
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
