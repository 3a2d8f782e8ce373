"""The files of the page, without a browser: all of them are used, both languages say the same, and no text becomes markup."""

from __future__ import annotations

import re

import pytest

from pellucid.inspector.static_files import ROOT, static_files

FILES = static_files()
INDEX = (ROOT / "index.html").read_text(encoding="utf-8")
OURS = {name: path.read_text(encoding="utf-8") for name, path in FILES.items() if not name.startswith("vendor/")}
SCRIPTS = {name: text for name, text in OURS.items() if name.endswith(".js")}
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|dangerouslySetInnerHTML|document\.write|\beval\(|new Function|"
    r"createContextualFragment|DOMParser|\bsrcdoc\b|\son[a-z]+=[\"']|set(?:Timeout|Interval)\(\s*[\"'`]|javascript:|https?://(?!www\.w3\.org/)"
)  # fmt: skip
ENTRY = re.compile(r'"((?:shell|key|run|step|samples|token)\.[^"]+)":\s*"((?:[^"\\]|\\.)*)"')


def texts() -> dict[str, dict[str, str]]:
    """{"en": {key: text}, "zh": …} of all that is given to addTexts, and of the keys that are given twice."""
    found: dict[str, dict[str, str]] = {"en": {}, "zh": {}}
    for name, text in SCRIPTS.items():
        for block in re.findall(r"addTexts\(\{\n(.*?)\n\}\);", text, re.DOTALL):
            english, chinese = block.split("\n  zh: {", 1)
            for code, part in (("en", english), ("zh", chinese)):
                for key, value in ENTRY.findall(part):
                    assert key not in found[code], f"{name}: {key} is given twice in {code}"
                    found[code][key] = value
    return found


def test_every_file_is_listed_in_the_page():
    named = re.findall(r'(?:src|href)="([^"#][^":]*)"', INDEX)
    assert len(named) == len(set(named)) and set(named) <= set(FILES)
    others = {name for name in FILES if name not in named} - {"index.html", "css/road.css"}  # the chapters' own
    assert all(re.fullmatch(r"vendor/[\w.-]+\.LICENSE", name) for name in others), others
    assert {name for name in FILES if name.startswith("vendor/") and name.endswith(".js")} <= set(named)


def test_both_languages_have_every_text():
    found = texts()
    assert len(found["en"]) > 300
    assert found["en"].keys() == found["zh"].keys()
    for key, english in found["en"].items():
        chinese = found["zh"][key]
        assert set(re.findall(r"\{\d\}", english)) == set(re.findall(r"\{\d\}", chinese)), key
        assert chinese.strip() and english.strip(), key


def test_every_term_is_explained_in_both_languages():
    entries = re.findall(
        r'^    ("?[\w/]+"?): \[(.*)\],$', SCRIPTS["texts/glossary.js"] + SCRIPTS["texts/metrics.js"], re.MULTILINE
    )
    assert len(entries) > 90
    for name, entry in entries:
        _unit, _formula, english, chinese = re.findall(r'"((?:[^"\\]|\\.)*)"', entry)
        assert english and re.search(r"[\u4e00-\u9fff]", chinese) and not re.search(r"[\u4e00-\u9fff]", english), name


def test_every_text_that_is_asked_for_exists():
    """Literal keys in whole; of keys that are put together, the part before what is put in."""
    known = texts()["en"].keys()
    for name, text in SCRIPTS.items():
        for key in re.findall(r'\bt\(\s*"([^"]+)"', text):
            assert key in known, f"{name} asks for {key}"
        for start in re.findall(r"\bt\(`([^$`]+)\$\{", text):
            assert start == "term." or any(key.startswith(start) for key in known), f"{name} asks for {start}…"


def test_every_text_is_used():
    every = "\n".join(re.sub(r"addTexts\(\{.*?\n\}\);", "", text, flags=re.DOTALL) for text in SCRIPTS.values())
    for key in texts()["en"]:
        parts = key.split(".")
        starts = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
        put_together = any(f"{start}$" in every for start in starts) or any(
            f'"{start[:-1]}' in every for start in starts[1:]
        )
        assert f'"{key}"' in every or put_together or f".{parts[-1]}`" in every, f"{key} is not used"


@pytest.mark.parametrize("name", sorted(OURS))
def test_no_text_becomes_markup_or_code(name):
    found = FORBIDDEN.search(OURS[name])
    assert found is None, f"{name}: {found[0]}"
    if name.endswith(".js"):
        assert '"use strict"' in OURS[name] or OURS[name].lstrip().startswith(("/*", "Pellucid.addTexts"))
        assert len(OURS[name].splitlines()) < 400


def test_the_page_allows_no_foreign_code():
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', INDEX)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "*" not in policy and "http" not in policy
    assert re.findall(r"<script(?![^>]*\bsrc=)", INDEX) == [] and re.findall(r"<style|style=", INDEX) == []
