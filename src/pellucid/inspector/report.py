"""`pellucid report`: a run directory as one page to read, send or print.

The page is whole in itself: no script, no reference to anything outside. The same files give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pellucid.errors import CheckpointError
from pellucid.files import atomic_directory, atomic_write
from pellucid.inspector import report_text as text
from pellucid.inspector.report_curves import Drawing, draw_all, palette
from pellucid.inspector.report_facts import HEADINGS, describe, progress_table, setting, status, summary_table
from pellucid.inspector.report_read import Run, Samples, read_runs, read_samples

PAIRS_SHOWN = 5
LONGEST_CONFIG = 20_000
"""Characters of a config.toml that are shown."""
PICTURE_FOLDER = {".md", ".png"}
"""What a report in Markdown consists of; a folder with anything else in it is not replaced."""


def report(run_dir: Path, output: Path | None = None, form: Literal["html", "markdown"] = "html") -> Path:
    """Write the report of a run, finished or not, and return its path.

    html: one file, RUN_DIR/report.html unless output names another .html. markdown: a folder, RUN_DIR/report unless output
    names another, with report.md and its pictures. What is missing or damaged in the run directory is named in the report.
    Raises CheckpointError when run_dir is no run directory, or output cannot or must not be written.
    """
    runs = read_runs(run_dir)
    samples = read_samples(runs[0]) if runs[0].kind in ("ppo", "unknown") else None
    target = output or run_dir / ("report.html" if form == "html" else "report")
    _require_free(target, form)
    drawings = [draw_all(run.kind, run.folder.replace("/", "-"), run.points, form == "markdown") for run in runs]
    page = _render(form, _contents(run_dir, runs, drawings, samples))
    if form == "html":
        atomic_write(target, page)
        return target
    with atomic_directory(target) as folder:
        (folder / "report.md").write_text(page, encoding="utf-8")
        for drawing in (drawing for of_run in drawings for drawing in of_run):
            (folder / f"{drawing.name}.png").write_bytes(drawing.png)
    return target


def _require_free(target: Path, form: str) -> None:
    """Raises CheckpointError where a report would take the place of something else."""
    if form == "html":
        if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
            raise CheckpointError(f"{target}: a report is written to one file; give a file name that ends in .html")
    elif target.exists() and not (target.is_dir() and {file.suffix for file in target.iterdir()} <= PICTURE_FOLDER):
        raise CheckpointError(f"{target}: exists and holds other things than a report; choose another folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such folder; make it, or choose another place for the report")


def _contents(run_dir: Path, runs: list[Run], drawings: list[list[Drawing]], samples: Samples | None) -> dict[str, Any]:
    return {
        "title": run_dir.resolve().name or str(run_dir.resolve()),
        "is_quickstart": len(runs) > 1,
        "runs": [
            {
                "run": run,
                "heading": HEADINGS[run.kind],
                "description": describe(run),
                "setting": setting(run),
                "status": status(run),
                "summary": summary_table(run.summary or {}),
                "progress": progress_table(run),
                "drawings": of_run,
            }
            for run, of_run in zip(runs, drawings, strict=True)
        ],
        "faults": [fault for run in runs for fault in run.faults],
        "samples": samples,
        "pairs": samples.pairs[:PAIRS_SHOWN] if samples else [],
        "outcomes": _outcomes(samples),
        "light": palette(dark=False),
        "dark": palette(dark=True),
        "longest_config": LONGEST_CONFIG,
    }


def _outcomes(samples: Samples | None) -> list[tuple[str, int, int, int]]:
    """(what, higher, equal, lower) over all pairs, of what every sample has."""
    counted = [(key, samples.outcome(key)) for key in ("score", "judge")] if samples else []
    return [(key, *outcome) for key, outcome in counted if outcome]


def _render(form: str, contents: dict[str, Any]) -> str:
    """The template, every value of which goes through `report_text` on its way out."""
    safe: Callable[[str], str] = text.html if form == "html" else text.markdown
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=form == "html",
        finalize=lambda value: safe(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "figure": text.figure,
        "plain": lambda value: Markup.escape(text.plain(value)),
        "long": lambda value, longest: text.html(value, longest),
        "fenced": lambda value, longest=text.LONGEST_TEXT: Markup(text.fenced(value, longest)),
    }
    return environment.get_template(f"report.{'html' if form == 'html' else 'md'}.j2").render(contents)
