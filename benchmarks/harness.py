"""What every benchmark shares: contestants in processes of their own, run in turn.

    contestant = Contestant("trl", python_of("trl-1.12"), "ppo_trl.py", spec)
    outcome = alternate([pellucid, contestant], rounds=5)

What comes of the runs is `figures.py`'s business.

`peers/worker.py` is the other end, and says what goes over the wire. Only one contestant computes at any time: the others
are stopped.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
RESULTS = HERE / "results"
CACHE = HERE / ".cache"
TAIL_LINES = 25
Run = dict[str, Any]
"""What a contestant returned for one run: "seconds", "tokens", "peak_rss_bytes", and what the benchmark adds."""


class BenchmarkError(Exception):
    """Something that the user can act on, in a sentence. The command exits with code 2."""


class ContestantError(BenchmarkError):
    """A contestant died, hung, or said that it cannot run. `reason` is one line; the message adds its last output."""

    def __init__(self, name: str, reason: str, tail: str = "") -> None:
        super().__init__(f"{name}: {reason}" + (f"\nlast output of {name}:\n{tail}" if tail else ""))
        self.name, self.reason = name, reason


@dataclass
class Contestant:
    """One system under measurement: `python peers/script SPEC.json`, started on first use.

    spec: {"model": folder, "precision": "float32" | "bfloat16", "threads": n, "workload": file, "options": {...}}.
    variant: its settings in some words, where a system is tried with several. env: variables to add to this process's.
    start_deadline, run_deadline: seconds until it counts as hung. As a context manager it is closed at the end.
    """

    name: str
    python: Path | str
    script: str
    spec: dict[str, Any]
    variant: str = ""
    env: dict[str, str] = field(default_factory=dict)
    start_deadline: float = 600
    run_deadline: float = 900
    versions: dict[str, str] = field(default_factory=dict, init=False)
    about: dict[str, Any] = field(default_factory=dict, init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _replies: queue.Queue[str | None] = field(default_factory=queue.Queue, init=False, repr=False)
    _log: Path | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def label(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def start(self) -> None:
        """Start the process and wait until it has prepared. Raises ContestantError. No effect if it runs already."""
        if self._process is not None:
            return
        folder = Path(tempfile.mkdtemp(prefix="contestant-", dir=_made(CACHE / "logs")))
        (folder / "spec.json").write_text(json.dumps(self.spec))
        self._log = folder / "output.log"
        threads = str(self.spec.get("threads", 1))
        env = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **self.env}
        script = self.script if os.path.isabs(self.script) else str(PEERS / self.script)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(self.python), script, str(folder / "spec.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
                start_new_session=True,  # so that a kill reaches whatever it started
            )
        threading.Thread(target=self._listen, args=(self._process.stdout, self._replies), daemon=True).start()
        ready = self._answer(self.start_deadline, "did not get ready")
        self._signal(signal.SIGSTOP)
        self.versions, self.about = ready.get("versions", {}), ready.get("about", {})

    def run(self) -> Run:
        """One measured run. Starts the process if it is not running. Raises ContestantError."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it is dead; reading its answer says so
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        run = self._answer(self.run_deadline, "did not finish a run")
        self._signal(signal.SIGSTOP)
        missing = {"seconds", "tokens"} - set(run)
        if missing:
            raise self._failed(f"returned no {' and no '.join(sorted(missing))}")
        return run

    def close(self) -> None:
        """End the process and all that it started: by the end of its input, or by force after some seconds."""
        if self._process is None or self._log is None:
            return
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(timeout=30)
        self._kill()
        shutil.rmtree(self._log.parent, ignore_errors=True)

    def _signal(self, which: signal.Signals) -> None:
        """Stops between its runs keep a contestant that polls while it waits (vLLM's does) from slowing the others."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, which)  # the session's group, which outlives its leader

    @staticmethod
    def _listen(stream: Any, replies: queue.Queue[str | None]) -> None:
        with stream:
            for line in stream:
                replies.put(line)
        replies.put(None)

    def _answer(self, deadline: float, complaint: str) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=deadline)
        except queue.Empty:
            raise self._failed(f"{complaint} within {deadline:g} s") from None
        if line is None:
            assert self._process is not None
            status = self._process.wait()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise self._failed(f"ended without an answer ({how})")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            raise self._failed(f"answered with something that is not JSON: {line.strip()[:200]}") from None
        if "error" in reply:
            raise self._failed(str(reply["error"]))
        return reply

    def _failed(self, reason: str) -> ContestantError:
        self._kill()
        lines = self._log.read_text(errors="replace").splitlines() if self._log else []
        return ContestantError(self.label, reason, "\n".join(lines[-TAIL_LINES:]))

    def _kill(self) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process = None


@dataclass
class Outcome:
    """runs: name -> one Run a round. failures: name -> why it could not take part. variants: name -> what was tried."""

    runs: dict[str, list[Run]]
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    tried: dict[str, dict[str, Any]] = field(default_factory=dict)


def at_its_best(
    variants: Sequence[Contestant], say: Callable[[str], None] = print
) -> tuple[Contestant, dict[str, Any]]:
    """The variant of one system with most tokens per second, running, and what each variant reached.

    Each makes a warm-up run and a measured one; the others are closed. Returns (winner, {variant: tokens per second, or why
    it failed}). Raises the first ContestantError if all fail.
    """
    rates: dict[str, Any] = {}
    best: Contestant | None = None
    best_rate, first_error = 0.0, None
    for variant in variants:
        try:
            variant.run()
            measured = variant.run()
        except ContestantError as error:
            first_error = first_error or error
            rates[variant.variant] = f"failed: {error.reason}"
            say(f"  {variant.label}: {error.reason}")
            continue
        rate = measured["tokens"] / measured["seconds"]
        rates[variant.variant] = round(rate, 1)
        say(f"  {variant.label}: {rate:,.0f} tokens/s")
        loser = variant
        if rate > best_rate:
            loser, best, best_rate = best, variant, rate
        if loser is not None:
            loser.close()
    if best is None:
        raise first_error or BenchmarkError("no variant to try")
    return best, rates


def alternate(
    contestants: Sequence[Contestant | Sequence[Contestant]],
    rounds: int,
    required: Sequence[str] = ("pellucid",),
    say: Callable[[str], None] = print,
) -> Outcome:
    """One warm-up run each, then `rounds` rounds in which each runs once, in turn. Closes them all at the end.

    An entry that is a list holds the variants of one system; its best is chosen first (`at_its_best`). A contestant that
    fails is left out from then on, with the reason in `failures`, unless its name is in `required`: then the error is
    raised.
    """
    outcome = Outcome(runs={})
    running: list[Contestant] = []
    every = [c for entry in contestants for c in ([entry] if isinstance(entry, Contestant) else entry)]

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ContestantError as error:
            if name in required:
                raise
            say(f"{error}\n{name} is left out.")
            outcome.failures[name] = error.reason
            outcome.runs.pop(name, None)
            return None

    try:
        for entry in contestants:
            variants = [entry] if isinstance(entry, Contestant) else list(entry)
            name = variants[0].name
            chosen = attempt(name, lambda variants=variants: _warmed_up(variants, outcome, say))
            if chosen is not None:
                running.append(chosen)
                outcome.runs[name] = []
                outcome.versions[name] = chosen.versions
                if chosen.variant:
                    outcome.chosen[name] = chosen.variant
        for number in range(rounds):
            for contestant in [c for c in running if c.name in outcome.runs]:
                run = attempt(contestant.name, contestant.run)
                if run is not None:
                    outcome.runs[contestant.name].append(run)
                    say(f"round {number + 1}: {contestant.name} {run['seconds']:.2f} s, {run['tokens']} tokens")
    finally:
        for contestant in every:
            contestant.close()
    return outcome


def _warmed_up(variants: list[Contestant], outcome: Outcome, say: Callable[[str], None]) -> Contestant:
    if len(variants) == 1:
        variants[0].run()
        return variants[0]
    best, outcome.tried[variants[0].name] = at_its_best(variants, say)
    return best


def main(command: Callable[[list[str]], None]) -> None:
    """Run a benchmark's command: a BenchmarkError is its message and exit code 2, not a traceback.

    A termination is an exception like any other, so that no contestant outlives the benchmark.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        command(sys.argv[1:])
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
