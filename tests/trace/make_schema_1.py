"""Recorded once, kept for ever: how `schema-1/` came to be.

    python tests/trace/make_schema_1.py

It is the record of a run of two steps in schema version 1, without models and checkpoints, and stands for every run that
was ever recorded in that version: `test_read.py` opens it with the code of today. When the schema moves on it must not be
made again, as what would come out is a run of another version; a new one goes into a folder of its own. So this refuses to
run where the folder is there or the version is not 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "schema-1"
KEPT = ("config.toml", "metrics.jsonl", "summary.json", "spans.json", "vocabulary.parquet", "rollouts", "manifests")


def main() -> None:
    sys.path[:0] = [str(FOLDER.parents[2] / "src"), str(FOLDER.parents[1])]
    from tiny_runs import ppo_config, save_models

    from pellucid.metrics import Reporter
    from pellucid.stages.run import train_ppo
    from pellucid.trace import SCHEMA_VERSION

    if FOLDER.exists() or SCHEMA_VERSION != 1:
        sys.exit(f"{FOLDER} is a record of schema version 1 and is not made again; this is version {SCHEMA_VERSION}")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that the paths in config.toml are of no machine
        stops = save_models(Path("models")) / "actor" / "generation_config.json"
        stops.write_text(json.dumps(json.loads(stops.read_text()) | {"eos_token_id": list(range(20, 70))}))
        config = ppo_config(
            Path("models"), Path("runs/schema-1"), rollout__prompts_per_step=2, algo__minibatch_size=3, algo__dual_clip=1.5,
            rollout__missing_eos_penalty=1.0, trace__alternatives=2,
        )  # fmt: skip
        train_ppo(config, reporter=Reporter(quiet=True))
        FOLDER.mkdir()
        for name in KEPT:
            source = config.run.dir / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, FOLDER / name)
        os.chdir(FOLDER)


if __name__ == "__main__":
    main()
