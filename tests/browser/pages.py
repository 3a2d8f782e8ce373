"""The page as a reader has it: places to open, things to click, and figures to read off the screen."""

from __future__ import annotations

import math
import re
import subprocess
import time
import unicodedata
from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-extensions disable-dev-shm-usage window-size=1280,900 lang=en-US"
)
PLACES = {
    "run": "#/run/0", "step": "#/run/0/step/2", "samples": "#/run/0/step/2/samples",
    "token": "#/run/0/step/2/sample/5/token/20",
}  # fmt: skip
DRAWN = {"run": ".run-figures tr", "step": ".step-flow svg", "samples": ".samples-table td", "token": ".token-line"}
"""What is on a page once it has what it asked for."""
DEADLINE = 15
"""Seconds for anything that the page does by itself."""


def start_chromium(binary: str, driver: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver, log_output=subprocess.DEVNULL))


class Page:
    """A browser window."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    # -- where it is

    def fresh(self) -> None:
        """As a new reader's browser: nothing remembered, wide, light."""
        self.leave()
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.emulate("light")
        self.errors()
        self.browser.get_log("performance")

    def leave(self) -> None:
        if self.browser.current_url.startswith(("http:", "file:")):
            self.run("try { localStorage.clear() } catch {}")
        self.browser.get("about:blank")

    def open(self, address: str, ready: str | None = None) -> None:
        """Loads the address anew (a deep link), and waits until what it shows is there."""
        self.browser.get("about:blank")
        self.browser.get(address)
        self.settled(ready)

    def go(self, place: str, ready: str | None = None) -> None:
        """To another place of the page, as a link does."""
        self.run("location.hash = arguments[0]", place)
        self.settled(ready)

    @property
    def place(self) -> str:
        return self.run("return location.hash")

    def emulate(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    # -- waiting

    def wait(self, test: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
        """The first true answer of test()."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = test()
            if answer:
                return answer
            time.sleep(0.03)
        raise AssertionError(f"{what}: not within {seconds} s; the page says: {self.text('main')[:600]}")

    def settled(self, ready: str | None = None) -> None:
        """Until nothing is loading, and `ready` (a selector) is there."""
        loaded = (
            "const m = document.querySelector('main'); return m && m.children.length && !m.querySelector('.loading')"
        )
        self.wait(lambda: self.run(loaded), "the page")
        if ready:
            self.wait(lambda: self.count(ready), ready)
        self.run_async("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    # -- reading

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def run_async(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_async_script(script, *arguments)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def text(self, selector: str) -> str:
        """What is to be read in the first element that matches, or nothing."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        """The whole text of each element that matches, whether it is in view or not."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.trim())", selector
        )

    def table(self, selector: str) -> list[list[str]]:
        """The cells of a table's rows, its head included."""
        script = """return [...document.querySelectorAll(`${arguments[0]} tr`)]
            .map((row) => [...row.children].map((cell) => cell.textContent.trim()))"""
        return self.run(script, selector)

    def errors(self) -> list[str]:
        """What the console has logged since it was last asked: errors and warnings."""
        return [
            entry["message"] for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]

    # -- doing

    def click(self, selector: str) -> None:
        """A real click, of the mouse."""
        element = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()

    def type(self, selector: str, text: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        """An option of a <select>."""
        self.click(f'{selector} option[value="{value}"]')


# ---------------------------------------------------------------- figures


UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "%": 1e-2, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
FIGURE = re.compile(r"[=✓ ]*([−-]?(?:∞|nan|[\d.,]+(?:e[−-]?\d+)?))(?: (\S+))?")


def parsed(text: str) -> tuple[float, float]:
    """(the number that is written, what its unit stands for) of a figure: "−1.5e−5", "1,024", "25.1 ms"."""
    found = FIGURE.fullmatch(text.strip())
    assert found, f"{text!r} is no figure"
    plain = found[1].replace("−", "-").replace(",", "").replace("∞", "inf")
    return float(plain), UNITS[found[2]] if found[2] else 1.0


def number(text: str) -> float:
    """The number that a figure stands for."""
    written, unit = parsed(text)
    return written * unit


def shows(text: str, value: float, digits: int = 4, slack: float = 0.0) -> bool:
    """Whether a figure is the value, rounded to that many significant digits. slack: more that may lie between them."""
    written, unit = parsed(text)
    value, slack = value / unit, slack / unit
    if value == 0 or not math.isfinite(value):
        return written == value or abs(written - value) <= slack
    place = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return abs(written - value) <= 0.501 * place + slack


def visible(text: str) -> str:
    """How the page writes a text: what cannot be seen, or moves other characters, as a mark."""
    signs, unseen = {"\n": "↵", "\t": "⇥"}, ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return "".join(signs.get(c, f"⟨U+{ord(c):04X}⟩") if unicodedata.category(c) in unseen else c for c in text)
