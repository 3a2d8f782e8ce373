"""A run that goes on while its page is open: new steps come by themselves, also after kill -9 and --resume."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser.pages import Page, shows
from browser.programs import ENVIRONMENT, served
from records import write_run

pytestmark = pytest.mark.integration

STEPS = 9
SMALL = (
    f"--total-steps {STEPS} --rollout.prompts-per-step 16 --rollout.max-new-tokens 16 --algo.minibatch-size 16 "
    "--algo.micro-batch-size 16 --eval.every 0 --run.checkpoint-every 2 --run.threads 1"
)


@contextmanager
def training(recorded: Path, run_dir: Path, *more: str) -> Iterator[subprocess.Popen]:
    """`pellucid ppo` with the quickstart's own config and models, in small steps."""
    command = [sys.executable, "-m", "pellucid.cli", "ppo", str(recorded / "config.toml"), "--run.dir", str(run_dir)]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *SMALL.split(), *more], env=ENVIRONMENT, **output) as process:
        try:
            yield process
        finally:
            process.kill()


def newest(page: Page) -> int:
    """The last step that the page offers, 0 for none."""
    return page.run("return Number(document.querySelector('.shell-steps input')?.max ?? 0)")


def curve(page: Page) -> str:
    """What the first picture says of itself to who cannot see it: its last values."""
    return page.run("return document.querySelector('.run-picture .plot')?.getAttribute('aria-label') ?? ''")


def recorded_in(run_dir: Path, at_least: int, process: subprocess.Popen) -> int:
    """The number of steps that are recorded, once there are so many; the process is stopped then, so that it stays true."""
    end = time.monotonic() + 90
    while len(list(run_dir.glob("rollouts/step-*.parquet"))) < at_least:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{at_least} steps: not within 90 s"
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    return len(list(run_dir.glob("rollouts/step-*.parquet")))


def test_a_run_is_followed_through_kill_and_resume_to_its_end(page, recorded, tmp_path):
    run_dir = tmp_path / "mine"
    with training(recorded, run_dir) as process:
        steps = recorded_in(run_dir, 1, process)
        with served(run_dir) as address:
            page.open(f"{address}#/run/0", ".run-picture canvas")
            page.run("window.before = 1")
            page.wait(lambda: newest(page) == steps, "the first steps")
            assert re.match(r"live · \d\d:\d\d:\d\d", page.text(".shell-live"))
            assert page.text(".run-summary .empty") == "summary.json is written at the end of the run."
            before = curve(page)
            process.send_signal(signal.SIGCONT)
            killed_at = recorded_in(run_dir, steps + 3, process)
            page.wait(lambda: newest(page) == killed_at and curve(page) != before, "the next steps")
            process.send_signal(signal.SIGKILL)
            check_usable(page, killed_at)
            with training(recorded, run_dir, "--resume"):
                page.go("#/run/0", ".run-picture canvas")
                page.wait(lambda: newest(page) == STEPS, "the last step", 120)
                page.wait(lambda: page.text(".shell-live") == "finished", "the end", 30)
            check_finished(page, run_dir)
            assert page.run("return window.before") == 1, "the page was loaded again"
            page.leave()  # before the server goes


def check_usable(page: Page, step: int) -> None:
    """After kill -9: every page of the last step, with nothing in a banner."""
    for place, there in (
        ("", ".step-node"),
        ("/samples", ".samples-table td"),
        ("/sample/1", ".token-part .token-right"),
    ):
        page.go(f"#/run/0/step/{step}{place}", there)
        assert page.count(".banner, .failure") == 0, page.text("main")
    assert page.text(".shell-live").startswith("live")


def check_finished(page: Page, run_dir: Path) -> None:
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    page.wait(lambda: page.count(".run-summary td"), "the summary")
    assert [row["step"] for row in metrics if row["step"]] == list(range(1, STEPS + 1))
    rows = {row[0]: row for row in page.table(".run-figures")}
    figure, _, step = rows["score/mean"][3].partition(" step ")
    assert int(step) == STEPS and shows(figure, metrics[-1]["score/mean"])
    page.go(f"#/run/0/step/{STEPS}/sample/2", ".token-part .token-right")
    assert page.count(".banner, .token-contradiction") == 0


def test_the_step_in_view_stays_while_new_ones_come(page, tmp_path):
    """A reader of an older step is not moved on."""
    run_dir = write_run(tmp_path / "run", 3, 12, 24, finished=False)
    last = [
        path.rename(path.with_suffix(".later"))
        for path in sorted(run_dir.glob("*/step-000003.*"))
        if path.suffix != ".jsonl"
    ]
    with served(run_dir) as address:
        page.open(f"{address}#/run/0/step/1/sample/4/token/7", ".token-line")
        before = page.text(".token-story")
        for path in last:  # the Parquet file comes last, as the recorder writes it
            path.rename(path.with_suffix(".json" if "manifests" in str(path) else ".parquet"))
        page.wait(lambda: newest(page) == 3, "the new step")
        assert page.place == "#/run/0/step/1/sample/4/token/7" and page.text(".token-story") == before
        page.press("}")
        page.wait(lambda: page.place == "#/run/0/step/3/sample/4", "the newest step")
        page.settled(".token-line")
        (run_dir / "summary.json").write_text('{"steps": 3}')
        page.wait(lambda: page.text(".shell-live") == "finished", "the end")
        page.leave()  # before the server goes


def test_a_server_that_ends_and_comes_back(page, tmp_path):
    run_dir = write_run(tmp_path / "run", 2, 12, 24, finished=False)
    with served(run_dir) as address:
        page.open(f"{address}#/run/0/step/1/samples", ".samples-table td")
    page.wait(lambda: page.text(".shell-live") == "no answer", "that the server is gone")
    assert page.count(".samples-table td") and "pellucid view RUN_DIR" in page.text(".failure")
    port = address.rstrip("/").rpartition(":")[2]
    with served(run_dir, "--port", port) as again:
        assert again == address
        page.wait(lambda: page.text(".shell-live").startswith("live"), "the server")
        page.wait(lambda: page.count(".failure") == 0, "the failure to go")
        page.press("4")
        page.settled(".token-line")
        page.leave()
    assert [message for message in page.errors() if "net::ERR_" not in message] == []
