"""The two glossaries hold the same terms, in their two orders, and all of the library's own."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of the rows of a page's tables, without the heads."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] not in ("term", "术语") and set(row[0]) != {"-"}]


def test_both_hold_the_same_pairs_of_terms() -> None:
    english, chinese = rows("learn/en/glossary.md"), rows("learn/zh/glossary.md")
    assert {(row[0], row[1]) for row in english} == {(row[1], row[0]) for row in chinese}
    assert {row[0]: row[3] for row in english} == {row[1]: row[3] for row in chinese}, "the chapters differ"
    assert len(english) == len(chinese) == len({row[0] for row in english}) == len({row[0] for row in chinese})
    assert all(len(row) == 4 and all(row) for row in english + chinese)


def test_english_is_alphabetical_and_chinese_has_themes() -> None:
    terms = [row[0].lower() for row in rows("learn/en/glossary.md")]
    assert terms == sorted(terms)
    assert len(re.findall("^## ", (DOCS / "learn/zh/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)) > 4


def test_every_term_of_the_library_is_in_it() -> None:
    assert {row[0].lower() for row in rows("glossary.md")} <= {row[0].lower() for row in rows("learn/en/glossary.md")}
