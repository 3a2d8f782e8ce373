"""The bundle: the same page from the disk and from a plain web server, with no request to anywhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.arithmetic import Step
from browser.pages import DRAWN, PLACES, Page
from browser.programs import pellucid, shared
from browser.test_token import STEP, check_arithmetic, open_token

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def bundle(recorded, tmp_path_factory) -> Path:
    def make(path: Path) -> None:
        assert str(path / "index.html") in pellucid("view", recorded, "--bundle", path)

    return shared(tmp_path_factory, "bundle", make)


@pytest.fixture(params=["file", "server"])
def place(request, bundle) -> Iterator[str]:
    """The address of the bundle: on the disk, and under `python -m http.server`."""
    if request.param == "file":
        yield f"{bundle.as_uri()}/index.html"
        return
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(bundle), "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process.stdout.readline().split("(")[1].split(")")[0]
        finally:
            process.kill()


def requests(page: Page) -> set[str]:
    """Every address that the browser asked for since it was last asked about."""
    messages = (json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance"))
    sent = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {url for url in sent if not url.startswith(("data:", "about:"))}


def test_every_page_opens(page, place):
    root = place.removesuffix("index.html")
    for name, hash_ in PLACES.items():
        page.open(place + hash_, DRAWN[name])
        assert page.count(".failure, .banner") == 0, page.text("main")
        asked = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert all(url.startswith((root, "data:")) for url in asked), asked
    sent = requests(page)
    assert sent and all(url.startswith(root) for url in sent), sorted(sent)
    assert any("/data/run/0/step/2/chunk/0.json.js" in url for url in sent)
    assert page.text(".shell-live") == "finished"


def test_a_token_has_the_same_arithmetic(page, place, recorded):
    step = Step(recorded, STEP)
    t = step.actions(7)[1]
    open_token(page, place, 7)
    page.click(f'[data-t="{t}"]')
    page.wait(lambda: page.text(".token-story h2") == f"Token {t}", f"token {t}")
    check_arithmetic(page, step, 7, t)


def test_its_links_and_keys_work(page, place):
    page.open(place, ".run-figures td")
    for key, there in (
        ("2", ".step-flow svg"),
        ("3", ".samples-table td"),
        ("4", ".token-line"),
        ("1", ".run-figures td"),
    ):
        page.press(key)
        page.settled(there)
    page.go("#/run/0/step/99", ".failure")
    assert "run/0/step/99/step.json is not in this bundle" in page.text(".failure")
    assert all("step/99/step.json.js" in message for message in page.errors())


def test_some_steps_only(page, recorded, tmp_path):
    pellucid("view", recorded, "--bundle", tmp_path / "out", "--steps", "1,3")
    page.open(f"{(tmp_path / 'out').as_uri()}/index.html#/run/0/step/1", ".step-flow svg")
    page.press("]")
    page.wait(lambda: page.place == "#/run/0/step/3", "the next step that the bundle holds")
    page.settled(".step-flow svg")
    assert not (tmp_path / "out/data/run/0/step/2").exists()
