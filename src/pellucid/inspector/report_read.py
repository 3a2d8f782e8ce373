"""A run directory as a report needs it: whatever of it can be read. What cannot is named in `faults`, and raises nothing."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pellucid.errors import CheckpointError, RecordError
from pellucid.trace import read_manifest

RUN_FILES = ("config.toml", "metrics.jsonl", "summary.json")
STAGES_BEFORE = ("sft", "rm")
"""Folders of a quickstart's run directory that are run directories themselves, in the order of training."""
EVAL_FILE = re.compile(r"step-(\d{6,})\.jsonl")
LARGEST_STEP, LARGEST_VALUE = 10**12, 1e100
"""Beyond these a metric is damage: sums and axes of it would overflow."""

Points = dict[str, list[tuple[int, float]]]
"""Metric name -> (step, value) where the metric was defined, by ascending step."""


class Fault(NamedTuple):
    """file: relative to the run directory, with `/` at the end of a folder's name. problem: a clause without a full stop."""

    file: str
    problem: str


@dataclass(frozen=True)
class Run:
    """One run directory. kind: ppo, sft, rm, or unknown. folder: where its files are named from, "" or "sft/"."""

    path: Path
    folder: str
    kind: str
    config: dict[str, Any]
    toml: str
    points: Points
    steps_done: int
    summary: dict[str, Any] | None
    weights: dict[str, dict[str, Any]]
    """Role -> what the last manifest says of its weights (parameters, precision); empty without a record."""
    faults: list[Fault]


class Pair(NamedTuple):
    """Rows of two evaluations on one prompt; before is None where there is one evaluation only."""

    prompt: str
    before: dict[str, Any] | None
    after: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Held-out samples of the first and the last evaluation that can be read, matched by prompt, in file order."""

    first_step: int | None
    last_step: int
    pairs: list[Pair]

    def outcome(self, key: str) -> tuple[int, int, int] | None:
        """In how many pairs `key` is (higher, equal, lower) after than before; None where it is not in every pair."""
        both = [(number(p.before.get(key)), number(p.after.get(key))) for p in self.pairs if p.before]
        if not both or any(a is None or b is None for a, b in both):
            return None
        signs = [(b > a) - (b < a) for a, b in both if a is not None and b is not None]
        return signs.count(1), signs.count(0), signs.count(-1)


def read_runs(run_dir: Path) -> list[Run]:
    """The run, and of a quickstart also the stages before it that there are. The run itself comes first.

    Raises CheckpointError where there is no run directory.
    """
    if not run_dir.is_dir():
        what = "is not a folder" if run_dir.exists() else "no such folder"
        raise CheckpointError(f"{run_dir}: {what}; give the run directory (run.dir) of a run")
    stages = [name for name in STAGES_BEFORE if _holds_run(run_dir / name)]
    if not (_holds_run(run_dir) or stages):
        raise CheckpointError(
            f"{run_dir}: holds none of {', '.join(RUN_FILES)}, so it is not a run directory; give the run.dir of a run"
        )
    main = read_run(run_dir, "", "ppo" if stages else None)
    return [main, *(read_run(run_dir / name, f"{name}/", name) for name in stages)]


def read_run(path: Path, folder: str, kind: str | None) -> Run:
    """kind: found out from the files where it is None."""
    faults: list[Fault] = []
    toml = _read_text(path, "config.toml", folder, faults) or ""
    config = _parse_config(toml, folder, faults)
    points, steps_done = _read_metrics(path, folder, faults)
    return Run(
        path=path,
        folder=folder,
        kind=kind or _kind(config, points),
        config=config,
        toml=toml,
        points=points,
        steps_done=steps_done,
        summary=_read_summary(path, folder, faults),
        weights=_read_weights(path, folder, faults),
        faults=faults,
    )


def read_samples(run: Run) -> Samples | None:
    """None where no evaluation can be read, which is then among the run's faults."""
    folder = run.path / "eval"
    found = (EVAL_FILE.fullmatch(file.name) for file in folder.glob("step-*.jsonl"))
    steps = sorted(int(match[1]) for match in found if match)
    if not steps:
        run.faults.append(
            Fault("eval/", "no held-out samples here: eval_data was not set, or the run did not get that far")
        )
        return None
    if steps[0] != 0:
        run.faults.append(Fault("eval/step-000000.jsonl", f"is missing; step {steps[0]} stands for the state before"))
    before = _first_readable(run, iter(steps))
    if before is None:
        return None
    after = _first_readable(run, iter([step for step in reversed(steps) if step > before[0]]))
    if after is None:
        return Samples(None, before[0], [Pair(row["prompt"], None, row) for row in before[1]])
    earlier = _by_prompt(before[1])
    pairs = [Pair(key[0], earlier[key], row) for key, row in _by_prompt(after[1]).items() if key in earlier]
    if not pairs:
        problem = f"shares no prompt with step {before[0]}; its samples are shown alone"
        run.faults.append(Fault(f"eval/step-{after[0]:06d}.jsonl", problem))
        return Samples(None, after[0], [Pair(row["prompt"], None, row) for row in after[1]])
    return Samples(before[0], after[0], pairs)


def number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


# ---------------------------------------------------------------- one file each


def _holds_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def _read_text(path: Path, name: str, folder: str, faults: list[Fault], missing: str = "is missing") -> str | None:
    try:
        return (path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        faults.append(Fault(folder + name, missing))
    except OSError as error:
        faults.append(Fault(folder + name, f"cannot be read: {error.strerror or error}"))
    return None


def _parse_config(toml: str, folder: str, faults: list[Fault]) -> dict[str, Any]:
    try:
        return tomllib.loads(toml)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        faults.append(Fault(f"{folder}config.toml", f"is not valid TOML: {error}"))
        return {}


def _parse_json(text: str) -> Any:
    """None for whatever is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_metrics(path: Path, folder: str, faults: list[Fault]) -> tuple[Points, int]:
    """(points, the last step). Of a step that is there twice, the later line counts."""
    text = _read_text(path, "metrics.jsonl", folder, faults)
    rows: dict[int, dict[str, Any]] = {}
    damaged = []
    for index, line in enumerate((text or "").split("\n"), 1):
        if not line.strip():
            continue
        row = _parse_json(line)
        step = number(row.get("step")) if isinstance(row, dict) else None
        if step is None or not 0 <= step <= LARGEST_STEP:
            damaged.append(index)
        else:
            rows[int(step)] = row
    if damaged:
        lines = (
            f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines, the first line {damaged[0]}, are"
        )
        faults.append(Fault(f"{folder}metrics.jsonl", f"{lines} damaged or cut short, and left out"))
    elif text is not None and not rows:
        faults.append(Fault(f"{folder}metrics.jsonl", "holds no step yet"))
    points: Points = {}
    for step, row in sorted(rows.items()):
        for name, value in row.items():
            finite = number(value)
            if name != "step" and finite is not None and abs(finite) < LARGEST_VALUE:
                points.setdefault(name, []).append((step, finite))
    return points, max(rows, default=0)


def _read_summary(path: Path, folder: str, faults: list[Fault]) -> dict[str, Any] | None:
    missing = "is not there: the run has not finished, or was stopped"
    text = _read_text(path, "summary.json", folder, faults, missing)
    if text is None:
        return None
    summary = _parse_json(text)
    if isinstance(summary, dict):
        return summary
    faults.append(Fault(f"{folder}summary.json", "is damaged: not a JSON object"))
    return None


def _read_weights(path: Path, folder: str, faults: list[Fault]) -> dict[str, dict[str, Any]]:
    """From the last manifest; a run without a record has none, which is no fault."""
    newest = max((path / "manifests").glob("step-*.json"), default=None)
    if newest is None:
        return {}
    try:
        weights = read_manifest(newest).get("weights")
    except (RecordError, RecursionError) as error:
        problem = str(error).removeprefix(f"{newest}: ")
        faults.append(Fault(f"{folder}manifests/{newest.name}", problem))
        return {}
    if not isinstance(weights, list):
        return {}
    return {w["role"]: w for w in weights if isinstance(w, dict) and isinstance(w.get("role"), str)}


def _kind(config: dict[str, Any], points: Points) -> str:
    """By the keys that only one kind of config has, else by the metrics that only one kind of run logs."""
    if "rollout" in config or "score/mean" in points:
        return "ppo"
    if "center_prompts" in config or "train/pair_loss" in points:
        return "rm"
    return "sft" if "learn" in config or "train/nll" in points else "unknown"


def _first_readable(run: Run, steps: Iterator[int]) -> tuple[int, list[dict[str, Any]]] | None:
    for step in steps:
        rows = _read_evaluation(run, step)
        if rows:
            return step, rows
    return None


def _read_evaluation(run: Run, step: int) -> list[dict[str, Any]]:
    name = f"eval/step-{step:06d}.jsonl"
    # Not splitlines: a completion may hold U+2028 and its like, which JSON leaves as they are.
    lines = [line for line in (_read_text(run.path, name, "", run.faults) or "").split("\n") if line.strip()]
    rows = [row for row in map(_parse_json, lines) if _is_sample(row)]
    if len(rows) < len(lines) or not lines:
        problem = f"{len(lines) - len(rows)} of {len(lines)} lines are damaged, and left out" if lines else "is empty"
        run.faults.append(Fault(name, problem))
    return rows


def _is_sample(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)


def _by_prompt(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(prompt, how many of the same came before) -> row, in file order."""
    seen: dict[str, int] = {}
    keyed = {}
    for row in rows:
        count = seen.get(row["prompt"], 0)
        keyed[row["prompt"], count] = row
        seen[row["prompt"]] = count + 1
    return keyed
