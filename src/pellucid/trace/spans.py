"""spans.json: what ran when, on which role and rank, in Chrome's trace format (chrome://tracing, Perfetto).

The file is a JSON array with one event a line. It is appended to, and whole after every append; a crash in the middle of
one leaves a last line that readers drop, as the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pellucid.files import atomic_write, writing
from pellucid.trace.read import read_spans
from pellucid.trace.schema import KINDS, PRODUCERS

ROLES = ("driver", "rollout", "actor", "reference", "reward", "critic")
"""Each is a process of the trace, by its place here; its ranks are the threads."""
TAIL = b"\n]\n"


class Span(NamedTuple):
    """One phase of a step. start: seconds since the epoch. tokens: how many it went over, None where that says nothing."""

    phase: str
    start: float
    seconds: float
    tokens: int | None = None
    rank: int = 0


class SpanFile:
    """The spans.json of one run."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        """Opens the file, and drops what it holds beyond after_step: a resumed run does those steps again."""
        self.path = path
        kept = [event for event in read_spans(path) if event["args"]["step"] <= after_step]
        names = (
            {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": role}}
            for pid, role in enumerate(ROLES)
        )
        atomic_write(path, "[\n" + ",\n".join(map(json.dumps, [*names, *kept])) + TAIL.decode())

    def append(self, step: int, spans: Iterable[Span]) -> None:
        lines = [json.dumps(_event(step, span)) for span in spans]
        if not lines:
            return
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(-len(TAIL), os.SEEK_END)
            file.write((",\n" + ",\n".join(lines)).encode() + TAIL)


def _event(step: int, span: Span) -> dict[str, Any]:
    role = PRODUCERS[span.phase]
    kind = KINDS.get(span.phase, "driver")
    args = {"step": step, "role": role, "rank": span.rank, "kind": kind, "tokens": span.tokens}
    return {
        "name": span.phase, "cat": "phase", "ph": "X", "pid": ROLES.index(role), "tid": span.rank,
        "ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6), "args": args,
    }  # fmt: skip
