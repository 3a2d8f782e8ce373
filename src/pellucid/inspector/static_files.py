"""The pages themselves: every file that the server and a bundle hand out, by name. What is not listed is not served."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent / "static"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def static_files() -> dict[str, Path]:
    """Name, such as `pages/token.js` -> file."""
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*")) if path.is_file()}


def content_type(name: str) -> str:
    return CONTENT_TYPES.get(Path(name).suffix, "text/plain; charset=utf-8")
