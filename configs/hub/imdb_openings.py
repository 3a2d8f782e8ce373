"""The first words of IMDB reviews as prompts for imdb-ppo.toml:  python configs/hub/imdb_openings.py

Writes runs/imdb-hub/openings.jsonl from the train split and openings-heldout.jsonl from the test split, one
{"prompt"} a line, none in both. How many words, 4 to 8, follows from the text alone, so that the files are always the
same.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

from pellucid.data import read_rows

FEWEST, MOST = 4, 8


def opening(review: str) -> str:
    """The review's first words, without markup."""
    words = review.replace("<br />", " ").split()
    return " ".join(words[: FEWEST + zlib.crc32(review.encode()) % (MOST - FEWEST + 1)])


def openings(source: str, split: str) -> list[str]:
    """Each once, in the order of the data set."""
    return list(dict.fromkeys(filter(None, (opening(row["text"]) for row in read_rows(source, split)))))


def write(texts: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{path}: {len(texts):,} openings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="hub:stanfordnlp/imdb", help="a data set with a column `text`")
    parser.add_argument("--out", type=Path, default=Path("runs/imdb-hub"), help="folder of the two files")
    options = parser.parse_args()
    train = openings(options.source, "train")
    write(train, options.out / "openings.jsonl")
    seen = set(train)
    held_out = [text for text in openings(options.source, "test") if text not in seen]
    write(held_out, options.out / "openings-heldout.jsonl")


if __name__ == "__main__":
    main()
