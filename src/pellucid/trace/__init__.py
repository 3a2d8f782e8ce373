"""The record of a run: every token with its numbers, who made them, and where the seconds went.

Written by `Recorder` (which needs torch, and is imported from `pellucid.trace.record`), read by the functions here (which
need neither torch nor transformers). docs/record.md describes the files.
"""

from pellucid.errors import RecordError
from pellucid.trace.read import (
    manifest_path,
    open_rollout,
    read_manifest,
    read_rollout,
    read_spans,
    read_vocabulary,
    recorded_steps,
    rollout_path,
)
from pellucid.trace.schema import BY_NAME, COLUMNS, SCHEMA_VERSION, Column

__all__ = [
    "BY_NAME",
    "COLUMNS",
    "SCHEMA_VERSION",
    "Column",
    "RecordError",
    "manifest_path",
    "open_rollout",
    "read_manifest",
    "read_rollout",
    "read_spans",
    "read_vocabulary",
    "recorded_steps",
    "rollout_path",
]
