"""The Chinese pages beside the English ones: the same headings in order, commands, code, pictures and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(ROOT.glob("docs/learn/en/[0-9]-*.md"))
PAIRS = {
    "README": (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    "map": (ROOT / "docs/learn/README.md", ROOT / "docs/learn/README.zh.md"),
    **{page.stem: (page, ROOT / "docs/learn/zh" / page.name) for page in CHAPTERS},
}


def levels(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)]


def code(text: str, languages: str) -> list[str]:
    """Every line of code without its comment, which is in the page's language."""
    blocks = re.findall(rf"^```(?:{languages})\n(.*?)^```", text, re.M | re.S)
    lines = (re.sub(r"\s*(?<![\w\"'])#.*", "", line).rstrip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def links(text: str) -> list[str]:
    """What a page links to; a page in one language links to pages in its own."""
    found = re.findall(r"\]\(([^)#]+)", text)
    own = {r"README(\.zh|\.zh-CN)?\.md$": "README", r".*glossary\.md$": "glossary", r"^(en|zh)/": ""}
    for pattern, common in own.items():
        found = [re.sub(pattern, common, target) for target in found]
    return found


def test_eight_chapters_are_compared() -> None:
    assert [page.name[0] for page in CHAPTERS] == list("12345678")


@pytest.mark.parametrize("name", PAIRS)
def test_headings_are_those_of_the_english_page(name: str) -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in PAIRS[name])
    assert levels(english) == levels(chinese) and levels(english)


@pytest.mark.parametrize("name", PAIRS)
def test_commands_and_code_are_those_of_the_english_page(name: str) -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in PAIRS[name])
    assert code(english, "bash|toml|python") == code(chinese, "bash|toml|python")


@pytest.mark.parametrize("name", PAIRS)
def test_pictures_and_links_are_those_of_the_english_page(name: str) -> None:
    english, chinese = (sorted(set(links(page.read_text(encoding="utf-8")))) for page in PAIRS[name])
    assert english == chinese


def test_figures_are_those_of_the_english_readme() -> None:
    """Numbers with a decimal point or a thousands' comma, the ones that go stale."""
    english, chinese = (sorted(re.findall(r"\d+[.,]\d+", page.read_text(encoding="utf-8"))) for page in PAIRS["README"])
    assert english == chinese
