"""The Run and the Step page of a recorded run, against metrics.jsonl, the manifest and spans.json."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from browser.pages import Page, number, shows

pytestmark = pytest.mark.integration

STEP = 2
LISTED = ".run-picture .u-legend .u-series:not([hidden])"
PIXELS = """
const {width, height} = arguments[0];
const pixels = arguments[0].getContext("2d").getImageData(0, 0, width, height).data;
const colours = new Set();
for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 200) colours.add(pixels.slice(i, i + 3).join(" "));
return [...colours];
"""


@pytest.fixture(scope="module")
def metrics(recorded) -> list[dict]:
    return [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def manifest(recorded) -> dict:
    return json.loads((recorded / f"manifests/step-{STEP:06d}.json").read_text())


@pytest.fixture(scope="module")
def spans(recorded) -> list[dict]:
    events = json.loads((recorded / "spans.json").read_text())
    return [event for event in events if event["ph"] == "X" and event["args"]["step"] == STEP]


# ---------------------------------------------------------------- Run


def test_curves_are_drawn(page, address, metrics):
    page.open(f"{address}#/run/0", ".run-picture canvas")
    titles = page.texts(".run-picture h2")
    assert len(titles) == page.count(".run-picture canvas") >= 8
    legend = dict(zip(*(page.texts(f"{LISTED} .u-{part}") for part in ("label", "value")), strict=True))
    for name in (
        "score/mean",
        "kl/sequence",
        "policy/entropy",
        "critic/value_loss",
    ):  # at rest, the values of the last step
        assert shows(legend[name], metrics[-1][name]), (name, legend[name])
    names = {name for row in metrics for name in row}
    for title, needed in (
        ("Score", "score/mean"),
        ("KL from the reference", "kl/sequence"),
        ("Entropy", "policy/entropy"),
    ):
        assert needed in names and any(text.startswith(title) for text in titles)
    series = page.run("return Object.fromEntries(['0', '1'].map((i) => [i, Pellucid.cssValue(`--series-${i}`)]))")
    colour = " ".join(str(int(series["0"][i : i + 2], 16)) for i in (1, 3, 5))
    for canvas in page.browser.find_elements("css selector", ".run-picture canvas"):
        assert colour in page.run(PIXELS, canvas), "the first curve is not on the canvas"


def test_figures_are_those_of_the_metrics(page, address, metrics):
    page.open(f"{address}#/run/0?metrics=actor/grad_norm,rollout/tokens", ".run-figures td")
    head, *rows = page.table(".run-figures")
    assert head[1:] == ["step 3", "first", "last", "lowest", "highest"]
    shown = {row[0]: row[1:] for row in rows}
    assert {"score/mean", "kl/sequence", "eval/judge", "actor/grad_norm", "rollout/tokens", "time/generate"} <= set(
        shown
    )
    for name, (marked, *ends) in shown.items():
        values = [(row[name], row["step"]) for row in metrics if name in row]
        at_last = {step: value for value, step in values}.get(3)
        assert marked == "–" if at_last is None else shows(marked, at_last), name
        expected = [values[0], values[-1], min(values), max(values)]
        for text, (value, _) in zip(ends, expected, strict=True):
            figure, at = text.split(" step ")
            assert shows(figure, value), (name, text, value)
            assert [value, int(at)] in [list(pair) for pair in values], (name, text)


def test_summary_and_config_are_those_of_the_run(page, address, recorded):
    page.open(f"{address}#/run/0", ".run-summary td")
    summary = json.loads((recorded / "summary.json").read_text())
    shown = dict(page.table(".run-summary"))
    assert list(shown) == list(summary)
    assert all(shows(shown[name], value, 3 if name == "seconds" else 4) for name, value in summary.items())
    lines = [line.replace("\u00a0", " ") for line in page.texts(".run-toml > div")]
    assert lines == [line.strip() for line in (recorded / "config.toml").read_text().rstrip().split("\n")]
    assert page.text(".shell-live") == "finished"


def test_a_click_on_a_curve_opens_its_step(page, address):
    page.open(f"{address}#/run/0", ".run-picture canvas")
    page.click(".run-picture .u-over")  # the middle of the curve, between step 0 and 3 or 1 and 3
    page.wait(lambda: "/step/" in page.place, "a step")
    page.settled(".step-flow svg")
    page.run("history.back()")
    page.wait(lambda: page.place == "#/run/0", "back")
    page.settled(".run-picture canvas")


def test_runs_over_one_another(page, address):
    page.open(f"{address}#/run/0?with=3", ".run-figures td")
    assert [row[1] for row in page.table(".run-figures") if row[0] == "score/mean"] == ["demo", "grouped"]
    page.wait(lambda: page.count(".run-keys .run-differs") > 3, "keys that differ")
    assert {row[0] for row in page.table(".run-keys")} >= {"algo.advantage", "total_steps"}
    page.click(".run-compare input")  # sft, which the other two are now compared with
    page.wait(lambda: page.place == "#/run/0?with=3%2C1", "the address")


@pytest.mark.parametrize("run", [1, 2, 3])
def test_other_runs_open(page, address, run):
    page.open(f"{address}#/run/{run}", ".run-figures td")
    assert page.count(".run-picture canvas") >= 1
    assert ("no recorded steps" in page.text("header")) == (run != 3)


# ---------------------------------------------------------------- Step


def boxes(page: Page) -> dict[str, str]:
    """What stands in each box of the diagram."""
    return page.run("""return Object.fromEntries([...document.querySelectorAll(".step-node[data-node]")].map((node) =>
        [node.dataset.node, [...node.querySelectorAll("text")].map((line) => line.textContent).join(" ")]))""")


def open_step(page: Page, address: str, run: int = 0, query: str = "") -> None:
    page.open(f"{address}#/run/{run}/step/{STEP}{query}", ".step-node[data-node]")


LEADS = {"sequences": "input_ids"} | {
    name: name for name in
    ("rollout_logprobs old_logprobs ref_logprobs scores old_values kl rewards advantages returns values value_grads ratio "
     "logprob_grads").split()
}  # fmt: skip
"""Box -> the tensor whose figures it bears."""
MODELS = {
    "sampler": ("generate", "input_ids", "actor"), "actor": ("old_logprobs", "old_logprobs", "actor"),
    "reference": ("ref_logprobs", "ref_logprobs", "reference"), "reward": ("score", "scores", "reward"),
    "critic": ("values", "old_values", "critic"), "criticUpdate": ("update_critic", None, None),
    "actorUpdate": ("update_actor", None, None),
}  # fmt: skip
"""Box -> (phase, a tensor that it makes, role)."""


def test_boxes_bear_the_figures_of_the_manifest(page, address, manifest):
    open_step(page, address)
    shown, tensors = boxes(page), {tensor["name"]: tensor for tensor in manifest["tensors"]}
    for box, name in LEADS.items():
        tensor, text = tensors[name], shown[box]
        assert " × ".join(map(str, tensor["shape"])) + f" {tensor['dtype']}" in text, text
        assert tensor["producer"] in text and f"weights v{tensor['weight_version']}" in text, text
        if tensor.get("mean") is not None:
            mean = text.split("mean ")[1].split(",")[0].split(" ")[0]
            assert shows(mean, tensor["mean"]), (text, tensor["mean"])
    assert "noCritic" not in shown and "function" not in shown
    for role, box in (("actor", "newActor"), ("critic", "newCritic")):
        weights = next(w for w in manifest["weights"] if w["role"] == role)
        assert weights["hash"][:8] in shown[box] and f"v{STEP} " in shown[box]


def test_boxes_bear_the_seconds_of_the_spans(page, address, manifest, spans):
    open_step(page, address)
    shown, tensors = boxes(page), {tensor["name"]: tensor for tensor in manifest["tensors"]}
    for box, (phase, tensor, role) in MODELS.items():
        took = sum(span["dur"] for span in spans if span["name"] == phase) / 1e6
        figures = [part for part in shown[box].replace("tokens/s", "").split(" ") if part]
        found = [number(f"{a} {b}") for a, b in pairwise(figures) if b in ("s", "ms", "µs")]
        assert any(math.isclose(x, took, rel_tol=5e-3) for x in found), (shown[box], took)
        if tensor is not None:
            assert f"weights v{tensors[tensor]['weight_version']}" in shown[box]
            count = next(w["parameters"] for w in manifest["weights"] if w["role"] == role)
            assert shows(shown[box].split(" parameters")[0].split(" ")[-1].replace("M", ""), count, 3), shown[box]


def test_every_tensor_opens_with_its_histogram(page, address, manifest):
    """A click on each box; what it then shows of its tensors is what the manifest says."""
    open_step(page, address)
    tensors, seen = {tensor["name"]: tensor for tensor in manifest["tensors"]}, set()
    for box in boxes(page):
        page.click(f'[data-node="{box}"] .step-name')
        page.wait(
            lambda box=box: page.count(".step-popover.is-pinned") and f"node={box}" in page.place, f"the box {box}"
        )
        page.run("document.querySelectorAll('.step-popover details').forEach((one) => { one.open = true; })")
        titles = page.texts(".step-popover summary") or page.texts(".step-popover h3")[:1]
        bars = page.run("""return [...document.querySelectorAll(".step-popover .bars")].map((figure) =>
            [...figure.querySelectorAll("title")].map((title) => title.textContent.split(": ").at(-1)))""")
        names = [title for title in titles if title in tensors]
        drawn = [name for name in names if tensors[name].get("histogram")]
        assert len(bars) == len(drawn)
        for name, counts in zip(drawn, bars, strict=True):
            assert [int(number(count)) for count in counts] == tensors[name]["histogram"]["counts"]
            assert sum(int(number(count)) for count in counts) == tensors[name]["count"]
        hashes = page.texts(".step-popover dd code")
        assert {tensors[name]["hash"] for name in names} <= set(hashes)
        seen |= set(names)
        page.press("ESCAPE")
        page.wait(lambda: page.count(".step-popover.is-pinned") == 0 and "node=" not in page.place, "the box to close")
    assert set(tensors) - seen == set(), "tensors that no box shows"


def table_of(page: Page, *columns: str) -> list[list[str]]:
    """The cells of the table below the diagram that has these columns, without its head."""
    tables = page.run("""return [...document.querySelectorAll(".step-table")].map((table) => [...table.rows].map((row) =>
        [...row.cells].map((cell) => cell.textContent)))""")
    return next(rows for head, *rows in tables if tuple(name.rstrip(" ▴▾") for name in head) == columns)


def test_the_table_of_tensors_is_the_manifest(page, address, manifest):
    open_step(page, address)
    columns = (
        "order",
        "name",
        "producer",
        "phase",
        "weight version",
        "shape",
        "dtype",
        "bytes",
        "mean",
        "std",
        "min",
        "max",
        "hash",
    )
    rows = table_of(page, *columns)
    assert len(rows) == len(manifest["tensors"])
    for place, (row, tensor) in enumerate(zip(rows, manifest["tensors"], strict=True), 1):
        shown = dict(zip(columns, row, strict=True))
        assert [shown[name] for name in ("order", "name", "producer", "phase")] == [
            str(place), tensor["name"], tensor["producer"], tensor["phase"]]  # fmt: skip
        assert shown["weight version"] == str(tensor["weight_version"]) and shown["hash"] == tensor["hash"][:8]
        assert shown["shape"] == " × ".join(map(str, tensor["shape"])) and shown["dtype"] == tensor["dtype"]
        assert shows(shown["bytes"], tensor["bytes"], 3)
        for figure in ("mean", "std", "min", "max"):
            value = tensor.get(figure)
            assert shown[figure] == "–" if value is None else shows(shown[figure], value), (tensor["name"], figure)


def test_the_timeline_is_that_of_the_spans(page, address, spans):
    open_step(page, address)
    assert page.count(".step-span[role=img]") == len(spans)
    whole = (max(s["ts"] + s["dur"] for s in spans) - min(s["ts"] for s in spans)) / 1e6
    table = table_of(page, "phase", "role", "kind", "seconds", "share of the step", "tokens", "tokens/s")
    rows = {row[0]: row for row in table}
    for name in {span["name"] for span in spans}:
        took = sum(span["dur"] for span in spans if span["name"] == name) / 1e6
        assert shows(rows[name][3], took, 3), rows[name]
        assert shows(rows[name][4], took / whole, 3, 1e-6), rows[name]
    assert shows(table[-1][1], whole, 3)
    assert 0 <= number(table[-2][1]) < whole


def test_metrics_and_size_of_the_step(page, address, manifest):
    open_step(page, address)
    names, figures = page.texts(".step-metrics dt"), page.texts(".step-metrics dd")
    shown = dict(zip(names, figures, strict=True))
    assert set(shown) == set(manifest["metrics"])
    for name, value in manifest["metrics"].items():
        assert shows(shown[name], value, 3 if name.startswith("time/") else 4), (name, shown[name], value)
    size = page.text(".step-head")
    assert f"{manifest['num_action_tokens']:,} action tokens" in size and f"{manifest['width']} columns" in size


def test_the_diagram_of_a_run_without_a_critic(page, address):
    open_step(page, address, run=3)
    shown = boxes(page)
    assert "noCritic" in shown and "grpo" in shown["noCritic"]
    assert not {"critic", "old_values", "returns", "criticUpdate", "values", "newCritic"} & set(shown)


def test_a_box_in_the_address_is_open(page, address):
    open_step(page, address, query="?node=kl")
    assert page.text(".step-popover h3") == "kl" and "old_logprobs" in page.text(".step-popover .step-formula")
