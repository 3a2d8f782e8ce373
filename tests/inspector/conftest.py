"""Synthetic runs to look into: one to read, and one of its own for a test that damages it."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import HOSTILE, write_run

from pellucid.inspector.library import RunLibrary


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Path:
    """A finished quickstart of two steps with 40 samples each; not to be changed."""
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    return write_run(run_dir, 2, 40, 30, alternatives=3, texts=HOSTILE, quickstart=True)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A small run that is still going, for the test to damage."""
    return write_run(tmp_path / "run", 2, 8, 24, finished=False)


@pytest.fixture(scope="session")
def library(recorded) -> RunLibrary:
    return RunLibrary([recorded])
