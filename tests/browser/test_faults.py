"""Damaged files: each is named in a banner, and everything else of the run can still be looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser.pages import Page
from records import write_run

pytestmark = pytest.mark.integration

ROLLOUT, MANIFEST = "rollouts/step-000001.parquet", "manifests/step-000001.json"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def newer(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"pellucid.schema_version": "7", "pellucid.version": "9.1.2"}), path)


def newer_manifest(path: Path) -> None:
    text = path.read_text().replace('"schema_version": 1', '"schema_version": 7')
    path.write_text(text.replace('"pellucid": "0.1.0"', '"pellucid": "9.1.2"'))


def break_a_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))


def cut_last_line(path: Path) -> None:
    path.write_text(path.read_text()[:-30])


DAMAGES: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "cut": (ROLLOUT, cut, ["not a whole Parquet file", "restore it"]),
    "foreign": (ROLLOUT, foreign, ["not a record of Pellucid's"]),
    "newer": (ROLLOUT, newer, ["by Pellucid 9.1.2", "schema version 7", "reads version 1"]),
    "no-manifest": (MANIFEST, Path.unlink, ["is missing"]),
    "newer-manifest": (MANIFEST, newer_manifest, ["by Pellucid 9.1.2", "schema version 7"]),
    "metrics": ("metrics.jsonl", break_a_line, ["line 2", "the other lines are shown"]),
    "vocabulary": ("vocabulary.parquet", cut, ["tokens are shown by their ids"]),
    "config": ("config.toml", Path.unlink, ["is missing"]),
}  # fmt: skip
"""name -> (file, what happens to it, what the banner must say of it)."""


@pytest.fixture(scope="module")
def address(chromium, serve, tmp_path_factory) -> str:
    """A run for each damage, in their order; then one whose last line of metrics is cut."""
    home, runs = tmp_path_factory.mktemp("faults"), []
    for name, (file, damage, _) in DAMAGES.items():
        runs.append(write_run(home / name, 3, 12, 24))
        damage(runs[-1] / file)
    runs.append(write_run(home / "being-written", 3, 12, 24, finished=False))
    cut_last_line(runs[-1] / "metrics.jsonl")
    return serve(*runs)


def refused(page: Page) -> list[str]:
    """What the console says besides that the server answered 422 for the damaged file."""
    return [message for message in page.errors() if "status of 422" not in message]


def open_everything(page: Page, root: str, step: int) -> None:
    for place, there in (
        (f"/step/{step}", ".step-node"), (f"/step/{step}/samples", ".samples-table td"),
        (f"/step/{step}/samples?view=groups&group=1", ".samples-card .samples-full"),
        (f"/step/{step}/sample/3", ".token-line"), ("?metrics=kl/coef", ".run-figures td"),
    ):  # fmt: skip
        page.go(root + place, there)
        assert page.count(".failure") == 0, (place, page.text("main"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_and_the_rest_is_shown(page, address, name):
    file, _, sentences = DAMAGES[name]
    root = f"#/run/{list(DAMAGES).index(name)}"
    page.open(address + root, ".banner")
    assert page.text(".banner summary").endswith("1 file could not be read in full")
    assert page.texts(".banner code") == [file]
    banner = page.text(".banner")
    assert all(sentence in banner for sentence in sentences), banner
    assert "Traceback" not in banner and "Error:" not in banner
    open_everything(page, root, 2)
    assert page.count(".banner") == 1 and refused(page) == []


@pytest.mark.parametrize("name", ["cut", "foreign", "newer"])
def test_a_step_without_its_samples_says_so(page, address, name):
    root = f"#/run/{list(DAMAGES).index(name)}/step/1"
    for place in ("/samples", "/samples?view=groups", "/sample/0", ""):
        page.open(address + root + place, ".failure")
        assert "step-000001.parquet" in page.text(".failure")
        assert "[object" not in page.text("main") and "undefined" not in page.text("main")
    assert page.count(".step-node") > 5  # what the manifest says of it can still be seen
    page.press("]")
    page.settled(".step-node")
    page.wait(lambda: page.count("main .failure") == 0, "the next step")
    assert refused(page) == []


@pytest.mark.parametrize("name", ["no-manifest", "newer-manifest"])
def test_a_step_without_its_manifest_shows_its_tokens(page, address, name):
    root = f"#/run/{list(DAMAGES).index(name)}/step/1"
    page.open(f"{address}{root}/sample/2", "[data-t]")
    page.wait(lambda: "no manifest" in page.text(".failure"), "that there is no manifest")
    page.press("END")
    page.wait(lambda: page.count(".token-passes"), "the numbers of an action")
    assert page.count(".token-line, .token-verdict") == 0
    page.go(root)
    page.wait(lambda: "step-000001.json" in page.text("main .step"), "the file")
    assert refused(page) == []


def test_without_a_vocabulary_tokens_have_their_ids(page, address):
    page.open(f"{address}#/run/{list(DAMAGES).index('vocabulary')}/step/2/sample/1", ".token-line")
    assert set(page.texts("[data-t]")) == {"⟨?⟩"}
    assert "not in the vocabulary" in page.text(".token-story-head") and "id " in page.text(".token-story-head")
    assert page.count(".token-banner") == 0


def test_a_last_line_that_is_being_written_is_no_fault(page, address):
    page.open(f"{address}#/run/{len(DAMAGES)}", ".run-figures td")
    assert page.count(".banner") == 0
    assert next(row for row in page.table(".run-figures") if row[0] == "score/mean")[3].endswith("step 2")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [("#/run/99", "99"), ("#/run/5/step/77", "77"), ("#/run/5/step/77/samples", "77"),
     ("#/run/5/step/1/sample/99", "no sample in row 99 of step 1"), ("#/run/5/step/1/sample/0/token/9999", ""),
     ("#/run/<img src=x>/step/1", "<img src=x>"), ("#/nonsense//", ""), ("#/run/5?metrics=odd&smooth=x&with=5,77", ""),
     ("#/run/5/step/1/samples?sort=nothing&scores.min=x&at=-4&view=odd", "")],
)  # fmt: skip
def test_an_address_of_nothing(page, address, place, sentence):
    page.open(address + place)
    assert sentence in page.text("main") and "undefined" not in page.text("main") and page.count("main > *") > 0
    assert page.count("header a") >= 1
    assert [message for message in page.errors() if "status of 404" not in message] == []
