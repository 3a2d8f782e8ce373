"""Pellucid: RLHF that can be seen through."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["PPOConfig", "RMConfig", "SFTConfig", "__version__", "replay", "train_ppo", "train_rm", "train_sft"]

_HOME = {
    "PPOConfig": "pellucid.config",
    "RMConfig": "pellucid.config",
    "SFTConfig": "pellucid.config",
    "replay": "pellucid.stages.replay",
    "train_ppo": "pellucid.stages.run",
    "train_rm": "pellucid.stages.supervised",
    "train_sft": "pellucid.stages.supervised",
}


def __getattr__(name: str) -> Any:
    """The API, imported when first asked for, so that `pellucid --help` does not wait for torch."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
