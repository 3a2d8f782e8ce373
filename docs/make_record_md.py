"""Writes docs/record.md from the schema of the record: python docs/make_record_md.py. tests/test_docs.py compares the two."""

from __future__ import annotations

from pathlib import Path

from pellucid.trace import COLUMNS, SCHEMA_VERSION, Column

INTRO = f"""# The record

<!-- Generated: python docs/make_record_md.py -->

Every PPO run records what it trained on, token by token, and who made each number. `pellucid view RUN_DIR` shows it, `pellucid replay RUN_DIR --step K`
executes a recorded step again and compares. `[trace]` in [config.md](config.md#traceconfig) says how much is kept. This is schema version {SCHEMA_VERSION}.

| file | what |
|---|---|
| `rollouts/step-000001.parquet` | the step's samples: a row each |
| `manifests/step-000001.json` | the step's tensors: who made each, with which weights, and its hash |
| `spans.json` | what ran when, on which role and rank |
| `vocabulary.parquet` | what each token id stands for: `id`, `bytes` (one token may be part of a character), `special` |

A file of a step appears whole or not at all. A resumed run removes what lies beyond its checkpoint and records it again, bit for bit the same.

## Reading it

```python
import pandas as pd

samples = pd.read_parquet("runs/demo/rollouts/step-000001.parquet")
worst = samples.sort_values("scores").iloc[0]
print(worst.prompt, worst.response, worst.kl[worst.action_mask])
```

Polars (`polars.read_parquet`) and DuckDB (`SELECT … FROM 'runs/demo/rollouts/*.parquet'`) read the same files.

## rollouts/step-NNNNNN.parquet

Column t describes token t of the sequence, prompt and response; numbers are 0 where they are not defined, as on the prompt. Rows come in groups of 64. A column
that was not made is absent: the critic's without a critic, `top_ids` and `top_logprobs` unless `trace.alternatives` asks for them. What is "in the last epoch"
belongs to the last of `algo.num_epochs` passes over the sample, before the optimizer step that it led to. The file's metadata holds `pellucid.schema_version` and
`pellucid.version`, each field's metadata its meaning and unit.

| column | type | unit | meaning | made in |
|---|---|---|---|---|
"""

REST = """
## manifests/step-NNNNNN.json

| key | what |
|---|---|
| `schema_version`, `pellucid`, `environment` | who wrote it: the version, the device, PyTorch, the kind of CPU, the number of threads |
| `step`, `samples`, `recorded`, `num_action_tokens`, `width` | the iteration; samples of the batch, and how many of them the Parquet file holds; its action tokens; T |
| `algorithm` | the constants that a token's arithmetic needs, among them the `kl_coef` of this step |
| `whitening` | mean and biased variance of what was whitened into `advantages`; null where nothing was |
| `tensors` | in the order of production: `name`, `producer` (role/rank), `phase`, `weight_version` (and `epoch`), `dtype`, `shape`, `bytes`, `hash`, and over the action tokens (or the samples) `mean`, `std`, `min`, `max`, `count`, `histogram` |
| `weights` | after the step: `role`, `version`, `hash`, `parameters`, `bytes`, `dtype`, `precision` |
| `metrics` | the step's metrics, as in `metrics.jsonl`, without what comes after the record |

A `hash` is BLAKE2b with 16 bytes over the values without padding, row after row, little-endian in their own type (a boolean is one byte). It is of the whole
batch, so it can be checked against the Parquet file where `recorded` equals `samples`. The hash of weights combines one number per tensor, the sum of its
squared bits: it tells versions apart, and is no protection against forgery.

## spans.json

Chrome's trace format (chrome://tracing, Perfetto): a JSON array with one event a line. A role is a process, a rank a thread. `args` holds the step, the role and rank,
`kind` (token by token, all at once, update, driver) and the number of tokens. A crash can leave a last line that is cut; the format allows that.

## Versions

A new column or key leaves the version as it is. A change of meaning, type or unit raises it, and Pellucid goes on reading the old ones. A file of a version that
it does not know is refused, with the version of Pellucid that wrote it.
"""


def row(column: Column) -> str:
    kind = {"sample": "{}", "token": "list of {}", "alternative": "list of lists of {}"}[column.per].format(
        column.dtype
    )
    return f"| `{column.name}` | {kind} | {column.unit} | {column.meaning} | {column.phase} |\n"


def render() -> str:
    """The whole page."""
    return INTRO + "".join(map(row, COLUMNS)) + REST


if __name__ == "__main__":
    Path(__file__).with_name("record.md").write_text(render(), encoding="utf-8")
