"""A real browser, a recorded run, and the real `pellucid view` between them.

One browser a worker; one recorded run for all workers. A page that logged an error fails its test, whatever the test asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from browser.pages import Page, start_chromium
from browser.programs import pellucid, served, shared
from records import write_run

QUICKSTART = "--sft-steps 25 --rm-steps 8 --ppo-steps 3 --run.threads 1 --run.checkpoint-every 0"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="session")
def chromium():
    """Whether there is a browser: asked for first, so that no run is recorded for tests that are skipped."""
    missing = [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on the PATH (Debian: apt-get install chromium chromium-driver)")


@pytest.fixture(scope="session")
def browser(chromium):
    driver = start_chromium(CHROMIUM, DRIVER)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """The browser, to be opened at an address; what it logs must be free of errors, unless the test has taken them away."""
    it = Page(browser)
    it.fresh()
    yield it
    it.leave()
    assert it.errors() == []


@pytest.fixture(scope="session")
def recorded(chromium, tmp_path_factory) -> Path:
    """A finished quickstart of three steps, recorded by the command line."""
    return shared(tmp_path_factory, "demo", lambda path: pellucid("quickstart", "--run.dir", path, *QUICKSTART.split()))


@pytest.fixture(scope="session")
def grouped(chromium, tmp_path_factory) -> Path:
    """A synthetic run of four steps without a critic: groups of four samples, prompts that come again."""
    return shared(tmp_path_factory, "grouped", lambda path: write_run(path, 4, 48, 40, critic=False, seed=5))


@pytest.fixture(scope="session")
def drifted(chromium, tmp_path_factory) -> Path:
    """A synthetic run of three steps with a critic, in which ratios and values lie far beyond the clip, on either side."""
    return shared(tmp_path_factory, "drifted", lambda path: write_run(path, 3, 32, 40, seed=3))


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """serve(run_dir, …) -> the address; the servers live as long as the session."""
    with ExitStack() as stack:
        yield lambda *run_dirs: stack.enter_context(served(*run_dirs))


@pytest.fixture(scope="session")
def address(serve, recorded, grouped, drifted) -> str:
    """Run 0: the quickstart; 1 and 2: its sft and rm; 3: the synthetic run with groups; 4: the one that drifted."""
    return serve(recorded, grouped, drifted)
