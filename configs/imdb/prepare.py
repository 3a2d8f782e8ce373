"""Cut the IMDB reviews into what the three stages and the judge need, each from reviews that no other part sees.

    python configs/imdb/prepare.py --source FOLDER --out runs/imdb/data

FOLDER holds imdb_train.jsonl.gz (rated) and imdb_unsup.jsonl.gz (unrated), one {"rating", "text"} a line, from the
Large Movie Review Dataset (Maas et al. 2011). Texts are excerpts: whole sentences, at most MAX_CHARS characters, from
a review's beginning or end. Written to --out:

    sft.jsonl, sft_heldout.jsonl           beginnings of unrated reviews
    prompts.jsonl, prompts_heldout.jsonl   the first words of other unrated reviews
    pairs.jsonl, pairs_heldout.jsonl       two excerpts; the better rated review's is chosen
    judge.pkl, judge.json                  TF-IDF and logistic regression on ratings that the pairs never use
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

MAX_CHARS, MIN_CHARS = 260, 60
OPENING_WORDS = (4, 8)
RATING_GAP = 4
PAIRS, HELD_OUT_PAIRS = 16_000, 1_000
Review = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/imdb/data"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rated, unrated = (read(arguments.source / f"imdb_{name}.jsonl.gz") for name in ("train", "unsup"))
    draw.shuffle(rated)
    draw.shuffle(unrated)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows):,} rows")

    # Films repeat among reviews, so what must not be shared is split by review, and prompts are taken from others still.
    held_out_openings, openings, held_out_texts, rest = cut(unrated, 0.02, 0.10, 0.02)
    write("prompts_heldout", prompts(held_out_openings, draw))
    write("prompts", prompts(openings, draw))
    write("sft_heldout", texts(held_out_texts))
    write("sft", texts(rest))
    for_held_out_pairs, for_pairs, for_judge, judge_held_out = cut(rated, 0.06, 0.34, 0.52)
    write("pairs_heldout", pairs(for_held_out_pairs, HELD_OUT_PAIRS, draw))
    write("pairs", pairs(for_pairs, PAIRS, draw))
    fit_judge(for_judge, judge_held_out, arguments.out)


def cut(reviews: list[Review], *shares: float) -> list[list[Review]]:
    """Consecutive pieces of these shares, and what is left."""
    pieces, start = [], 0
    for share in shares:
        stop = start + round(share * len(reviews))
        pieces.append(reviews[start:stop])
        start = stop
    return [*pieces, reviews[start:]]


def read(path: Path) -> list[Review]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line) for line in lines]
    return [review | {"text": clean(review["text"])} for review in reviews]


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip()


def excerpt(text: str, from_end: bool = False) -> str:
    """Whole sentences from one end of a review, up to MAX_CHARS; "" when that leaves less than MIN_CHARS."""
    taken: list[str] = []
    sentences = re.split(r"(?<=[.!?])\s+", text)
    for sentence in reversed(sentences) if from_end else sentences:
        if sum(map(len, taken)) + len(taken) + len(sentence) > MAX_CHARS:
            break
        taken.append(sentence)
    joined = " ".join(reversed(taken) if from_end else taken)
    return joined if len(joined) >= MIN_CHARS else ""


def texts(reviews: list[Review]) -> list[dict[str, Any]]:
    return [{"text": text} for review in reviews if (text := excerpt(review["text"]))]


def prompts(reviews: list[Review], draw: random.Random) -> list[dict[str, Any]]:
    return [{"prompt": " ".join(review["text"].split()[: draw.randint(*OPENING_WORDS)])} for review in reviews]


def pairs(reviews: list[Review], count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Two reviews whose ratings differ by RATING_GAP or more, both cut at the beginning or both at the end."""
    ends: list[list[tuple[int, str]]] = [
        [(review["rating"], text) for review in reviews if (text := excerpt(review["text"], from_end))]
        for from_end in (False, True)
    ]
    made: list[dict[str, Any]] = []
    while len(made) < count:
        (rating_a, a), (rating_b, b) = draw.sample(ends[len(made) % 2], 2)
        if abs(rating_a - rating_b) >= RATING_GAP:
            chosen, rejected = (a, b) if rating_a > rating_b else (b, a)
            made.append({"prompt": "", "chosen": chosen, "rejected": rejected})
    return made


def fit_judge(train: list[Review], held_out: list[Review], out: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def positive(reviews: list[Review]) -> list[bool]:
        return [review["rating"] >= 7 for review in reviews]

    judge = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    judge.fit([review["text"] for review in train], positive(train))
    excerpts = [(review, text) for review in held_out if (text := excerpt(review["text"]))]
    figures = {
        "accuracy_full_reviews": judge.score([review["text"] for review in held_out], positive(held_out)),
        "accuracy_excerpts": judge.score([text for _, text in excerpts], positive([review for review, _ in excerpts])),
        "train_reviews": len(train),
        "held_out_reviews": len(held_out),
    }
    (out / "judge.pkl").write_bytes(pickle.dumps(judge))
    (out / "judge.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"judge: {figures}")


if __name__ == "__main__":
    main()
