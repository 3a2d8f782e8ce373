"""The Token page: a click on a token, and its arithmetic against a recomputation from the Parquet file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser.arithmetic import Line, Step
from browser.pages import Page, number, shows

pytestmark = pytest.mark.integration

STEP = 3
READ = """
const name = (id) => Pellucid.t(`token.line.${id}`);
const text = (line, selector) => line.querySelector(selector)?.textContent ?? null;
return [...document.querySelectorAll(".token-part")].map((part) => [...part.querySelectorAll(".token-line")].map((line) => ({
  label: line.querySelector(".token-line-head").firstElementChild.textContent,
  symbol: text(line, ".token-symbol"), formula: text(line, ".token-formula"), result: text(line, ".token-result"),
  right: text(line, ".token-right"), contradiction: text(line, ".token-contradiction"),
  wrong: line.classList.contains("is-wrong"),
})));
"""
PARTS = (
    "kl reward", "next_value delta raw_advantage return mean variance advantage",
    "log_ratio ratio unclipped bounded loss clipped denominator loss_share gradient",
    "value_bound square square_bound value_loss value_clipped critic_denominator value_gradient",
)  # fmt: skip
SLACK = 2e-6
"""The record is float32, and what is summed over it (whitening) differs in the last bits."""


def read_lines(page: Page) -> dict[str, dict]:
    """The arithmetic on the screen, by line; its labels must be those of the lines that belong there, in that order."""
    read = page.run(READ)
    labels = page.run("return arguments[0].map((id) => Pellucid.t(`token.line.${id}`))", " ".join(PARTS).split())
    assert [line["label"] for part in read for line in part] == labels
    assert [len(part) for part in read] == [len(part.split()) for part in PARTS]
    return dict(zip(" ".join(PARTS).split(), (line for part in read for line in part), strict=True))


def said(line: Line, value: float | bool, text: str) -> bool:
    if isinstance(line.result, bool):
        return text == ("yes" if value else "no")
    digits = 4 if "e" in text else 5
    return shows(text, value, digits, SLACK * max(1.0, abs(value)))


def check_arithmetic(page: Page, step: Step, row: int, t: int) -> None:
    """Every line of the token that is open: its result and what is recorded, against the recomputation."""
    expected = step.lines(row, t)
    for name, line in read_lines(page).items():
        where = f"sample {row}, token {t}, {name}: {line}, expected {expected[name]}"
        assert not line["wrong"] and line["contradiction"] is None, where
        if line["result"] is not None:
            assert said(expected[name], expected[name].result, line["result"].removeprefix("= ")), where
        else:
            assert line["symbol"].endswith("= 0") and expected[name].result == 0, where
        recorded = expected[name].recorded
        assert (line["right"] is not None) == (recorded is not None), where
        if recorded is not None:
            assert said(expected[name], recorded, line["right"].removeprefix("✓ recorded ")), where


def open_token(page: Page, address: str, row: int, t: int | None = None, run: int = 0) -> None:
    page.open(f"{address}#/run/{run}/step/{STEP}/sample/{row}" + ("" if t is None else f"/token/{t}"), ".token-line")
    page.settled(".token-part .token-right, .token-part .token-contradiction")


@pytest.fixture(scope="module")
def step(recorded) -> Step:
    return Step(recorded, STEP)


def test_the_whitening_is_of_the_recursion(step):
    """The page whitens by returns - old_values; those are the advantages that the recursion gives."""
    raw = step.raw_advantages()
    assert np.isclose(raw.mean(), step.mean, atol=1e-6) and np.isclose(raw.var(), step.variance, rtol=1e-5)
    assert len(raw) == step.manifest["num_action_tokens"]


def chosen_tokens(step: Step) -> list[tuple[int, int]]:
    """(row, token): the first, a middle and the last action of a long and of a short sample, and some that were clipped."""
    lengths = [len(step.actions(row)) for row in range(len(step.samples))]
    chosen = []
    for row in (int(np.argmax(lengths)), int(np.argmin(lengths)), 20):
        actions = step.actions(row)
        chosen += [(row, t) for t in dict.fromkeys((actions[0], actions[len(actions) // 2], actions[-1]))]
    for name in ("clipped", "value_clipped"):
        found = [(row, int(t)) for row, s in enumerate(step.samples) for t in np.flatnonzero(s[name])]
        chosen += found[:1] + found[-1:]
    return list(dict.fromkeys(chosen))


def click_through(page: Page, address: str, run: int, step: Step, tokens: list[tuple[int, int]]) -> None:
    """Click on each of (row, token), and compare what the page then says with the record."""
    open_token(page, address, 0, run=run)
    for row, t in tokens:
        page.go(f"#/run/{run}/step/{STEP}/sample/{row}")
        page.wait(lambda row=row: page.text(".token-title h1") == f"Step {STEP} · sample {row}", f"sample {row}")
        assert page.count('[data-t][aria-current="true"]') == 1
        page.click(f'[data-t="{t}"]')
        page.wait(lambda t=t: page.text(".token-story h2") == f"Token {t}", f"token {t}")
        page.wait(lambda row=row, t=t: page.place == f"#/run/{run}/step/{STEP}/sample/{row}/token/{t}", "the address")
        check_arithmetic(page, step, row, t)
        slope = step.samples[row]["logprob_grads"][t]
        way = "up" if slope < 0 else "down" if slope > 0 else "none"
        assert page.count(f".token-verdict.is-{way}") == 1
        head = page.text(".token-verdict-head")
        assert head.startswith({"up": "Pushed up", "down": "Pushed down", "none": "Not pushed"}[way])
        if way != "none":
            assert shows(head.split("gradient ")[1].split(",")[0], slope)


def test_clicked_tokens_show_the_arithmetic_of_the_record(page, address, step):
    click_through(page, address, 0, step, chosen_tokens(step))


def test_on_both_sides_of_the_clip(page, address, drifted):
    """Ratios above and below the range, under positive and negative advantages; values beyond theirs."""
    step, tokens = Step(drifted, STEP), []
    for beyond in (lambda x: x["ratio"] > 1.3, lambda x: x["ratio"] < 0.7, lambda x: x["value_clipped"]):
        for sign in (1, -1):
            found = (
                (row, np.flatnonzero(beyond(s) & (sign * s["advantages"] > 0.1))) for row, s in enumerate(step.samples)
            )
            tokens.append(next((row, int(at[0])) for row, at in found if len(at)))
    click_through(page, address, 4, step, tokens)
    clipped = [step.lines(row, t)["clipped"].result for row, t in tokens[:4]]
    assert clipped == [True, False, False, True]


def test_numbers_and_alternatives_of_a_token(page, address, step, recorded):
    vocabulary = pq.read_table(recorded / "vocabulary.parquet").to_pandas().set_index("id")
    versions = {tensor["name"]: tensor["weight_version"] for tensor in step.manifest["tensors"]}
    names = ["rollout_logprobs", "old_logprobs", "ref_logprobs", "logprobs"]
    for row in (1, 40):
        t = step.actions(row)[1]
        s = step.samples[row]
        open_token(page, address, row, t)
        head, *rows = page.table(".token-passes")
        assert [cell.split("version ")[1] for cell in head[1:]] == [str(versions[name]) for name in names]
        assert all(shows(cell, s[name][t]) for cell, name in zip(rows[0][1:], names, strict=True))
        assert all(shows(cell, np.exp(s[name][t])) for cell, name in zip(rows[1][1:], names, strict=True))
        cells = {cells[0]: cells for cells in rows}
        assert shows(cells["entropy"][2], s["entropy"][t]) and shows(cells["critic's value"][2], s["old_values"][t])

        shown = page.table(".token-alternatives")
        ids, shares = list(s["top_ids"][t]), list(np.exp(np.array(s["top_logprobs"][t], float)))
        if s["input_ids"][t] not in ids:
            ids.append(s["input_ids"][t])
            shares.append(np.exp(float(s["old_logprobs"][t])))
        assert len(shown) in (len(ids), len(ids) + 1)
        for (piece, _, share), token, probability in zip(shown, ids, shares, strict=False):
            assert shows(share, probability, 4, 1e-9), (share, probability)
            expected = vocabulary.bytes[token].decode("utf-8", "replace").strip()
            assert expected in piece and piece.endswith("sampled") == (token == s["input_ids"][t])
        rest = number(shown[-1][2]) if len(shown) > len(ids) else 0.0
        assert abs(rest + sum(shares) - 1) < 1e-3


def test_a_prompt_token_has_no_arithmetic(page, address):
    open_token(page, address, 0, 2)
    assert page.text(".token-verdict-head").startswith("No gradient: not an action")
    assert {line["symbol"] for part in page.run(READ) for line in part} == {"0"}
    assert page.count(".token-passes, .token-alternatives, .is-wrong") == 0


EVERY_SAMPLE = """
const [place, rows, done] = arguments, one = (selector) => document.querySelector(selector), wrong = [];
const title = (row) => Pellucid.t("token.title", place.split("/").at(-2), row);
const checked = () => document.querySelectorAll(".token-right").length > 12;
const ready = (row) => one(".token-title h1")?.textContent === title(row) && checked();
const frame = () => new Promise(requestAnimationFrame);
(async () => {
  for (let row = 0; row < rows; row += 1) {
    location.hash = `${place}/${row}`;
    const end = performance.now() + 5000;
    while (!ready(row) && performance.now() < end) await frame();
    if (!ready(row)) wrong.push(`sample ${row} is not shown`);
    const found = one(".token-banner, .token-contradiction, .token-wrong, .failure, .banner");
    if (found) wrong.push(`sample ${row}: ${found.textContent}`);
  }
})().then(() => done(wrong));
"""


def test_no_sample_of_the_step_contradicts_itself(page, address, step):
    """Every token of every sample, as the page works them out; a banner would name the first."""
    open_token(page, address, 0)
    assert page.run_async(EVERY_SAMPLE, f"#/run/0/step/{STEP}/sample", len(step.samples)) == []


# ---------------------------------------------------------------- a number that was changed


MUTATIONS = {
    "rewards": "reward", "returns": "return", "advantages": "advantage", "ratio": "ratio", "logprob_grads": "gradient",
    "kl": "kl", "old_values": "advantage",
}  # fmt: skip
"""Column that is changed at one token -> a line of that token that must then say so."""
ROW = 5


def target(step: Step) -> int:
    """A token of ROW in the middle, with a gradient: neither the policy nor the value is clipped there, if there is one."""
    s = step.samples[ROW]
    inside = [t for t in step.actions(ROW)[1:-1] if not s["clipped"][t] and abs(s["advantages"][t]) > 0.05]
    return next((t for t in inside if not s["value_clipped"][t]), inside[0])


def mutated(recorded: Path, to: Path, column: str, t: int) -> Path:
    """The run again, without its models, with one number of one list changed; the rest of the file is as it was."""
    shutil.copytree(
        recorded, to, ignore=shutil.ignore_patterns("actor", "critic", "reward_model", "best", "check*", "sft", "rm")
    )
    path = to / f"rollouts/step-{STEP:06d}.parquet"
    whole = pq.ParquetFile(path)
    groups = [whole.metadata.row_group(i).num_rows for i in range(whole.metadata.num_row_groups)]
    table, at = whole.read(), whole.schema_arrow.get_field_index(column)
    whole.close()
    values = table[column].to_pylist()
    values[ROW][t] += 0.25 if column != "logprob_grads" else 0.25 * values[ROW][t]
    table = table.set_column(at, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    path.unlink()
    with pq.ParquetWriter(path, table.schema) as writer:
        done = 0
        for size in groups:
            writer.write_table(table.slice(done, size), row_group_size=size)
            done += size
    return to


@pytest.fixture(scope="module")
def changed(recorded, serve, step, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    """(address, run directories): a run for each mutation, in their order."""
    home = tmp_path_factory.mktemp("changed")
    runs = {column: mutated(recorded, home / column, column, target(step)) for column in MUTATIONS}
    return serve(*runs.values()), runs


@pytest.mark.parametrize("column", MUTATIONS)
def test_a_changed_number_shows_in_the_line_that_makes_it(page, changed, step, column):
    address, runs = changed
    t, after = target(step), Step(runs[column], STEP)
    expected = after.lines(ROW, t)
    open_token(page, address, ROW, t, list(runs).index(column))
    lines = read_lines(page)
    wrong = [name for name, line in lines.items() if line["wrong"]]
    assert wrong == [name for name, line in expected.items() if not line.agrees]
    assert MUTATIONS[column] in wrong
    for name in wrong:
        prefix, _, recorded = lines[name]["contradiction"].rpartition(" ")
        assert prefix == "✗ contradiction: recorded"
        if not isinstance(expected[name].result, bool):
            assert shows(recorded, expected[name].recorded, 9, 1e-12)
            assert shows(lines[name]["result"], expected[name].result, 9, SLACK * max(1, abs(expected[name].result)))
    assert page.count(".token-banner") == 1 and page.count(f'.token-wrong[data-t="{t}"]') == 1
    assert page.count(".token-part .is-wrong") == len(wrong)


def test_the_banner_leads_to_the_contradiction(page, changed, step):
    address, runs = changed
    open_token(page, address, ROW, step.actions(ROW)[-1], list(runs).index("kl"))
    assert page.count(".token-line.is-wrong") == 0
    page.click(".token-banner a")
    page.wait(lambda: page.text(".token-story h2") == f"Token {target(step)}", "the token")
    assert page.run(READ)[0][0]["wrong"]


def test_the_other_samples_of_a_changed_run_agree(page, changed, step):
    address, runs = changed
    open_token(page, address, ROW + 1, None, list(runs).index("ratio"))
    assert page.count(".token-banner, .is-wrong") == 0
    config = json.loads((runs["ratio"] / f"manifests/step-{STEP:06d}.json").read_text())
    assert config["recorded"] == len(step.samples)
