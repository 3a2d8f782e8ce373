"""What a chapter shows while it runs: text, tables, pictures and claims; printed as they come, then written as one page."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from pellucid.files import atomic_file, atomic_write, writing
from pellucid.learn import Chapter
from pellucid.metrics import Reporter


class Claim(NamedTuple):
    """text: what the chapter says. measured: the figure, with its unit. holds: on this run."""

    text: str
    measured: str
    holds: bool

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "does not hold on this run"


class Lesson:
    """One run of a chapter. folder: where its pictures and its page go. seed: of everything random in it."""

    def __init__(self, chapter: Chapter, folder: Path, seed: int = 0, reporter: Reporter | None = None) -> None:
        self.chapter, self.folder, self.seed = chapter, folder, seed
        self.reporter = reporter or Reporter()
        self.claims: list[Claim] = []
        self._parts: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """A paragraph."""
        self.reporter.say(text)
        self._parts.append({"kind": "text", "text": text})

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """rows: one cell a column; floats are shown with four digits."""
        cells = [[_cell(value) for value in row] for row in rows]
        self.reporter.table(title, list(columns), cells)
        self._parts.append({"kind": "table", "title": title, "columns": columns, "rows": cells})

    def picture(self, name: str, draw: Callable[[Any], None], caption: str, panels: int = 1) -> None:
        """NAME.png, and in the page. draw: is given matplotlib's axes, or with several panels a list of them."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2 * panels + 1.2, 4.2), dpi=110, layout="constrained")
        axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
        for ax in axes:
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        draw(axes[0] if panels == 1 else axes)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
        with atomic_file(self.folder / f"{name}.png") as scratch:
            scratch.write_bytes(picture.getvalue())
        self.reporter.say(f"picture: {self.folder / name}.png")
        data = base64.b64encode(picture.getvalue()).decode()
        self._parts.append({"kind": "picture", "name": name, "caption": caption, "data": data})

    def claim(self, text: str, measured: str, holds: bool) -> None:
        """A claim of the chapter, with what this run measured."""
        claim = Claim(text, measured, bool(holds))
        self.claims.append(claim)
        self._parts.append({"kind": "claim", "claim": claim})
        self.reporter.say(f"{'✓' if holds else '✗'} {text}: {measured} ({claim.verdict})")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """`with lesson.progress("training", 50) as advance:` and advance() after each of the total parts."""
        with self.reporter.progress(label, total):
            yield self.reporter.advance

    def finish(self) -> Path:
        """Write the page, and say where it is."""
        environment = Environment(loader=PackageLoader("pellucid.learn", "."), autoescape=True)
        page = environment.get_template("lesson.html.j2").render(
            chapter=self.chapter, parts=self._parts, claims=self.claims, seed=self.seed
        )
        path = self.folder / "index.html"
        atomic_write(path, page)
        held, seconds = sum(claim.holds for claim in self.claims), time.perf_counter() - self._began
        self.reporter.say(f"\n{held} of {len(self.claims)} claims hold; {seconds:.0f} s; page: {path}")
        return path


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
