"""The judge of the IMDB runs, as an `eval.judge`: 1 where the classifier of prepare.py calls a text positive, else 0."""

from __future__ import annotations

import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _classifier() -> Any:
    path = Path(os.environ.get("IMDB_DATA", "runs/imdb/data")) / "judge.pkl"
    return pickle.loads(path.read_bytes())


def positive(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of 1 over samples is the positive rate. The prompt belongs to the text that is judged."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return [float(label) for label in _classifier().predict(texts)]
