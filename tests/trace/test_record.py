"""What is written of a step: the batch's own rows in Parquet, and a manifest that says who made each tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import tiny_llama_gqa
from tiny_runs import save_models, tokenizer

from pellucid.data import token_bytes
from pellucid.trace.record import Recorder, Vocabulary, finite
from pellucid.types import Batch

DESIGN_NAMES = (
    "input_ids attention_mask position_ids response_mask action_mask rollout_logprobs old_logprobs logprobs ref_logprobs "
    "log_ratio ratio kl entropy scores rewards values old_values advantages returns ended bootstrap_values group_ids "
    "policy_version stop_reason num_action_tokens"
).split()
"""The names that the design gives; the critic's are absent without one."""
OF_CRITIC = {"old_values", "returns", "values", "value_clipped", "value_grads", "critic_denominator"}
CODES: dict[str, tuple[str, type]] = {
    "int32": ("i", int),
    "int64": ("q", int),
    "float32": ("f", float),
    "bool": ("?", bool),
}
"""How struct packs a value of a dtype, and what it packs."""
KINDS = {
    "gae": {"total_steps": 3, "trace__alternatives": 2, "rollout__missing_eos_penalty": 1.0},
    "grpo": {"algo__advantage": "grpo", "algo__kl_in": "loss", "algo__aggregate": "sequence"},
    "many": {"rollout__samples_per_prompt": 17, "algo__minibatch_size": 30, "algo__micro_batch_size": None},
}


@pytest.fixture(scope="module")
def gae(record_run):
    return record_run(**KINDS["gae"])


@pytest.fixture(scope="module", params=KINDS)
def run(request, record_run, gae):
    return gae if request.param == "gae" else record_run(**KINDS[request.param])


def flat(value: Any) -> Iterator[Any]:
    """The scalars of a cell, a list or a list of lists, in order."""
    if hasattr(value, "__len__"):
        for part in value:
            yield from flat(part)
    else:
        yield value


def digest(column: Any, dtype: str) -> str:
    code, kind = CODES[dtype]
    made = hashlib.blake2b(digest_size=16)
    for value in flat(column):
        made.update(struct.pack(f"<{code}", kind(value)))
    return made.hexdigest()


def nested(value: Any) -> Any:
    """Lists all the way down, whatever a reader makes of a list column."""
    return [nested(part) for part in value] if hasattr(value, "__len__") and not isinstance(value, str) else value


def on_actions(frame: Any, name: str) -> list[Any]:
    """The column's values on action tokens, sample by sample; all of a column with one value a sample."""
    if not hasattr(frame[name][0], "__len__"):
        return frame[name].tolist()
    cells = zip(frame[name], frame.action_mask, strict=True)
    return [x for values, mask in cells for v, acted in zip(values, mask, strict=True) if acted for x in flat(v)]


# ---------------------------------------------------------------- the rows


def test_every_name_of_the_design_is_a_column(run):
    critic = run.config.algo.advantage == "gae"
    for step in run.taken:
        columns = set(run.frame(step).columns)
        assert set(DESIGN_NAMES) - (set() if critic else OF_CRITIC) <= columns
        assert OF_CRITIC & columns == (OF_CRITIC if critic else set())
        assert ({"top_ids", "top_logprobs"} <= columns) == (run.config.trace.alternatives > 0)


def test_rows_are_the_batchs_without_padding(run):
    """Every field of every batch, token by token; and what was left out is nothing but zeros."""
    for step, (batch, samples) in run.taken.items():
        frame = run.frame(step)
        assert len(frame) == len(samples) == len(batch)
        for field in dataclasses.fields(Batch):
            value = getattr(batch, field.name)
            if value is None:
                assert field.name not in frame
                continue
            for i, sample in enumerate(samples):
                cell = frame[field.name][i]
                if not isinstance(value, torch.Tensor) or value.dim() == 1:
                    assert cell == (value[i] if isinstance(value, tuple) else value[i].item())
                else:
                    length = len(sample.input_ids)
                    assert nested(cell) == [value[i, t].tolist() for t in range(length)], f"{field.name} of sample {i}"
                    assert not value[i, length:].any()


def test_rows_say_whose_they_are(run):
    for step, (batch, samples) in run.taken.items():
        frame, G = run.frame(step), run.config.rollout.samples_per_prompt
        acted = sum(sum(sample.action_mask) for sample in samples)
        assert frame.row.tolist() == list(range(len(batch)))
        assert set(frame.step) == {step} and set(frame.schema_version) == {1}
        assert set(frame.num_action_tokens) == {acted}
        assert frame.prompt_id.tolist() == [sample.prompt.id for sample in samples]
        assert frame.group_ids.tolist() == [i // G for i in range(len(batch))]
        assert frame.sample_index.tolist() == [i % G for i in range(len(batch))]
        assert set(frame.stop_reason) <= {"stop", "length"} and set(frame.policy_version) == {step - 1}
    assert {stop for step in run.taken for stop in run.frame(step).stop_reason} == {"stop", "length"}


def test_pandas_and_polars_read_the_same(run):
    path = run.dir / "rollouts" / "step-000001.parquet"
    frame, other = run.frame(1), pl.read_parquet(path)
    assert other.columns == frame.columns.tolist()
    for name in other.columns:
        assert other[name].to_list() == [nested(cell) for cell in frame[name]]


def test_types_row_groups_and_metadata(run):
    int32 = "schema_version step row sample_index length minibatch".split()
    int64 = "prompt_id group_ids policy_version num_action_tokens".split()
    lists = {"input_ids": "int64", "position_ids": "int64", "attention_mask": "bool", "response_mask": "bool"}
    lists |= dict.fromkeys(("action_mask", "ended", "clipped", "value_clipped"), "bool")
    expected = dict.fromkeys(int32, "int32") | dict.fromkeys(int64, "int64")
    expected |= dict.fromkeys(("stop_reason", "prompt", "response"), "string")
    expected |= {name: f"list<element: {kind}>" for name, kind in lists.items()}
    nested_list = "list<element: list<element: {}>>".format
    expected |= {"top_ids": nested_list("int64"), "top_logprobs": nested_list("float")}
    scalars = "scores kl_sequence reward_sum advantage_mean entropy_mean clipped_share actor_denominator"
    expected |= dict.fromkeys([*scalars.split(), "critic_denominator"], "float")
    with pq.ParquetFile(run.dir / "rollouts" / "step-000001.parquet") as file:
        for field in file.schema_arrow:
            assert str(field.type) == expected.get(field.name, "list<element: float>")
            assert field.metadata[b"meaning"]
        rows, metadata = len(run.taken[1][1]), file.schema_arrow.metadata
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == (
            [64, rows - 64] if rows > 64 else [rows]
        )
    assert metadata[b"pellucid.schema_version"] == b"1" and metadata[b"pellucid.version"].startswith(b"0.")


def test_text_is_what_the_tokenizer_makes_of_the_tokens(run):
    """Also where a sampled token, or the cut at max_new_tokens, leaves bytes that are no UTF-8."""
    words = tokenizer()
    for step, (_, samples) in run.taken.items():
        frame = run.frame(step)
        assert frame.prompt.tolist() == [words.decode(s.prompt.input_ids, skip_special_tokens=True) for s in samples]
        assert frame.response.tolist() == [words.decode(s.response_ids, skip_special_tokens=True) for s in samples]
    assert any("\ufffd" in text for text in run.frame(1).response)


def test_ids_beyond_the_tokenizers_vocabulary(record_run, tmp_path):
    """A model's vocabulary is often padded, and an untrained one samples from the padding too."""
    folder, words = save_models(tmp_path / "models"), tokenizer()
    known = len(words)
    wide = tiny_llama_gqa(vocab_size=3 * known, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    wide.save_pretrained(folder / "actor")
    half = lambda prompts, **_: [0.5] * len(prompts)  # noqa: E731
    run = record_run(folder, half, total_steps=1, models__reward=None, trace__alternatives=4)
    frame = run.frame(1)
    beyond = [int(i) >= known for ids in frame.input_ids for i in ids]
    assert 0 < sum(beyond) < len(beyond)
    for ids, mask, text in zip(frame.input_ids, frame.response_mask, frame.response, strict=True):
        assert ("\ufffd" in text) or max(ids[mask]) < known
    assert pq.read_table(run.dir / "vocabulary.parquet").num_rows == known


# ---------------------------------------------------------------- the manifest's tensors


def test_every_hash_is_that_of_the_rows(run):
    for step in run.taken:
        frame, tensors = run.frame(step), run.tensors(step)
        for name, tensor in tensors.items():
            assert tensor["hash"] == digest(frame[name], tensor["dtype"]), name
        assert {"prompt", "response", "stop_reason", "length", "kl_sequence"} <= set(frame.columns) - tensors.keys()
        assert set(DESIGN_NAMES) & set(frame.columns) - tensors.keys() == {"stop_reason", "num_action_tokens"}


def test_a_tensor_has_the_type_of_its_column(gae):
    schema = pq.read_schema(gae.dir / "rollouts" / "step-000001.parquet")
    for name, tensor in gae.tensors(1).items():
        inner = schema.field(name).type
        while hasattr(inner, "value_type"):
            inner = inner.value_type
        assert tensor["dtype"] == str(inner).replace("float", "float32"), name


def test_shapes_are_the_padded_batchs(run):
    for step, (batch, _) in run.taken.items():
        manifest = run.manifest(step)
        assert (manifest["step"], manifest["samples"], manifest["recorded"]) == (step, len(batch), len(batch))
        assert manifest["width"] == max(map(len, run.frame(step).input_ids))
        for name, tensor in run.tensors(step).items():
            size = {"int32": 4, "int64": 8, "float32": 4, "bool": 1}[tensor["dtype"]]
            assert tensor["shape"] == list(getattr(batch, name).shape)
            assert tensor["bytes"] == size * np.prod(tensor["shape"])


def test_figures_are_numpys_over_the_actions(run):
    for step in run.taken:
        frame = run.frame(step)
        for name, tensor in run.tensors(step).items():
            values = np.array(on_actions(frame, name), dtype=np.float64)
            if tensor["dtype"] in ("int32", "int64"):
                assert not {"mean", "histogram"} & tensor.keys()
                continue
            assert tensor["count"] == len(values)
            assert tensor["mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
            if tensor["dtype"] == "bool":
                assert not {"std", "histogram"} & tensor.keys()
                continue
            assert tensor["std"] == pytest.approx(values.std(), rel=1e-6, abs=1e-9)
            assert (tensor["min"], tensor["max"]) == (values.min(), values.max())
            shown = tensor["histogram"]
            counts, _ = np.histogram(values, np.linspace(shown["low"], shown["high"], 49))
            assert (len(shown["counts"]), sum(shown["counts"])) == (48, len(values))
            assert np.abs(np.cumsum(counts) - np.cumsum(shown["counts"])).max() <= 1, "an edge may fall either way"
            assert shown["low"] < shown["high"] and shown["low"] <= values.min() and values.max() <= shown["high"]
    assert run.tensors(1)["bootstrap_values"]["histogram"]["low"] == -0.5, "a constant has a bin of its own"


def test_a_constant_reward_of_any_size_is_recorded(record_run):
    run = record_run(total_steps=1, models__reward=None, reward=lambda prompts, **_: [1e15] * len(prompts))
    assert run.tensors(1)["scores"]["mean"] == np.float32(1e15)


# ---------------------------------------------------------------- how much is recorded


@pytest.mark.parametrize(("limit", "rows"), [(0, 8), (1, 2), (5, 4)])
def test_a_part_of_the_samples_is_whole_groups(record_run, gae, limit, rows):
    """What is made before the updates is compared with the run that records all of it."""
    run = record_run(**KINDS["gae"] | {"total_steps": 1, "trace__samples": limit})
    frame, manifest, whole = run.frame(1), run.manifest(1), gae.frame(1)
    assert (manifest["samples"], manifest["recorded"], len(frame)) == (8, rows, rows)
    assert frame.row.tolist() == list(range(rows)) and frame.group_ids.value_counts().tolist() == [2] * (rows // 2)
    for name in ("input_ids", "prompt", "num_action_tokens", "old_logprobs", "top_ids", "advantages", "length"):
        assert [nested(cell) for cell in frame[name]] == [nested(cell) for cell in whole[name][:rows]]
    for name in ("input_ids", "scores", "old_logprobs", "advantages", "top_logprobs"):
        tensor = run.tensors(1)[name]
        assert tensor == gae.tensors(1)[name], "the manifest is of the whole batch"
        assert (tensor["hash"] == digest(frame[name], tensor["dtype"])) == (rows == 8)


@pytest.mark.parametrize(
    ("trace", "steps"),
    [({"every": 3}, [1, 3, 6, 7]), ({"every": 9}, [1, 7]), ({"keep": 2}, [6, 7]), ({"every": 3, "keep": 3}, [3, 6, 7])],
    ids=str,
)
def test_which_steps_are_recorded_and_kept(record_run, trace, steps):
    small = {"rollout__prompts_per_step": 2, "algo__num_epochs": 1, "algo__advantage": "grpo", "algo__kl_in": "loss"}
    run = record_run(total_steps=7, **small, **{f"trace__{key}": value for key, value in trace.items()})
    for folder, suffix in (("rollouts", "parquet"), ("manifests", "json")):
        assert sorted(path.name for path in (run.dir / folder).iterdir()) == [f"step-{k:06d}.{suffix}" for k in steps]
    assert list(run.taken) == {1: [1, 2, 3, 4, 5, 6, 7], 3: [1, 3, 6, 7], 9: [1, 7]}[trace.get("every", 1)]
    assert {span["args"]["step"] for span in json.loads((run.dir / "spans.json").read_text())[6:]} == set(range(1, 8))


def test_nothing_is_recorded_where_it_is_not_wanted_and_no_number_depends_on_it(record_run):
    wanted = [{"record": False}, {}, {"alternatives": 3}, {"samples": 3, "every": 5, "keep": 1}]
    runs = [record_run(total_steps=3, **{f"trace__{key}": value for key, value in trace.items()}) for trace in wanted]
    assert not runs[0].taken
    for name in ("rollouts", "manifests", "spans.json", "vocabulary.parquet"):
        assert not (runs[0].dir / name).exists() and all((run.dir / name).exists() for run in runs[1:])
    timeless = [[{k: row[k] for k in row if not k.startswith("time/")} for row in run.metrics()] for run in runs]
    assert len(timeless[0]) == 3 and timeless[1:] == timeless[:1] * 3
    for run in runs[1:]:
        for role in ("actor", "critic"):
            weights = [(r.dir / role / "model.safetensors").read_bytes() for r in (runs[0], run)]
            assert weights[0] == weights[1]


def test_a_new_recorder_forgets_what_lies_beyond_its_step(record_run):
    """As a resumed run does: what it has not reached yet goes, and what it has stays byte for byte."""
    run = record_run(total_steps=3)
    first = run.dir / "rollouts" / "step-000001.parquet"
    before = first.read_bytes()
    vocabulary = (run.dir / "vocabulary.parquet").read_bytes()
    words = tokenizer()
    pieces = Vocabulary(token_bytes(words), frozenset(words.all_special_ids))
    Recorder(run.dir, run.config, pieces, torch.device("cpu"), after_step=1)
    assert [path.name for path in (run.dir / "rollouts").iterdir()] == ["step-000001.parquet"]
    assert [path.name for path in (run.dir / "manifests").iterdir()] == ["step-000001.json"]
    assert first.read_bytes() == before and (run.dir / "vocabulary.parquet").read_bytes() == vocabulary


def test_the_vocabulary_is_the_tokenizers(gae):
    words, rows = tokenizer(), pq.read_table(gae.dir / "vocabulary.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(len(words)))
    assert {row["id"] for row in rows if row["special"]} == set(words.all_special_ids)
    text = "the sea is blue é 🦦\n"
    assert b"".join(rows[i]["bytes"] for i in words(text)["input_ids"]) == text.encode()


# ---------------------------------------------------------------- metrics in the manifest


def test_metrics_are_those_of_the_step(run):
    for row in run.metrics():
        found = run.manifest(row["step"])["metrics"]
        assert found and found.items() <= row.items() and "kl/sequence" in found and "time/record" not in found
    assert finite({"a": float("nan"), "b": float("inf"), "c": 2.0}) == {"a": None, "b": None, "c": 2.0}
