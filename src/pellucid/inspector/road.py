"""The texts of the road, docs/learn, as pages that the help's terms lead to: by the server, and in a bundle without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

IN_WHEEL = Path(__file__).parent / "learn"
IN_CHECKOUT = Path(__file__).parents[3] / "docs" / "learn"
PAGE = """<!doctype html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Pellucid</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}css/road.css">
</head>
<body>
<nav><a href="{map}">{road}</a></nav>
{body}</body>
</html>
"""


def road_folder() -> Path:
    """Where the texts are: beside the pages in an installed package, in docs/ in a checkout."""
    return IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT


@cache
def road_files() -> dict[str, bytes]:
    """Name, such as `learn/en/4-ppo.html` or `learn/images/4-clip.png` -> content."""
    folder = road_folder()
    pages = {file: render(file, folder) for file in sorted(folder.rglob("*.md"))}
    named = {file.relative_to(folder).with_suffix(".html"): page.encode() for file, page in pages.items()}
    named |= {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.png"))}
    return {f"learn/{name.as_posix()}": content for name, content in named.items()}


def render(file: Path, folder: Path) -> str:
    """One page. Links between the texts lead to pages; those to source files are left as plain text."""
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(file.read_text(encoding="utf-8"))
    title = next((tokens[i + 1].content for i, token in enumerate(tokens) if token.tag == "h1"), file.stem)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _anchor(tokens[i + 1].content))
    for link in _links(tokens):
        target = _target(str(link.attrs.pop("href")), file, folder)
        if target is not None:
            link.attrSet("href", target)
    chinese = file.parent.name == "zh" or file.stem.endswith(".zh")
    up = "../" * len(file.relative_to(folder).parts)
    return PAGE.format(
        lang="zh-Hans" if chinese else "en",
        title=escape(title),
        up=up,
        map=f"{up}learn/README{'.zh' if chinese else ''}.html",
        road="学习路线" if chinese else "The road",
        body=markdown.renderer.render(tokens, markdown.options, {}),
    )


def _links(tokens: list[Token]) -> Iterator[Token]:
    return (child for token in tokens for child in token.children or () if child.type == "link_open")


def _target(href: str, file: Path, folder: Path) -> str | None:
    path, hash_, anchor = href.partition("#")
    if "://" in href or not path:
        return href
    inside = (file.parent / path).resolve().is_relative_to(folder.resolve())
    return path.removesuffix(".md") + ".html" + hash_ + anchor if inside and path.endswith(".md") else None


def _anchor(heading: str) -> str:
    """The name under which GitHub's pages have a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
