"""Run PPO on IMDB for every KL coefficient and seed, then write one table of all of them.

    python configs/imdb/report.py                 runs what is missing under runs/imdb/, resumes what was cut off
    python configs/imdb/report.py --write docs/imdb.json
    python configs/imdb/report.py --total-steps 4       further flags go to `pellucid ppo`

Needs the data of prepare.py and the models of sft.toml and rm.toml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pellucid.cli import main as pellucid

KL_COEFS = (0.0, 0.05, 0.2)
SEEDS = (0, 1, 2)
RUNS = Path("runs/imdb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=RUNS / "report.json")
    arguments, flags = parser.parse_known_args()
    for seed in SEEDS:
        for kl_coef in KL_COEFS:
            train(kl_coef, seed, flags)
    report: dict[str, Any] = {
        "command": "python configs/imdb/report.py",
        "judge": json.loads((RUNS / "data/judge.json").read_text()),
        "sft": json.loads((RUNS / "sft/summary.json").read_text()),
        "rm": json.loads((RUNS / "rm/summary.json").read_text()),
        "kl_coefs": [over_seeds(kl_coef) for kl_coef in KL_COEFS],
    }
    arguments.write.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(table(report))


def run_dir(kl_coef: float, seed: int) -> Path:
    return RUNS / f"ppo-kl{kl_coef:g}-seed{seed}"


def train(kl_coef: float, seed: int, more: list[str]) -> None:
    flags = [f"--algo.kl-coef={kl_coef}", f"--run.seed={seed}", f"--run.dir={run_dir(kl_coef, seed)}", "--resume"]
    if pellucid(["ppo", "configs/imdb/ppo.toml", *flags, *more]) != 0:
        sys.exit(2)


def over_seeds(kl_coef: float) -> dict[str, Any]:
    """Every evaluation of the runs with this coefficient, as mean and standard deviation over the seeds; three samples of
    the first seed, before and after."""
    runs = [evaluations(run_dir(kl_coef, seed)) for seed in SEEDS]
    measured = []
    for step in runs[0]:
        over = [measure(run[step]) for run in runs]
        columns = {name: [figures[name] for figures in over] for name in over[0]}
        moments = {name: {"mean": statistics.mean(v), "std": statistics.stdev(v)} for name, v in columns.items()}
        measured.append({"step": step} | moments)
    before, *_, after = runs[0].values()
    samples = [
        {"prompt": a["prompt"], "before": b["completion"], "after": a["completion"]}
        for b, a in zip(before[:3], after[:3], strict=True)
    ]
    seconds = [json.loads((run_dir(kl_coef, seed) / "summary.json").read_text())["seconds"] for seed in SEEDS]
    return {"kl_coef": kl_coef, "evaluations": measured, "seconds": seconds, "samples": samples}


def evaluations(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> the texts of that evaluation."""
    files = sorted((path / "eval").glob("step-*.jsonl"))
    return {
        int(file.stem.removeprefix("step-")): [json.loads(line) for line in file.read_text().splitlines()]
        for file in files
    }


def measure(rows: list[dict[str, Any]]) -> dict[str, float]:
    """score: reward model. positive: the judge's rate. kl: nats per sequence. length: tokens. distinct2: share of the
    completions' word bigrams that are different ones (Li et al. 2016)."""
    words = [row["completion"].split() for row in rows]
    bigrams = [pair for text in words for pair in itertools.pairwise(text)]
    means = {
        name: statistics.mean(row[key] for row in rows)
        for name, key in (("score", "score"), ("positive", "judge"), ("kl", "kl"), ("length", "tokens"))
    }
    return means | {"distinct2": len(set(bigrams)) / max(len(bigrams), 1)}


def table(report: dict[str, Any]) -> str:
    """Markdown: one row per coefficient and evaluation."""
    names = ("score", "positive", "kl", "length", "distinct2")
    lines = ["| kl_coef | step | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in report["kl_coefs"]:
        for moments in row["evaluations"]:
            cells = [f"{moments[name]['mean']:.3g} ± {moments[name]['std']:.2g}" for name in names]
            lines.append("| " + " | ".join([f"{row['kl_coef']:g}", str(moments["step"]), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
