"""`pellucid replay`: a recorded step, executed again, is the record bit for bit; one changed bit is named and found."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_runs import TEXTS, ppo_config, save_models, write_jsonl

from pellucid.cli import main
from pellucid.errors import RecordError
from pellucid.metrics import Reporter
from pellucid.stages.replay import Replay, replay
from pellucid.stages.run import train_ppo

QUIET = Reporter(quiet=True)
STEP = 1
"""The step that is looked at where one is enough."""
FIRST = f"step {STEP}: {{}} is the first tensor that differs"


class Said(Reporter):
    """What a reporter was told, line by line."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models with many stop tokens, and supervised data."""
    folder = save_models(tmp_path_factory.mktemp("home"))
    stops = folder / "actor" / "generation_config.json"
    stops.write_text(json.dumps(json.loads(stops.read_text()) | {"eos_token_id": list(range(20, 70))}))
    write_jsonl(folder / "supervised.jsonl", [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS])
    return folder


def train(home: Path, run_dir: Path, reward: Any = None, **overrides: Any) -> Path:
    """Four steps, with a checkpoint after the second and the last."""
    config = ppo_config(home, run_dir, **{"total_steps": 4, "run__checkpoint_every": 2, **overrides})
    train_ppo(config, reward=reward, reporter=QUIET)
    return run_dir


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- it agrees


KINDS: dict[str, dict[str, Any]] = {
    "everything": {
        "algo__kl_target": 0.05, "algo__kl_horizon": 30, "algo__ptx_coef": 0.1, "trace__alternatives": 3,
        "rollout__missing_eos_penalty": 0.5, "rollout__temperature": 0.8,
    },
    "no critic": {"algo__advantage": "grpo", "algo__kl_in": "loss", "algo__policy_loss": "gspo"},
    "some samples": {"trace__samples": 5, "trace__alternatives": 2},
    "two row groups": {"rollout__samples_per_prompt": 17, "algo__minibatch_size": 30, "total_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "float32") for kind in KINDS), ("everything", "bfloat16"), ("no critic", "bfloat16")],
)
def test_steps_agree_bitwise_and_nothing_is_written(home, tmp_path, kind, precision):
    overrides = dict(KINDS[kind])
    if "algo__ptx_coef" in overrides:
        overrides["ptx_data__source"] = str(home / "supervised.jsonl")
    run_dir = train(home, tmp_path / "run", run__precision=precision, **overrides)
    before = contents(run_dir.parent)
    for step, start in ((1, 0), (3, 2), (4, 2)) if kind != "two row groups" else ((1, 0),):
        found = replay(run_dir, step, reporter=QUIET)
        manifest = json.loads((run_dir / "manifests" / f"step-{step:06d}.json").read_text())
        roles = ["actor", "critic"] if kind != "no critic" else ["actor"]
        names = [tensor["name"] for tensor in manifest["tensors"]] + [f"weights of the {role}" for role in roles]
        assert found == Replay(step, start, names)
    assert contents(run_dir.parent) == before


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> Path:
    """A run to read; whoever changes it takes a copy."""
    return train(home, tmp_path_factory.mktemp("whole") / "run", trace__alternatives=2)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_it_says_where_it_began_and_what_agreed(whole):
    reporter = Said()
    agreed = replay(whole, 4, reporter=reporter).agreed
    assert reporter.lines == [
        "step 4: from the checkpoint after step 2, 1 steps before it are executed again",
        f"step 4: {len(agreed)} of {len(agreed)} hashes agree with the record",
    ]
    replay(whole, 1, reporter=reporter)
    assert reporter.lines[2] == "step 1: from the initial models, 0 steps before it are executed again"


# ---------------------------------------------------------------- a changed record


def flip(run_dir: Path, name: str, row: int, t: int, bit: int = 0) -> None:
    """Flip one bit of one value in the Parquet file, in place, and leave everything else of it as it is."""
    path = run_dir / "rollouts" / f"step-{STEP:06d}.parquet"
    table = pq.read_table(path)
    field, cells = table.schema.field(name), table[name].to_pylist()
    parents: Any = cells
    place = row
    while isinstance(parents[place], list):
        parents, place = parents[place], t if parents is cells else 0
    value = parents[place]
    if isinstance(value, bool):
        parents[place] = not value
    elif isinstance(value, float):
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        (parents[place],) = struct.unpack("<f", struct.pack("<I", bits ^ 1 << bit))
    else:
        parents[place] = value ^ 1 << bit
    table = table.set_column(table.column_names.index(name), field, pa.array(cells, field.type))
    pq.write_table(table, path)  # with the schema's metadata


def places(run_dir: Path) -> tuple[int, int]:
    """(a row with several actions that is not the first, the place of its second action)."""
    table = pq.read_table(run_dir / "rollouts" / f"step-{STEP:06d}.parquet")
    for row, mask in enumerate(table["action_mask"].to_pylist()):
        if row and sum(mask) > 2:
            return row, np.flatnonzero(mask)[1]
    raise AssertionError("no such row")


def difference(run_dir: Path) -> str:
    with pytest.raises(RecordError) as caught:
        replay(run_dir, STEP, reporter=QUIET)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TOKEN_COLUMNS = (
    "attention_mask position_ids response_mask ended bootstrap_values rollout_logprobs old_logprobs entropy top_ids "
    "top_logprobs ref_logprobs old_values kl rewards advantages returns values value_clipped value_grads logprobs log_ratio "
    "ratio clipped logprob_grads"
).split()


@pytest.mark.parametrize("name", TOKEN_COLUMNS)
def test_one_flipped_bit_of_a_token_is_named_and_found(copy, name):
    row, t = places(copy)
    flip(copy, name, row, t)
    said = difference(copy)
    assert said.startswith(f"{FIRST.format(name)}: at sample {row}, token {t} recorded ")
    assert "(1 differ): the recorded file was changed, its manifest agrees with the replay" in said


@pytest.mark.parametrize("end", ["first", "last"])
def test_the_place_is_right_at_the_ends_of_a_sample(copy, end):
    row, _ = places(copy)
    t = 0 if end == "first" else len(pq.read_table(copy / "rollouts" / "step-000001.parquet")["input_ids"][row]) - 1
    flip(copy, "position_ids", row, t)
    assert difference(copy).startswith(
        f"{FIRST.format('position_ids')}: at sample {row}, token {t} recorded {t ^ 1}, replayed {t} "
    )


@pytest.mark.parametrize("name", ["scores", "minibatch", "actor_denominator", "critic_denominator", "policy_version"])
def test_one_flipped_bit_of_a_sample_is_named_and_found(copy, name):
    row, _ = places(copy)
    flip(copy, name, row, 0, bit=20 if name.endswith("denominator") else 0)
    said = difference(copy)
    assert said.startswith(f"{FIRST.format(name)}: at sample {row} recorded ")
    assert "(1 differ): the recorded file was changed" in said


def test_an_action_that_is_none_any_more_is_named_and_found(copy):
    row, t = places(copy)
    flip(copy, "action_mask", row, t)
    assert difference(copy).startswith(f"{FIRST.format('action_mask')}: at sample {row}, token {t} ")


@pytest.mark.parametrize(
    ("name", "bit"), [("input_ids", 1), ("input_ids", 40), ("rollout_logprobs", 24), ("group_ids", 4), ("group_ids", 1)]
)
def test_a_rollout_that_cannot_be_trained_on_is_named_and_found(copy, name, bit):
    """A changed token, log-prob or group stops the iteration itself, which must not hide what is wrong."""
    row, t = places(copy)
    flip(copy, name, row, t, bit)
    assert difference(copy).startswith(f"{FIRST.format(name)}: at sample {row}")


def test_the_first_that_differs_is_named_in_the_order_of_production(copy):
    for name in ("logprobs", "advantages", "old_logprobs", "ref_logprobs"):
        flip(copy, name, *places(copy))
    assert difference(copy).startswith(FIRST.format("old_logprobs"))


def test_a_flipped_bit_is_found_where_a_part_of_the_samples_is_recorded(home, tmp_path):
    """The manifest's hash is of the whole batch; the samples that are there can still be compared."""
    run_dir = train(home, tmp_path / "run", trace__samples=5, total_steps=1)
    flip(run_dir, "advantages", *places(run_dir))
    assert difference(run_dir).startswith(FIRST.format("advantages"))


def edit_manifest(run_dir: Path, change: Any) -> None:
    path = run_dir / "manifests" / f"step-{STEP:06d}.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_changed_hash_in_the_manifest_is_said_to_be_one(copy):
    def change(manifest):
        (tensor,) = (tensor for tensor in manifest["tensors"] if tensor["name"] == "advantages")
        tensor["hash"] = "0" * 32

    edit_manifest(copy, change)
    said = difference(copy)
    assert said == (
        f"{FIRST.format('advantages')}: the recorded values are those replayed, but the manifest holds another hash: "
        "the manifest was changed"
    )


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_changed_weights_are_named(copy, role):
    def change(manifest):
        (entry,) = (entry for entry in manifest["weights"] if entry["role"] == role)
        entry["hash"] = "0" * 32

    edit_manifest(copy, change)
    said = difference(copy)
    assert said == f"step {STEP}: the weights of the {role} after the step differ, and every tensor before agrees"


def test_a_tensor_that_the_run_does_not_make_is_said(copy):
    edit_manifest(copy, lambda manifest: manifest["tensors"].append({"name": "spectrum", "hash": "0" * 32}))
    assert difference(copy) == f"step {STEP}: spectrum was recorded, and this run's config does not make it any more"


@pytest.mark.parametrize("file", ["rollouts/step-000001.parquet", "manifests/step-000001.json"])
def test_a_damaged_file_is_said(copy, file):
    path = copy / file
    path.write_bytes(path.read_bytes()[:-200])
    assert difference(copy).startswith(str(path))


def test_a_file_that_is_damaged_in_its_middle_is_said(copy):
    path = copy / "rollouts" / "step-000001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(2000) + whole[3000:])
    assert difference(copy).startswith(str(path))


# ---------------------------------------------------------------- another world than that of the run


def test_another_prompt_in_the_data_is_said(copy, home, tmp_path):
    source = write_jsonl(tmp_path / "other.jsonl", [{"prompt": text[1:12]} for text in TEXTS])
    toml = (copy / "config.toml").read_text()
    old = next(line for line in toml.splitlines() if line.startswith("source = "))
    (copy / "config.toml").write_text(toml.replace(old, f'source = "{source}"'))
    with pytest.raises(
        RecordError,
        match=r"input_ids is the first .* replayed \d+; is the data set the one",
    ):
        replay(copy, STEP, reporter=QUIET)


def test_another_constant_in_the_config_is_found_in_what_follows_from_it(copy):
    toml = (copy / "config.toml").read_text()
    assert "gae_lambda = 0.95" in toml
    (copy / "config.toml").write_text(toml.replace("gae_lambda = 0.95", "gae_lambda = 0.9"))
    said = difference(copy)
    assert said.startswith(f"{FIRST.format('advantages')}: at sample 0, token ")
    assert "the recorded file was changed" not in said


@pytest.mark.parametrize("step", [0, 5, 1000000])
def test_a_step_that_was_not_recorded_is_said(whole, step):
    with pytest.raises(RecordError, match=rf"step {step} was not recorded; there are 1 to 4 \(4 steps\)"):
        replay(whole, step, reporter=QUIET)


def test_a_folder_without_a_record_is_said(tmp_path):
    with pytest.raises(RecordError, match="step 1 was not recorded; there is none"):
        replay(tmp_path, 1, reporter=QUIET)


def test_a_reward_from_python_has_to_be_given_again(home, tmp_path):
    def reward(prompts, completions, answer, **_):
        return [len(text) / 7 + number for text, number in zip(completions, answer, strict=True)]

    run_dir = train(home, tmp_path / "run", reward, models__reward=None, total_steps=1)
    with pytest.raises(RecordError, match=r"its reward was a Python function given to train_ppo; .*reward=…"):
        replay(run_dir, 1, reporter=QUIET)
    assert replay(run_dir, 1, reward, QUIET).start == 0
    with pytest.raises(RecordError, match="step 1: scores is the first tensor that differs: at sample 0 recorded "):
        replay(run_dir, 1, lambda prompts, completions, **_: [0.0] * len(prompts), QUIET)


def test_what_differs_since_an_earlier_step_is_found_in_the_rollout(copy):
    """Other weights sample otherwise; the record's rollout does not fit them, and it is not to blame."""
    path = copy / "config.toml"
    assert path.read_text().count("lr = 0.001") == 2
    path.write_text(path.read_text().replace("lr = 0.001", "lr = 0.01"))
    with pytest.raises(RecordError, match=r"step 2: (input_ids|rollout_logprobs) is the first tensor that"):
        replay(copy, 2, reporter=QUIET)


def test_a_damaged_checkpoint_is_passed_over_and_said(copy):
    weights = copy / "checkpoints" / "step-000002" / "actor.pt"
    spoilt = bytearray(weights.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    weights.write_bytes(spoilt)
    reporter = Said()
    assert replay(copy, 3, reporter=reporter).start == 0
    assert reporter.lines[0] == (
        f"checkpoint {weights.parent} is damaged (actor.pt does not match its checksum): trying the one before"
    )
    assert reporter.lines[1] == "step 3: from the initial models, 2 steps before it are executed again"


def test_another_machine_is_said(copy):
    edit_manifest(copy, lambda manifest: manifest["environment"].update(torch="1.0", cpu="Z80"))
    reporter = Said()
    replay(copy, STEP, reporter=reporter)
    said = [line.partition(",")[0] for line in reporter.lines[:2]]
    assert said == ["recorded with torch 1.0", "recorded with cpu Z80"]


# ---------------------------------------------------------------- the command


def test_the_command_replays_several_steps(whole, capsys):
    assert main(["replay", str(whole), "--step", "1", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and [line.partition(":")[0] for line in lines] == ["step 1", "step 1", "step 2", "step 2"]
    assert lines[3].endswith("hashes agree with the record")


def test_the_command_ends_with_2_and_one_line_at_a_difference(copy, capsys):
    row, t = places(copy)
    flip(copy, "returns", row, t)
    assert main(["replay", str(copy), "--step", str(STEP), "4"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"pellucid: error: {FIRST.format('returns')}")
    assert "step 4" not in out


def test_the_command_wants_a_step(whole, capsys):
    assert main(["replay", str(whole)]) == 2
    assert "--step" in capsys.readouterr().err
