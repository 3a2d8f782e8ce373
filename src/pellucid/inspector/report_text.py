"""Text that others wrote, made safe to show: nothing in it is read as markup, nothing in it is invisible."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

LONGEST_TEXT = 1_600
"""Characters of one text that a report shows."""
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories without a shape: controls, bidi and other formats, lone surrogates, private, unassigned, separators."""
SHOWN_AS_IS = "\n\t"
MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]#|~!$])")


def shorten(text: str, longest: int = LONGEST_TEXT) -> tuple[str, str]:
    """(the text up to `longest` characters, a note of its full length or "")."""
    if len(text) <= longest:
        return text, ""
    return text[:longest], f"… cut: {longest:,} of {len(text):,} characters are shown"


def html(text: str, longest: int = LONGEST_TEXT) -> Markup:
    """Escaped, with hidden characters as marked ⟨U+202E⟩, so that a text which spells this out looks different."""
    kept, note = shorten(text, longest)
    body = Markup("").join(
        Markup('<span class="hidden">{}</span>').format(_code(part)) if _hidden(part) else escape(part)
        for part in _parts(kept)
    )
    return body + Markup(' <span class="cut">{}</span>').format(note) if note else body


def plain(text: str, longest: int = LONGEST_TEXT) -> str:
    """Hidden characters as ⟨U+202E⟩, and nothing escaped."""
    kept, note = shorten(text, longest)
    return "".join(_code(part) if _hidden(part) else part for part in _parts(kept)) + (f" {note}" if note else "")


def markdown(text: str, longest: int = LONGEST_TEXT) -> str:
    """For a line or a table cell of Markdown: one line, every sign of Markdown and HTML escaped."""
    line = " ".join(plain(text, longest).split())
    return MARKDOWN_SIGNS.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def fenced(text: str, longest: int = LONGEST_TEXT) -> str:
    """A fenced block of Markdown, whose fence is longer than any in the text."""
    body = plain(text, longest)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{fence}text\n{body}\n{fence}"


def figure(value: Any) -> str:
    """A number to four significant digits (whole above 1,000); - for what is undefined; other values as they are."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1e15:
        return f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _parts(text: str) -> list[str]:
    """The text as runs of visible characters and single hidden ones."""
    parts: list[str] = []
    run = ""
    for character in text:
        if _hidden(character):
            parts += [run, character] if run else [character]
            run = ""
        else:
            run += character
    return [*parts, run] if run else parts


def _hidden(part: str) -> bool:
    return len(part) == 1 and part not in SHOWN_AS_IS and unicodedata.category(part) in HIDDEN


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
