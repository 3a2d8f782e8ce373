"""The keyboard, the address, and the browser's history."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from browser.pages import DRAWN, PLACES, Page

pytestmark = pytest.mark.integration

STEP = 2


@pytest.fixture(scope="module")
def frame(recorded) -> pd.DataFrame:
    return pd.read_parquet(recorded / f"rollouts/step-{STEP:06d}.parquet")


def press(page: Page, key: str, place: str, ready: str | None = None) -> None:
    page.press(key)
    page.wait(lambda: page.place == place, f"{place} after {key} (now {page.place})")
    page.settled(ready)


def test_brackets_go_through_the_steps(page, address):
    for name, place in PLACES.items():
        page.open(address + place, DRAWN[name])
        rest = place.removeprefix("#/run/0/step/2").partition("/token")[0]
        at = (
            (lambda step: f"#/run/0?at={step}")
            if name == "run"
            else (lambda step, rest=rest: f"#/run/0/step/{step}{rest}")
        )
        if name == "run":  # the newest step is the one in view
            press(page, "[", at(2))
        press(page, "[", at(1), DRAWN[name])
        page.press("[")  # there is none before
        press(page, "]", at(2), DRAWN[name])
        press(page, "]", at(3), DRAWN[name])
        press(page, "{", at(1), DRAWN[name])
        press(page, "}", at(3), DRAWN[name])
        assert page.run("return document.querySelector('.shell-steps input').value") == "3"


def test_digits_go_to_the_views(page, address):
    page.open(address + PLACES["step"], DRAWN["step"])
    press(page, "3", "#/run/0/step/2/samples", DRAWN["samples"])
    press(page, "4", "#/run/0/step/2/sample/0", DRAWN["token"])
    press(page, "2", "#/run/0/step/2", DRAWN["step"])
    press(page, "1", "#/run/0", DRAWN["run"])
    press(page, "2", "#/run/0/step/2", DRAWN["step"])
    for tab, place in (("3", "samples"), ("1", "run")):
        page.click(f".shell-tabs a:nth-child({tab})")
        page.wait(lambda place=place: page.count(DRAWN[place]), place)


def test_j_and_k_in_the_table_and_on_a_sample(page, address, frame):
    order = frame.sort_values("scores", ascending=False, kind="stable").index.tolist()
    page.open(f"{address}#/run/0/step/2/samples?sort=-scores", DRAWN["samples"])
    for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        press(page, key, f"#/run/0/step/2/samples?sort=-scores&at={order[place]}")
        page.wait(lambda place=place: page.texts(".samples-selected td.samples-row") == [str(order[place])], "the mark")
    press(page, "ENTER", f"#/run/0/step/2/sample/{order[1]}", DRAWN["token"])
    press(page, "j", f"#/run/0/step/2/sample/{order[2]}", DRAWN["token"])  # in the order of the table
    press(page, "k", f"#/run/0/step/2/sample/{order[1]}", DRAWN["token"])
    press(page, "3", f"#/run/0/step/2/samples?sort=-scores&at={order[1]}", DRAWN["samples"])


def test_the_selected_row_stays_in_view(page, address, frame):
    page.open(f"{address}#/run/0/step/2/samples", DRAWN["samples"])
    for _ in range(len(frame) + 3):  # more than there are: it stays at the last
        page.press("j")
    last = len(frame) - 1
    page.wait(lambda: page.texts(".samples-selected td.samples-row") == [str(last)], f"row {last} (now {page.place})")
    inside = """const row = document.querySelector(".samples-selected").getBoundingClientRect();
        const box = document.querySelector(".samples-scroll").getBoundingClientRect();
        return row.bottom <= box.bottom + 1 && row.top >= box.top"""
    page.wait(lambda: page.run(inside), "the row in the box")


def test_arrows_walk_the_tokens(page, address, frame):
    row = int(frame.length.idxmax())
    actions = np.flatnonzero(frame.action_mask[row])
    page.open(f"{address}#/run/0/step/2/sample/{row}", DRAWN["token"])

    def at(t: int) -> bool:
        current = page.run(
            "return [...document.querySelectorAll('[data-t][aria-current]')].map((e) => Number(e.dataset.t))"
        )
        return current == [t] and page.text(".token-story h2") == f"Token {t}"

    assert at(actions[0])
    first, last = int(actions[0]), int(actions[-1])
    walk = [("END", last), ("ARROW_LEFT", last - 1), ("HOME", first), ("ARROW_LEFT", first - 1), ("ARROW_RIGHT", first)]
    for key, t in [*walk, ("ARROW_RIGHT", first + 1)]:
        page.press(key)
        page.wait(lambda t=t: at(t), f"token {t} after {key}")
        page.wait(lambda t=t: page.place == f"#/run/0/step/2/sample/{row}/token/{t}", f"the address of token {t}")
    before = page.run("return history.length")
    for _ in range(60):  # faster than a browser allows addresses to change
        page.press("ARROW_RIGHT")
    end = min(actions[0] + 61, len(frame.input_ids[row]) - 1)
    page.wait(lambda: at(end), f"token {end}")
    page.wait(lambda: page.place.endswith(f"/token/{end}"), "its address")
    assert page.run("return history.length") == before


def test_slash_goes_to_the_filter_and_escape_leaves_it(page, address):
    focused = "const e = document.activeElement; return e.getAttribute('name') || e.type || e.tagName"
    page.open(address + PLACES["samples"], DRAWN["samples"])
    page.press("/")
    assert page.run(focused) == "text"
    page.press("3", "j")  # typed, not a command
    page.wait(lambda: page.place.endswith("samples?text=3j"), "the filter in the address")
    assert page.run("return document.activeElement.value") == "3j"
    page.press("ESCAPE")
    assert page.run(focused) == "BODY"
    page.open(address + PLACES["run"], DRAWN["run"])
    page.press("/")
    assert page.run(focused) == "search" and page.run("return document.querySelector('.run-picker').open")


def test_question_mark_shows_the_help(page, address):
    page.open(address + PLACES["token"], DRAWN["token"])
    page.press("?")
    page.wait(lambda: page.count("dialog[open]"), "the help")
    keys = page.texts("dialog .keys kbd")
    assert {"[", "]", "1", "2", "3", "4", "j", "k", "/", "?", "Esc"} <= set(keys)
    assert "advantages" in page.texts("dialog .glossary dt") and len(page.texts("dialog .glossary dt")) > 60
    page.type("dialog input", "whiten")
    page.wait(lambda: 0 < page.count("dialog .glossary dt") < 20, "fewer terms")
    page.press("3")  # the dialog has the keys now
    page.press("ESCAPE", "ESCAPE")  # the first one may clear the field
    page.wait(lambda: page.count("dialog") == 0, "the help to close")
    assert page.place == PLACES["token"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_leads_from_a_quantity_to_its_chapter(page, address, language):
    page.open(address + PLACES["token"], DRAWN["token"])
    page.run("Pellucid.setLanguage(arguments[0])", language)
    page.press("?")
    page.wait(lambda: page.count("dialog[open]"), "the help")
    links = "[...document.querySelectorAll('.glossary a')]"
    chapters = dict(
        page.run(f"return {links}.map((a) => [a.closest('dd').previousElementSibling.textContent, a.href])")
    )
    assert len(chapters) > 60 and len(set(chapters.values())) == 8
    assert chapters["ratio"].endswith(f"/learn/{language}/4-ppo.html")
    page.browser.get(chapters["ratio"])
    assert page.text("h1").startswith("4 ·") and page.count("img") > 2
    assert page.run("return [...document.images].every((image) => image.naturalWidth > 300)")
    assert page.run("return getComputedStyle(document.querySelector('pre')).overflowX") == "auto"  # the style sheet


def test_deep_links_restore_the_view(page, address, frame):
    place = "#/run/0/step/2/samples?sort=-length&scores.min=-0.5&stop=stop&at=7"
    page.resize(1700, 2700)
    page.open(address + place, DRAWN["samples"])
    wanted = frame[(frame.scores >= -0.5) & (frame.stop_reason == "stop")].sort_values(
        "length", ascending=False, kind="stable"
    )
    assert [int(text) for text in page.texts("td.samples-row")] == wanted.index.tolist()
    assert page.run("return document.querySelector('.samples-filters select').value") == "stop"
    assert page.run("return document.querySelector('[name=\"scores.min\"]').value") == "-0.5"
    page.open(f"{address}#/run/0/step/3/sample/11/token/9", ".token-verdict")
    assert page.text(".token-title h1") == "Step 3 · sample 11" and page.text(".token-story h2") == "Token 9"
    page.open(f"{address}#/run/0?smooth=0&log=1&metrics=kl/coef&at=2", DRAWN["run"])
    assert page.text(".run-controls output") == "0.00" and page.run(
        "return document.querySelector('.run-controls [type=checkbox]').checked"
    )
    assert "kl/coef" in [row[0] for row in page.table(".run-figures")]
    assert page.run("return document.querySelector('.shell-steps input').value") == "2"


def test_back_and_forward(page, address):
    page.open(address + PLACES["run"], DRAWN["run"])
    for key, name in (("2", "step"), ("3", "samples"), ("4", "token")):
        page.press(key)
        page.settled(DRAWN[name])
    page.press("ARROW_RIGHT")  # no entry of its own
    page.wait(lambda: "/token/" in page.place, "the next token")
    for name in ("samples", "step", "run"):
        page.run("history.back()")
        page.wait(lambda name=name: page.count(DRAWN[name]), name)
        page.settled()
    for name in ("step", "samples", "token"):
        page.run("history.forward()")
        page.wait(lambda name=name: page.count(DRAWN[name]), name)
    assert "/token/" in page.place


def test_tab_reaches_the_content_and_shows_where_it_is(page, address):
    page.open(address + PLACES["samples"], DRAWN["samples"])
    page.press("TAB")
    assert page.run("return document.activeElement.textContent") == "Skip to the content"
    page.press("ENTER")
    assert page.run("return document.activeElement.id") == "content" and page.place == PLACES["samples"]
    page.press("TAB")
    outline = page.run(
        "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
    )
    assert outline[0] != "none" and outline[1] >= 1
