"""Text that a model, a data set or a run's owner chose to harm the page: shown as text, everywhere, and nothing runs."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser.pages import Page, visible
from browser.programs import pellucid
from records import write_run

pytestmark = pytest.mark.integration

CALL = "window.pwned=1"
MEGABYTE = "x" * 1_000_000
TEXTS = [
    f'<img src=x onerror="{CALL}">', f"</script><script>{CALL}</script>",
    f"<svg onload={CALL}><a href=javascript:{CALL}>a</a>",
    "\x00\x07\x1b[31m\x7f\x9b", "a\u202eevil\u202c\u2066b\u2069\u200f\u061c", "zero\u200bwidth\ufeff\u00ad\U000e0041",
    "a\u2028b\u2029c\r\nd\te", "\ud800", "e" + "\u0301" * 60, MEGABYTE,
]  # fmt: skip
NAME = f"<img src=x onerror={CALL}>\u202e&amp;'\""
"""Of the run directory."""
STEP, SAMPLES = 2, 12
BREAKS = {"\n", "\t"}


@pytest.fixture(scope="module")
def hostile(chromium, tmp_path_factory) -> Path:
    """A run whose tokens, prompts, responses, metrics, config, summary and own name are such texts."""
    run_dir = write_run(tmp_path_factory.mktemp("hostile") / NAME, 2, SAMPLES, 24, alternatives=2, texts=TEXTS)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row |= {f"eval/{TEXTS[0]}": 1.5 + row["step"], f"{TEXTS[4]}": 2.0, "\ud800": 3.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    summary = {"seconds": 1, TEXTS[1]: TEXTS[0], "note": "\ud800" + TEXTS[4]}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    with (run_dir / "config.toml").open("a") as config:
        config.write(f"\n[other]\nvalue = {json.dumps(TEXTS[0] + TEXTS[4])}\n")
    path = run_dir / f"rollouts/step-{STEP:06d}.parquet"
    table = pq.read_table(path)
    stops = pa.array([TEXTS[1], *table["stop_reason"].to_pylist()[1:]])
    pq.write_table(
        table.set_column(table.column_names.index("stop_reason"), "stop_reason", stops), path, row_group_size=64
    )
    manifest = json.loads((run_dir / f"manifests/step-{STEP:06d}.json").read_text())
    manifest["tensors"][0] |= {"producer": TEXTS[0], "name": TEXTS[1]}
    manifest["metrics"][TEXTS[0]] = 1.0
    manifest["weights"][0]["precision"] = TEXTS[2]
    (run_dir / f"manifests/step-{STEP:06d}.json").write_text(json.dumps(manifest))
    return run_dir


@pytest.fixture(scope="module", params=["server", "bundle"])
def place(request, hostile, serve, tmp_path_factory) -> str:
    """The run on the server, and as a bundle opened from the disk."""
    if request.param == "server":
        return serve(hostile)
    out = tmp_path_factory.mktemp("hostile-bundle") / "out"
    pellucid("view", hostile, "--bundle", out)
    return f"{out.as_uri()}/index.html"


@pytest.fixture(scope="module")
def frame(hostile) -> pd.DataFrame:
    return pd.read_parquet(hostile / f"rollouts/step-{STEP:06d}.parquet")


EVERYTHING = """
const texts = [document.title];
for (const element of document.body.querySelectorAll("*")) {
  for (const name of element.getAttributeNames()) if (name !== "href") texts.push(element.getAttribute(name));
  if (element.value !== undefined) texts.push(String(element.value));
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) texts.push(walker.currentNode.data);
return [...new Set(texts)].map((text) => text.slice(0, 30000));
"""


def check_harmless(page: Page) -> None:
    """Nothing ran, no element came out of a text, and no character that hides or turns others is on the page."""
    assert page.run("return window.pwned") is None
    assert page.count("img, iframe, object, embed, video, audio, form, meta[http-equiv=refresh]") == 0
    scripts = page.run("return [...document.scripts].map((script) => script.getAttribute('src') ?? script.textContent)")
    assert all(source and source.endswith(".js") and "pwned" not in source for source in scripts)
    handlers = page.run("""return [...document.querySelectorAll("*")].flatMap((e) => e.getAttributeNames()
        .filter((name) => name.startsWith("on") || (name === "href" && /^\\s*javascript:/i.test(e.getAttribute(name)))))""")
    assert handlers == []
    hidden = {
        c for text in page.run(EVERYTHING) for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    } - BREAKS
    assert hidden == set()
    width = page.run("return document.documentElement.scrollWidth - innerWidth")
    assert width <= 0, f"the page is {width} px wider than the window"


def first_text(row: int) -> str:
    return TEXTS[row % len(TEXTS)]


def piece(row: int) -> str:
    """How the Token page writes the first token of a sample."""
    text = first_text(row)
    if text == "\ud800":
        return "⟨ED A0 80⟩"
    return visible(text) if text != MEGABYTE else "x" * 80 + "… 1,000,000 characters in all"


def test_the_table_shows_texts_as_they_are(page, place, frame):
    page.resize(1700, 1400)
    page.open(f"{place}#/run/0/step/{STEP}/samples", ".samples-table td")
    for name, limit in (("prompt", 100), ("response", 200)):
        shown = page.texts(f"td.samples-{name}")
        assert shown == [visible(text[:limit]).strip() for text in frame[name]]
        for row, text in enumerate(shown):
            if first_text(row) not in (MEGABYTE, "\ud800"):
                assert text.startswith(visible(first_text(row))[:100]), (row, text)
    check_harmless(page)
    page.type(".samples-filters input[name=text]", "<img src=x")
    page.wait(lambda: page.texts("td.samples-row") == ["0", "10"], "the filter")
    check_harmless(page)


def test_groups_and_prompts_show_texts_as_they_are(page, place, frame):
    for row in (0, 1, 4, 7, 9):
        page.open(
            f"{place}#/run/0/step/{STEP}/samples?view=groups&group={frame.group_ids[row]}",
            ".samples-card .samples-full",
        )
        shown = page.text(".samples-card .samples-full .visible").replace("\n", "")
        if first_text(row) == MEGABYTE:
            assert shown.startswith("x" * 20000 + "… 1,0") and shown.endswith("characters in all")
        else:
            assert shown.strip() == visible(frame.response[row]).strip()
        check_harmless(page)
        page.go(f"#/run/0/step/{STEP}/samples?view=prompt&prompt={frame.prompt_id[row]}", ".samples-card .samples-full")
        check_harmless(page)


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_a_token_shows_its_text(page, place, row):
    page.open(f"{place}#/run/0/step/{STEP}/sample/{row}/token/0", ".token-verdict")
    assert page.run("return document.querySelector('[data-t=\"0\"]').textContent") == piece(row)
    assert page.run("return document.querySelector('.token-piece').textContent") == piece(row)
    check_harmless(page)
    page.press("HOME")  # the first action is the same token
    page.wait(lambda: page.count(".token-passes"), "the first action")
    assert page.run("return document.querySelector('.token-piece').textContent") == piece(row)
    page.click(".token-piece")
    check_harmless(page)


def test_names_metrics_and_config(page, place, hostile):
    page.open(f"{place}#/run/0?metrics=<img src=x>", ".run-figures td")
    assert page.text(".shell-run") == visible(NAME)
    page.click(".run-picker summary")
    names = [text for text in page.texts(".run-choices label") if "onerror" in text or "evil" in text]
    assert names == sorted([visible(TEXTS[4]), f"eval/{TEXTS[0]}"])
    curves = page.count(".run-picture canvas")
    for box in range(1, page.count(".run-choices label") + 1):
        if any(name in page.text(f".run-choices label:nth-child({box})") for name in ("onerror", "evil")):
            page.click(f".run-choices label:nth-child({box}) input")
    page.wait(lambda: page.count(".run-picture canvas") == curves + 2, "their curves")
    summary = dict(page.table(".run-summary"))
    assert summary[visible(TEXTS[1])] == TEXTS[0] and summary["note"] == "⟨U+D800⟩" + visible(TEXTS[4])
    assert any(TEXTS[0].replace('"', '\\"') in line for line in page.texts(".run-toml > div"))
    check_harmless(page)


def test_a_manifest_of_hostile_names(page, place):
    page.open(f"{place}#/run/0/step/{STEP}", ".step-node")
    assert TEXTS[1] in page.texts(".step-table th") and TEXTS[0] in page.text(".step-flow-panel ~ .panel ~ .panel")
    check_harmless(page)


def test_a_megabyte_does_not_stop_the_page(page, place):
    row = TEXTS.index(MEGABYTE)
    page.open(f"{place}#/run/0/step/{STEP}/sample/{row}", ".token-line")
    took = page.run_async("""const done = arguments[0], start = performance.now();
        dispatchEvent(new Event("resize"));
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))""")
    assert took < 1000
    first = page.text(".token-story h2")
    page.press("ARROW_RIGHT")
    page.wait(lambda: page.text(".token-story h2") != first, "the next token", 2)
    page.press("3")
    page.wait(lambda: page.count(".samples-table td"), "the table", 2)
