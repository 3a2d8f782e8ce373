"""How positive a film review is, as a public sentiment classifier says: the reward of imdb-ppo.toml.

IMDB_CLASSIFIER names another one: a folder or a Hub name, two labels of which one is POSITIVE.
"""

from __future__ import annotations

import functools
import os
from typing import Any

CLASSIFIER = "lvwerra/distilbert-imdb"


@functools.cache
def _classifier() -> Any:
    """Loaded at the first score, and once."""
    import torch
    from transformers import pipeline

    return pipeline(
        "text-classification",
        os.environ.get("IMDB_CLASSIFIER", CLASSIFIER),
        device="cuda" if torch.cuda.is_available() else "cpu",
        top_k=None,
        function_to_apply="none",
    )


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """The POSITIVE logit of opening and continuation together: about -3 for a bad review, 3 for a good one."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    results = _classifier()(texts, truncation=True, batch_size=64)
    return [_score_of("POSITIVE", result) for result in results]


def _score_of(label: str, result: list[dict[str, Any]]) -> float:
    scores = {entry["label"]: entry["score"] for entry in result}
    if label not in scores:
        raise ValueError(f"the classifier has the labels {', '.join(scores)}, none is {label}")
    return scores[label]
