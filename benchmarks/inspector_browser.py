"""Both ends of `benchmarks.inspector`: a record, the server process over it, and a headless Chromium with a probe inside.

`inspector_probe.js` is the probe; every page that the browser loads has it as `Probe`.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import CACHE, BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
WRITER = (ROOT / "tests" / "records.py", ROOT / "tests" / "record_files.py")
PROBE = (Path(__file__).resolve().parent / "inspector_probe.js").read_text()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOW = "1280,900"
SWITCHES = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", f"window-size={WINDOW}",
)  # fmt: skip
START_DEADLINE = 60
"""Seconds until a server that has not said its address counts as hung."""


def record(name: str, *arguments: str) -> Path:
    """A synthetic run directory, written by tests/records.py with `arguments`; kept until those files or arguments change."""
    digest = hashlib.blake2b("\0".join(arguments).encode(), digest_size=6)
    for path in WRITER:
        digest.update(path.read_bytes())
    folder = CACHE / "records" / name
    target = folder / digest.hexdigest()
    if not target.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        partial = folder / "partial"
        written = subprocess.run([sys.executable, WRITER[0], partial, *arguments], capture_output=True, text=True)
        if written.returncode:
            raise BenchmarkError(f"{WRITER[0]} could not write the record: {written.stderr.strip()[-300:]}")
        partial.rename(target)
    return target


class Server(NamedTuple):
    """A running `pellucid view`. seconds: from its start until it said its address."""

    address: str
    seconds: float
    pid: int

    def memory(self) -> tuple[int, int] | None:
        """(resident bytes now, the most there have been); None where the system does not tell."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        now, most = (int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, most


@contextmanager
def serve(*run_dirs: Path) -> Iterator[Server]:
    """A fresh server process over the run directories, until the block ends."""
    command = [sys.executable, "-m", "pellucid.cli", "view", *map(str, run_dirs)]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], START_DEADLINE)
            line = process.stdout.readline() if ready else ""
            seconds = time.perf_counter() - started
            if not line.startswith("http"):
                complaints.seek(0)
                said = complaints.read().strip()[-300:] or f"no address within {START_DEADLINE} s"
                raise BenchmarkError(f"pellucid view did not start: {said}")
            yield Server(line.split()[0], seconds, process.pid)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


class Browser:
    """A headless Chromium, ended by `close`. version: of it and of its driver.

    Raises BenchmarkError where there is no driver or browser, or it does not start.
    """

    def __init__(self) -> None:
        driver = shutil.which("chromedriver")
        if driver is None:
            raise BenchmarkError(
                "chromedriver is not on the PATH, which drives the browser; install Chromium and its driver (on Debian the "
                "packages chromium and chromium-driver)"
            )
        try:
            from selenium import webdriver
            from selenium.common import WebDriverException
        except ModuleNotFoundError:
            raise BenchmarkError(
                "selenium is missing, which talks to the browser: pip install 'pellucid[dev]'"
            ) from None
        self._error = WebDriverException
        self._profile = tempfile.mkdtemp(prefix="pellucid-browser-")
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)), "")
        for switch in (*SWITCHES, f"user-data-dir={self._profile}"):
            options.add_argument(f"--{switch}")
        try:
            self._driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        except WebDriverException as error:
            self.close()
            raise BenchmarkError(
                f"Chromium did not start under {driver}: {(error.msg or '').splitlines()[0]}"
            ) from None
        self._driver.set_script_timeout(120)
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PROBE})
        self.version = f"Chromium {self._driver.capabilities['browserVersion']}"

    def load(self, address: str, content: tuple[str, ...]) -> dict[str, Any]:
        """Probe.load of a page, with nothing in the cache; the navigation starts from an empty page."""
        self._driver.get("about:blank")
        self._driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        # The probe waits for the content from the first moment on, and not from when the page is loaded.
        watch = f"window.Loaded = Probe.load({json.dumps(content)}); window.Loaded.catch(() => {{}});"
        script = self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": watch})
        try:
            self._driver.get(address)
            return self.ask("Loaded")
        finally:
            self._driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)

    def ask(self, promise: str) -> Any:
        """What a promise of the page comes to. promise: a JavaScript expression."""
        answer = "(value) => arguments[0]([value, null]), (error) => arguments[0]([null, error.message])"
        try:
            value, error = self._driver.execute_async_script(f"({promise}).then({answer});")
        except self._error as failure:
            raise BenchmarkError(f"the page did not answer {promise}: {(failure.msg or '').splitlines()[0]}") from None
        if error:
            raise BenchmarkError(f"the page did not answer {promise}: {error}")
        return value

    def click(self, token: int) -> float:
        """Milliseconds from a mouse click on a token until its story was drawn."""
        place = self._driver.execute_script(f"return Probe.awaitClick({token})")
        mouse = {**place, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self._driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **mouse})
        return self.ask("Probe.answer")

    def close(self) -> None:
        if hasattr(self, "_driver"):
            with suppress(self._error, OSError):
                self._driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)
