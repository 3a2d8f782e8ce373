"""Two languages, two themes, narrow windows."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from browser.pages import DRAWN, PLACES, Page

pytestmark = pytest.mark.integration

KEY = re.compile(r"(?<![\w./-])(?:shell|run|step|samples|token|key|term)\.[a-z]\w*(?:\.\w+)*")
"""What a text without a translation would look like."""
ALL = PLACES | {
    "groups": "#/run/3/step/2/samples?view=groups", "prompts": "#/run/3/step/2/samples?view=prompt",
    "box": "#/run/0/step/2?node=advantages", "policy": "#/run/3/step/2?node=policyLoss",
    "no critic": "#/run/3/step/2/sample/9", "prompt token": "#/run/0/step/2/sample/5/token/0",
    "several": "#/run/0?with=1,3", "no steps": "#/run/1",
    "nothing": "#/run/0/step/77",
}  # fmt: skip
READY = DRAWN | {
    "groups": ".samples-full",
    "prompts": ".samples-full",
    "box": ".step-popover",
    "policy": ".step-popover",
}
WORDS = """
const skip = "option[lang], .run-toml, .run-keys, .run-summary, .visible, code, .mono";
const found = [];
for (const element of document.querySelectorAll("header *, main *, dialog *")) {
  if (element.closest(skip)) continue;
  for (const node of element.childNodes) if (node.nodeType === 3) found.push(node.data);
  for (const name of ["title", "aria-label", "data-tip", "placeholder", "aria-valuetext"])
    if (element.hasAttribute(name)) found.push(element.getAttribute(name));
}
return [document.title, ...found].join("\\n");
"""


def open_all(page: Page, address: str):
    """Each place in turn; the names of what is open."""
    for name, place in ALL.items():
        page.go(place, READY.get(name)) if page.run("return 'Pellucid' in window") else page.open(address + place)
        yield name
    page.press("?")
    page.wait(lambda: page.count("dialog[open]"), "the help")
    yield "help"
    page.run("document.querySelector('dialog').close()")
    assert all("status of 404" in message for message in page.errors())


def check_no_key(page: Page, name: str) -> None:
    found = KEY.findall(page.run(WORDS))
    assert found == [], f"{name}: {sorted(set(found))}"


def test_chinese_is_chosen_and_stays(page, address):
    page.open(address + PLACES["run"], DRAWN["run"])
    assert page.run("return document.documentElement.lang") == "en"
    english = page.text(".shell-tabs")
    page.choose('select[aria-label="Language"]', "zh")
    page.wait(lambda: page.text(".shell-tabs") != english, "the other language")
    assert page.run("return document.documentElement.lang") == "zh-Hans"
    page.open(address + PLACES["run"], DRAWN["run"])
    assert page.text(".shell-tabs").split() == ["运行", "步骤", "样本", "Token"]


def test_every_page_speaks_both_languages(page, address):
    page.open(address + PLACES["run"], DRAWN["run"])
    headings = "return [...document.querySelectorAll('main :is(h1, h2, p, button)')].map((e) => e.textContent)"
    english = {}
    for name in open_all(page, address):
        check_no_key(page, name)
        assert not re.search(r"[\u4e00-\u9fff]", page.run(WORDS)), name
        english[name] = page.run(headings)
    page.run("Pellucid.setLanguage('zh')")
    for name in open_all(page, address):
        check_no_key(page, name)
        assert re.search(r"[\u4e00-\u9fff]", page.text("main") + page.text("dialog")), name
        assert page.run(headings) != english[name], name


COLOURS = """
const number = (text) => text.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
const ground = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(number(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const opacity = (element) => element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
const off = "[disabled], [aria-disabled=true], [aria-hidden=true], .visually-hidden, svg, canvas, option, .u-legend";
const bad = new Map();
let seen = 0;
for (const element of document.querySelectorAll("header *, main *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || element.closest(off) || !element.checkVisibility() || !element.getClientRects().length) continue;
  const behind = ground(element), colour = number(getComputedStyle(element).color);
  const front = over([...colour.slice(0, 3), (colour[3] ?? 1) * opacity(element)], behind);
  const [high, low] = [light(front), light(behind)].sort((a, b) => b - a);
  const contrast = (high + 0.05) / (low + 0.05);
  seen += 1;
  if (contrast < 4.5) bad.set(`${element.tagName}.${element.className}`, Math.round(contrast * 100) / 100);
}
return [seen, Object.fromEntries(bad)];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(page, address, recorded, theme):
    """Contrast of at least 4.5 between every text and what is behind it, tokens in all their colours included."""
    page.open(address + PLACES["run"], DRAWN["run"])
    page.choose('select[aria-label="Theme"]', theme)
    for name, place in ALL.items():
        page.go(place, READY.get(name))
        seen, bad = page.run(COLOURS)
        assert seen > 10 and bad == {}, (name, bad)
    page.errors()
    longest = pd.read_parquet(recorded / "rollouts/step-000001.parquet", columns=["length"]).length.idxmax()
    page.go(f"#/run/0/step/1/sample/{longest}", DRAWN["token"])
    for quantity in page.run("return [...document.querySelectorAll('.token-panel option')].map((o) => o.value)"):
        page.choose(".token-panel select", quantity)
        seen, bad = page.run(COLOURS)
        assert bad == {}, (quantity, bad)
        colours = page.run("return [...document.querySelectorAll('.token')].map((t) => t.style.background)")
        assert len(set(colours)) > (10 if quantity in ("push", "advantages", "entropy") else 1), quantity


def test_themes(page, address):
    ground = """const colour = (selector) => getComputedStyle(document.querySelector(selector)).backgroundColor;
        return colour("body") + colour(".panel")"""
    page.open(address + PLACES["token"], DRAWN["token"])
    painted = "return document.querySelector('.token[style]').style.background"
    light, token = page.run(ground), page.run(painted)
    page.emulate("dark")  # the system's choice is followed
    page.wait(lambda: page.run(ground) != light, "the dark theme")
    dark = page.run(ground)
    page.wait(lambda: page.run(painted) != token, "the tokens in colours of the theme")
    page.choose('select[aria-label="Theme"]', "light")
    page.wait(lambda: page.run(ground) == light, "the light theme")
    page.wait(lambda: page.run(painted) == token, "the first colours")
    page.choose('select[aria-label="Theme"]', "dark")
    page.emulate("light")
    page.wait(lambda: page.run(ground) == dark, "the theme that was chosen")
    page.open(address + PLACES["token"], DRAWN["token"])
    assert page.run(ground) == dark


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [360, 768])
def test_no_page_scrolls_sideways(page, address, width, language):
    page.resize(width, 740)
    page.open(address + PLACES["run"], DRAWN["run"])
    page.run("Pellucid.setLanguage(arguments[0])", language)
    for name in open_all(page, address):
        wide = page.run("return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
        assert max(wide[:2]) <= wide[2] == width, name
        if name in PLACES:
            assert page.count("main .panel") >= 1
