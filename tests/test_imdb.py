"""The IMDB recipe from its files to its table, on made-up reviews and a few steps of each stage."""

from __future__ import annotations

import gzip
import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from pellucid.cli import main

RECIPE = Path(__file__).parents[1] / "configs"
MOODS = {True: "wonderful moving clever superb", False: "dreadful boring clumsy awful"}


def review(draw: random.Random) -> dict[str, object]:
    good = draw.random() < 0.5
    film = draw.choice(["film", "story", "cast", "ending", "music"])
    sentences = [f"I found the {film} {draw.choice(MOODS[good].split())} from start to finish." for _ in range(3)]
    return {"rating": draw.choice((7, 8, 9, 10) if good else (1, 2, 3, 4)), "text": "<br /><br />".join(sentences)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the recipe beside it and prepare.py's files in runs/imdb/data."""
    path, draw = tmp_path_factory.mktemp("imdb"), random.Random(0)
    (path / "configs").symlink_to(RECIPE)
    for name, count in (("train", 400), ("unsup", 600)):
        with gzip.open(path / f"imdb_{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(review(draw)) + "\n" for _ in range(count))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "argv", ["prepare.py", "--source", ".", "--out", "runs/imdb/data"])
        runpy.run_path("configs/imdb/prepare.py", run_name="__main__")
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_better_rated_excerpt_is_chosen_and_markup_is_gone(folder: Path) -> None:
    data = folder / "runs/imdb/data"
    for pair in rows(data / "pairs_heldout.jsonl"):
        assert any(word in pair["chosen"] for word in MOODS[True].split())
        assert any(word in pair["rejected"] for word in MOODS[False].split())
    texts = [row["text"] for row in rows(data / "sft.jsonl")]
    assert texts and all("<" not in text and len(text) <= 260 for text in texts)
    assert json.loads((data / "judge.json").read_text())["accuracy_full_reviews"] > 0.95


def test_the_recipe_runs_to_its_table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    tiny = ["--learn.max-steps", "2", "--learn.batch-size", "4", "--learn.micro-batch-size", "4"]
    shape = ["--new-model.hidden-size", "24", "--new-model.num-layers", "1", "--new-model.vocab-size", "300"]
    assert main(["sft", "configs/imdb/sft.toml", *tiny, *shape]) == 0
    assert main(["rm", "configs/imdb/rm.toml", *tiny, "--center-prompts", "4", "--max-new-tokens", "4"]) == 0
    report = runpy.run_path("configs/imdb/report.py")
    small = ["--total-steps", "2", "--rollout.prompts-per-step", "4", "--rollout.max-new-tokens", "6"]
    small += ["--algo.minibatch-size", "4", "--algo.micro-batch-size", "4", "--eval.num-prompts", "5"]
    monkeypatch.setattr(sys, "argv", ["report.py", "--write", "report.json", *small])
    report["main"]()
    written = json.loads(Path("report.json").read_text())
    assert [row["kl_coef"] for row in written["kl_coefs"]] == list(report["KL_COEFS"])
    for row in written["kl_coefs"]:
        before, after = row["evaluations"]
        assert (before["step"], after["step"]) == (0, 2)
        assert before["kl"]["mean"] == pytest.approx(0, abs=1e-5)
        assert 0 <= after["positive"]["mean"] <= 1 and 0 < after["distinct2"]["mean"] <= 1
        assert len(row["samples"]) == 3
    assert capsys.readouterr().out.count("\n| ") >= 2 * len(report["KL_COEFS"])


def test_distinct_2_and_the_other_measures_by_hand(folder: Path) -> None:
    measure = runpy.run_path(str(RECIPE / "imdb/report.py"))["measure"]
    made = [
        {"completion": "a b a b", "score": 1.0, "judge": 1.0, "kl": 2.0, "tokens": 4},
        {"completion": "b a", "score": 2.0, "judge": 0.0, "kl": 4.0, "tokens": 2},
    ]
    # bigrams: ab ba ab, ba -> 2 different of 4
    assert measure(made) == {"score": 1.5, "positive": 0.5, "kl": 3.0, "length": 3, "distinct2": 0.5}
