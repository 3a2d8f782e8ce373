"""The texts of the road as pages: complete, linked among themselves, and to nothing that is not there."""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pellucid.inspector.road import render, road_files
from pellucid.inspector.server import make_app
from pellucid.inspector.static_files import ROOT, static_files

DOCS = Path(__file__).parents[2] / "docs/learn"
PAGES = {name: content.decode() for name, content in road_files().items() if name.endswith(".html")}
TERMS = (ROOT / "texts/road.js").read_text(encoding="utf-8")
VOID = ("meta", "link", "img", "br", "hr")


class Outline(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets += [value for key in ("href", "src") if (value := given.get(key))]
        self.ids |= {value for value in [given.get("id")] if value}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag


def test_every_text_and_picture_is_there():
    files = {path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.png") for path in DOCS.rglob(kind)}
    assert road_files().keys() == {"learn/" + name.replace(".md", ".html") for name in files}
    assert len(PAGES) == 2 * (8 + 1 + 1)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_of_a_page_are_there(name):
    outline = Outline(PAGES[name])
    assert outline.open == [] and len(outline.targets) > 3
    for target in outline.targets:
        if "://" in target or target.startswith("data:"):
            continue
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        assert there in road_files().keys() | static_files().keys(), target
        assert not anchor or anchor in Outline(PAGES[there]).ids, target


def test_links_to_what_is_not_served_become_text(tmp_path):
    page = tmp_path / "en/page.md"
    page.parent.mkdir()
    page.write_text(
        "# A & B\n\n[code](../../../src/x.py) [up](../README.md#map) [web](https://example.org)", encoding="utf-8"
    )
    html = render(page, tmp_path)
    assert "<a>code</a>" in html and '<a href="../README.html#map">up</a>' in html
    assert '<a href="https://example.org">web</a>' in html and "<title>A &amp; B · Pellucid</title>" in html
    assert '<h1 id="a--b">' in html and 'href="../../css/road.css"' in html and 'lang="en"' in html


def test_every_chapter_that_the_help_names_is_there():
    slugs = re.findall(r'^    "(\d-[a-z-]+)": \[', TERMS, re.MULTILINE)
    assert len(slugs) == 8
    assert {f"learn/{code}/{slug}.html" for slug in slugs for code in ("en", "zh")} <= PAGES.keys()
    named = re.findall(r'"([a-z_]+(?:/[a-z0-9_]+)?)"', TERMS.partition("const CHAPTER =")[0])
    known = "".join((ROOT / f"texts/{name}.js").read_text(encoding="utf-8") for name in ("glossary", "metrics"))
    assert len(named) == len(set(named)) > 60
    assert [name for name in named if not re.search(rf'^    "?{name}"?: \[', known, re.MULTILINE)] == []


def test_the_server_hands_them_out(library):
    client = TestClient(make_app(library), base_url="http://127.0.0.1:8642")
    page, picture = client.get("/learn/zh/4-ppo.html"), client.get("/learn/images/4-clip.png")
    assert page.text == PAGES["learn/zh/4-ppo.html"] and "utf-8" in page.headers["content-type"]
    assert (
        picture.content == (DOCS / "images/4-clip.png").read_bytes() and picture.headers["content-type"] == "image/png"
    )
    assert client.get("/learn/zh/9-nothing.html").status_code == 404
