"""Run directories as the payloads that the inspector's pages ask for; the server and the bundle both take them from here.

A payload has a path, such as `run/0/step/12/samples.json`. Importing this needs neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pellucid.errors import PellucidError, RecordError
from pellucid.inspector import rollout_payloads
from pellucid.inspector.encode import clean, to_json
from pellucid.inspector.folder import FOREIGN, RunFolder, Stamp, relative, unreadable
from pellucid.trace import manifest_path, open_rollout, rollout_path

STAGES_BEFORE = ("sft", "rm")
"""Run directories inside a quickstart's, of the stages before PPO."""
CACHED_CHARACTERS = 64 * 2**20
"""How much finished JSON is kept, the least recently used going first."""


class NotThere(PellucidError):
    """No run, step or chunk of that number."""


class RunLibrary:
    """Several run directories under the ids "0", "1", ….

    run_dirs: as the user gave them; a quickstart's sft/ and rm/ follow as runs of their own. live: whether the pages go on
    asking. keeps: which recorded steps are shown. Payloads may be asked for from several threads at once.
    """

    def __init__(
        self, run_dirs: Sequence[Path], live: bool = True, keeps: Callable[[int], bool] = lambda step: True
    ) -> None:
        self.live = live
        self.names: list[str] = []
        self.folders: list[RunFolder] = []
        for run_dir in run_dirs:
            name = run_dir.resolve().name
            self._add(name, run_dir, keeps)
            for stage in STAGES_BEFORE:
                inside = (run_dir / stage).resolve().is_relative_to(run_dir.resolve())
                if inside and (run_dir / stage / "config.toml").is_file():
                    self._add(f"{name}/{stage}", run_dir / stage, keeps)
        self._routes = tuple((re.compile(pattern), *rest) for pattern, *rest in self._patterns())
        self._finished: OrderedDict[str, tuple[tuple[Stamp, ...], str]] = OrderedDict()
        self._lock = threading.Lock()

    def _add(self, name: str, path: Path, keeps: Callable[[int], bool]) -> None:
        self.names.append(name)
        self.folders.append(RunFolder(path, keeps))

    def json(self, path: str) -> str:
        """The payload of a path, as JSON. Raises NotThere for a path that names nothing, RecordError for a damaged file."""
        for pattern, build, files in self._routes:
            found = pattern.fullmatch(path)
            if found:
                try:
                    return self._json(path, build, files, tuple(int(number) for number in found.groups()))
                except FOREIGN as error:
                    raise unreadable(Path(path), error) from error
        raise NotThere(f"the inspector has nothing under the name {path[:80]!r}")

    def paths(self) -> Iterator[str]:
        """Every path that has a payload now, damaged ones left out: what a bundle holds."""
        yield "runs.json"
        for run, folder in enumerate(self.folders):
            yield from (f"run/{run}/{name}.json" for name in ("state", "config", "metrics", "prompts"))
            for step in folder.steps():
                at = f"run/{run}/step/{step}"
                yield f"{at}/step.json"
                try:
                    chunks = folder.num_chunks(step)
                except RecordError:
                    continue
                yield from (f"{at}/{name}.json" for name in ("samples", "check"))
                yield from (f"{at}/chunk/{i}.json" for i in range(chunks))

    # -- from a path to its payload

    def _patterns(self) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
        """(pattern of the path, what makes the payload, the files that it depends on).

        A payload without files is made anew each time: its parts are remembered where they are read.
        """
        step = r"run/(\d{1,6})/step/(\d{1,12})"
        yield r"runs\.json", self._runs, ()
        yield r"run/(\d{1,6})/state\.json", self._state, ()
        yield r"run/(\d{1,6})/config\.json", self._config, ()
        yield r"run/(\d{1,6})/metrics\.json", self._metrics, ()
        yield r"run/(\d{1,6})/prompts\.json", self._prompts, ()
        yield rf"{step}/step\.json", self._step, ()
        yield rf"{step}/samples\.json", self._samples, (rollout_path,)
        yield rf"{step}/check\.json", self._check, (rollout_path, manifest_path)
        yield rf"{step}/chunk/(\d{{1,9}})\.json", self._chunk, (rollout_path, "vocabulary.parquet")

    def _json(self, path: str, build: Callable[..., Any], files: tuple[Any, ...], numbers: tuple[int, ...]) -> str:
        if not files:
            return to_json(build(*numbers))
        folder, step = self._folder(numbers[0]), numbers[1]
        names = [file if isinstance(file, str) else relative(file, step) for file in files]
        stamps = tuple(folder.stamp(name) for name in names)
        with self._lock:
            known = self._finished.get(path)
            if known is not None and known[0] == stamps:
                self._finished.move_to_end(path)
                return known[1]
        text = to_json(build(*numbers))
        with self._lock:
            self._finished[path] = (stamps, text)
            self._finished.move_to_end(path)
            while len(self._finished) > 1 and sum(len(text) for _, text in self._finished.values()) > CACHED_CHARACTERS:
                self._finished.popitem(last=False)
        return text

    def _folder(self, run: int) -> RunFolder:
        if run >= len(self.folders):
            raise NotThere(f"run {run}: there is none; the runs are 0 to {len(self.folders) - 1}")
        return self.folders[run]

    def _require_step(self, folder: RunFolder, step: int) -> None:
        if not folder.has(step):
            raise NotThere(f"{folder.path}: step {step} is not recorded, or its record was not kept")

    def _of_rollout(self, run: int, step: int, make: Callable[[Any], Any]) -> Any:
        """make(the step's open Parquet file)."""
        folder = self._folder(run)
        self._require_step(folder, step)
        path = folder.file(relative(rollout_path, step))
        try:
            with open_rollout(path) as file:
                return make(file)
        except FOREIGN as error:
            raise unreadable(path, error) from error

    # -- the payloads

    def _runs(self) -> dict[str, Any]:
        runs = [
            {"id": str(i), "name": name, "path": str(folder.path) if self.live else name}
            for i, (name, folder) in enumerate(zip(self.names, self.folders, strict=True))
        ]
        return {"pellucid": _version(), "live": self.live, "runs": runs}

    def _state(self, run: int) -> dict[str, Any]:
        return self._folder(run).state()

    def _config(self, run: int) -> dict[str, Any]:
        folder = self._folder(run)
        toml, config = _or(("", {}), folder.config)
        return {"toml": toml, "config": clean(config), "summary": clean(_or(None, folder.summary))}

    def _metrics(self, run: int) -> dict[str, Any]:
        """Columns in order of their first appearance, step first; None where a step does not have the metric."""
        rows = self._folder(run).metrics().rows
        names = dict.fromkeys(["step", *(name for row in rows for name in row)])
        return {"columns": {name: [_number(row.get(name)) for row in rows] for name in names}}

    def _prompts(self, run: int) -> dict[str, Any]:
        """Where each prompt was sampled: prompt id -> [[step, row of the file], …]."""
        folder = self._folder(run)
        places: dict[str, list[list[int]]] = {}
        for step in folder.steps():
            for row, prompt in enumerate(_or((), lambda step=step: folder.prompt_ids(step))):
                places.setdefault(str(prompt), []).append([step, row])
        return {"prompts": places}

    def _step(self, run: int, step: int) -> dict[str, Any]:
        folder = self._folder(run)
        self._require_step(folder, step)
        spans = _or([], lambda: folder.spans(step))
        start = min((span["ts"] for span in spans), default=0)
        timeline = [
            {name: span["args"].get(name) for name in ("role", "rank", "kind", "tokens")}
            | {"name": span["name"], "start": (span["ts"] - start) / 1e6, "seconds": span["dur"] / 1e6}
            for span in spans
        ]
        manifest = _or(None, lambda: folder.manifest(step))
        faults = [fault._asdict() for fault in folder.step_faults(step)]
        return clean({"manifest": manifest, "spans": timeline, "faults": faults})

    def _samples(self, run: int, step: int) -> dict[str, Any]:
        return self._of_rollout(run, step, rollout_payloads.sample_table)

    def _check(self, run: int, step: int) -> dict[str, Any]:
        folder = self._folder(run)
        self._require_step(folder, step)
        manifest = folder.manifest(step)
        return {"whitening": self._of_rollout(run, step, lambda file: rollout_payloads.whitening(file, manifest))}

    def _chunk(self, run: int, step: int, index: int) -> dict[str, Any]:
        def make(file: Any) -> dict[str, Any]:
            chunks = rollout_payloads.num_chunks(file)
            if index >= chunks:
                raise NotThere(f"step {step}: chunk {index} is not there; the chunks are 0 to {chunks - 1}")
            return rollout_payloads.chunk(file, index, _or(None, self._folder(run).vocabulary))

        return self._of_rollout(run, step, make)


def _or(otherwise: Any, read: Callable[[], Any]) -> Any:
    """What read gives, or otherwise where the file is damaged: state.json names it among the faults."""
    try:
        return read()
    except RecordError:
        return otherwise


def _number(value: Any) -> float | None:
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None


def _version() -> str:
    try:
        return metadata.version("pellucid")
    except metadata.PackageNotFoundError:
        return "unknown"
