"""The report of a run directory: its numbers against the files, and what it does with hostile, damaged and long ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from records import write_run

from pellucid.errors import CheckpointError
from pellucid.inspector.report import PAIRS_SHOWN, report
from pellucid.inspector.report_curves import buckets
from pellucid.inspector.report_text import fenced, markdown

HARMLESS = set(
    "html head meta title style body header main section article figure figcaption h1 h2 h3 h4 p div span strong br code pre"
    " ul li table thead tbody tr th td details summary svg g path defs use text tspan clippath rect lineargradient".split()
)
HOSTILE = (
    '<script>alert(1)</script><img src=x onerror=alert(1)>\u202egnirts\x00\u2028{{ 7 * 7 }}\ud800 & "quoted" $\\frac{$'
)


class Page(HTMLParser):
    """Tags, attributes, ids and references, rows of tables, and the text of every element that has a class."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.by_class: dict[str, list[str]] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attributes]
        kind = dict(attributes).get("class") or ""
        if tag not in self.VOID:
            self._open.append((tag, kind))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if kind:
            self.by_class.setdefault(kind, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if any(tag == "td" for tag, _ in self._open):
            self.rows[-1][-1] += data
        for kind in {kind for _, kind in self._open if kind}:
            self.by_class[kind][-1] += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "demo", steps=3, samples=8, max_tokens=24, quickstart=True)
    verdict = {
        "reward_model_accuracy": 0.8125,
        "gold_win_rate": 0.71484375,
        "kl_per_sequence": 12.34567,
        "ppo_seconds": 3.4,
    }
    summary = json.loads((path / "summary.json").read_text()) | verdict
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", steps=2, samples=8, max_tokens=24)


@pytest.fixture
def run(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "run")


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, read in another way than the report reads it."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()]
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def test_numbers_are_those_of_the_files(quickstart):
    page = read(report(quickstart))
    summary = json.loads((quickstart / "summary.json").read_text())
    cells = {row[0]: row[1] for row in page.rows if len(row) == 3}
    assert float(cells["Gold win rate"].rstrip("%")) == pytest.approx(100 * summary["gold_win_rate"], abs=0.051)
    assert float(cells["KL per sequence"].split()[0]) == pytest.approx(summary["kl_per_sequence"], rel=6e-4)
    best = {"score/mean": max, "eval/score": max, "critic/explained_variance": max, "train/nll": min}
    progress = {row[1]: row[2:] for row in page.rows if len(row) == 5}
    for name, pick in {**best, "kl/sequence": None, "policy/entropy": None}.items():
        found = points(quickstart / ("sft" if name == "train/nll" else ""), name)
        top = pick(found, key=lambda p: p[1]) if pick else None
        for cell, expected in zip(progress[name], (found[0], found[-1], top), strict=True):
            if expected is None:
                assert cell == "–"
                continue
            value, _, step = cell.partition(" step ")
            assert (int(step), float(value)) == (expected[0], pytest.approx(expected[1], rel=6e-4, abs=1e-9)), name


def test_samples_are_the_first_ones_side_by_side(quickstart):
    page = read(report(quickstart))
    before, after = (
        [json.loads(line) for line in (quickstart / f"eval/step-{step:06d}.jsonl").read_text().splitlines()]
        for step in (0, 3)
    )
    expected = [row["completion"] for pair in list(zip(before, after, strict=True))[:PAIRS_SHOWN] for row in pair]
    assert [text for text in page.by_class["text"] if text] == expected
    assert page.by_class["text prompt"] == [row["prompt"] for row in before[:PAIRS_SHOWN]]
    higher = sum(a["score"] > b["score"] for a, b in zip(after, before, strict=True))
    assert f"the score is higher after training on {higher}," in (quickstart / "report.html").read_text()


def test_says_what_the_run_is_and_where_its_figures_are_from(quickstart):
    text = report(quickstart).read_text()
    for part in (
        "GAE",
        "3 of 3 steps",
        "Supervised fine-tuning",
        "Reward model",
        "sft/metrics.jsonl",
        "eval/step-000003.jsonl",
    ):
        assert part in text
    assert 'class="faults"' not in text


def test_a_run_without_critic_has_no_critic_curves(tmp_path):
    text = report(write_run(tmp_path / "grpo", steps=2, samples=8, max_tokens=24, critic=False)).read_text()
    assert "no critic" in text and "Value loss" not in text and "critic/explained_variance" not in text
    assert "GRPO" in text


def test_whole_in_itself(quickstart):
    text = report(quickstart).read_text()
    page = Page(text)
    assert set(page.tags) <= HARMLESS
    assert set(re.findall(r"https?://[^\"'\s<>]+", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    names = Counter(name for name, _ in page.attributes)
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "action", "data")]
    assert not re.findall(r"@import|url\((?!#)", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert references and set(references) <= set(ids)
    assert len(re.findall(r'href="', text)) == len(re.findall(r'href="#', text))


def test_every_colour_of_a_curve_is_the_style_sheets(quickstart):
    text = report(quickstart).read_text()
    style, _, body = text.partition("</style>")
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text))
    assert {"--c0", "--c1", "--ink"} <= used
    assert all(len(re.findall(rf"{name}:", style)) == 3 for name in used)  # light, dark, print
    assert not re.findall(r"(?:fill|stroke): #(?!000000|ffffff)", body)


def test_hostile_text_stays_text(run):
    rows = [
        {"prompt": f"{HOSTILE} {n}", "completion": HOSTILE * 4000, "score": 1.0, "kl": 0.0, "tokens": 9} for n in (1, 2)
    ]
    for step in (0, 2):
        (run / f"eval/step-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE, "seconds": 1.0, "nested": {"a": [HOSTILE]}}))
    with (run / "config.toml").open("a") as file:
        file.write("\n# </pre></details><script>alert(2)</script>\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 3, HOSTILE: 1.0, f"time/{HOSTILE}": 1.0, "score/mean": 10**400, "kl/sequence": 1e300})
        )
    hostile = run.with_name('<b onclick="x">\u202e')
    run.rename(hostile)
    path = report(hostile)
    text, page = path.read_text(encoding="utf-8"), read(path)
    assert set(page.tags) <= HARMLESS and not [name for name, _ in page.attributes if name.startswith("on")]
    assert not set(text) & set("\u202e\u2028\x00\ud800")
    spelled = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x00", "⟨U+0000⟩")
    spelled = spelled.replace("\u2028", "⟨U+2028⟩").replace("\ud800", "⟨U+D800⟩")
    assert page.by_class["text prompt"][0] == f"{spelled} 1"
    assert f"of {len(HOSTILE) * 4000:,} characters are shown" in text and len(text) < 500_000
    assert "49" not in page.by_class["text prompt"][0]  # {{ 7 * 7 }} is no template
    assert "alert" not in "".join(value for _, value in page.attributes)
    folder = report(hostile, form="markdown")
    table = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert table and not [line for line in table if "<script" in line or "<img" in line]


def test_markdown_escapes_signs_and_fences():
    assert markdown("a|b\n`c` <d> [e](f) *g*") == r"a\|b \`c\` &lt;d&gt; \[e\](f) \*g\*"
    assert fenced("```\nx\n`````") == "``````text\n```\nx\n`````\n``````"


def gone(_: bytes) -> None:
    return None


@pytest.mark.parametrize(
    ("file", "change", "said", "still"),
    [
        ("summary.json", gone, "has not finished", "Not finished: 2 of 2 steps"),
        ("summary.json", lambda whole: whole[:-5], "is damaged", "score/mean"),
        ("config.toml", gone, "is missing", "score/mean"),
        ("config.toml", lambda whole: b"= 3\n" + whole, "not valid TOML", "score/mean"),
        ("metrics.jsonl", gone, "is missing", "Samples before and after"),
        ("metrics.jsonl", lambda _: b"", "holds no step yet", "Samples before and after"),
        ("metrics.jsonl", lambda whole: whole + whole[:30], "line 4 is damaged", "2 of 2 steps"),
        ("metrics.jsonl", lambda whole: whole + b"\xff\x00[]\n[1]\n", "2 lines, the first line 4, are", "2 of 2 steps"),
        ("eval/step-000000.jsonl", gone, "step 2 stands for", "Sample, step 2"),
        ("eval/step-000000.jsonl", lambda whole: whole + b"{", "1 of 17 lines are damaged", "After, step 2"),
        ("eval/step-000002.jsonl", lambda _: b"[]\n{", "2 of 2 lines are damaged", "Sample, step 0"),
        ("manifests/step-000002.json", lambda whole: whole[:-5], "cannot be read", "After, step 2"),
    ],
)
def test_damage_is_named_once_and_the_rest_is_there(run, file, change, said, still):
    changed = change((run / file).read_bytes())
    (run / file).unlink() if changed is None else (run / file).write_bytes(changed)
    text = report(run).read_text()
    assert re.findall(r"<li><code>([^<]+)</code>", text) == [file]
    assert said in text and still in text


def test_a_run_without_evaluations_says_so_in_both_forms(run):
    shutil.rmtree(run / "eval")
    assert "<code>eval/</code> no held-out samples here" in report(run).read_text()
    assert "- eval/ no held-out samples here" in (report(run, form="markdown") / "report.md").read_text()


def test_a_quickstart_in_its_first_stage_has_a_report(tmp_path):
    whole = write_run(tmp_path / "whole", steps=1, samples=8, max_tokens=24, quickstart=True)
    early = tmp_path / "early"
    early.mkdir()
    (whole / "sft").rename(early / "sft")
    text = report(early).read_text()
    assert "train/nll" in text and "Not finished" in text and "<code>config.toml</code> is missing" in text


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(CheckpointError, match="give the run") as caught:
            report(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_report_takes_the_place_of_a_report_only(run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="other things"):
        report(run, precious, "markdown")
    for output, problem in (
        (precious, "html"),
        (run / "metrics.jsonl", "html"),
        (tmp_path / "no/r.html", "no such folder"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            report(run, output)
    assert (precious / "thesis.tex").exists()
    assert report(run, tmp_path / "a.html") == tmp_path / "a.html"
    assert report(run, tmp_path / "folder", "markdown") == report(run, tmp_path / "folder", "markdown")
    assert not list(tmp_path.glob(".*"))


def test_markdown_has_its_pictures_beside_it(quickstart):
    folder = report(quickstart, form="markdown")
    text = (folder / "report.md").read_text()
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert set(linked) == {file.name for file in folder.glob("*.png")} and len(linked) == len(set(linked)) > 8
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in linked)
    first, last = points(quickstart, "score/mean")[0], points(quickstart, "score/mean")[-1]
    assert f"| score/mean | reward units | {first[1]:.4g} (step 1) | {last[1]:.4g} (step 3) |" in text


def test_the_same_files_give_the_same_bytes_without_torch(quickstart, tmp_path):
    """In processes of different hash seeds, so that no order of a set gets in."""
    program = (
        "import sys, pathlib; from pellucid.inspector.report import report;"
        "a, b = map(pathlib.Path, sys.argv[1:]); report(a, b / 'r.html'); report(a, b / 'md', 'markdown');"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        source = str(Path(__file__).parents[2] / "src")
        environment = {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": source,
            "MPLCONFIGDIR": str(tmp_path),
            "PATH": "/usr/bin:/bin",
        }
        subprocess.run([sys.executable, "-c", program, quickstart, out], check=True, env=environment)
        found.append({file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert found[0] == found[1] and len(found[0]) > 10


@pytest.mark.parametrize("count", [0, 1, 599, 600, 601, 1500, 100_001])
def test_buckets_hold_every_value_once_in_order(count):
    values = [float(n * n) for n in range(count)]
    found = buckets(values)
    assert len(found) <= 600 and [value for part in found for value in part] == values
    assert len({len(part) for part in found[:-1]}) <= 1 and all(len(part) for part in found)


def test_a_long_run_is_drawn_in_buckets_and_says_so(tmp_path):
    names = ("score/mean", "kl/sequence", "policy/entropy", "actor/lr", *(f"time/phase_{n}" for n in range(12)))
    rows = [{"step": step} | dict.fromkeys(names, step * 7919 % 1000 / 1000) for step in range(1, 1501)]
    rows[700]["policy/entropy"] = 50.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(tmp_path).read_text()
    assert len(text) < 2_000_000
    assert "1,500 steps drawn in buckets of 3 (line: mean, band: lowest to highest)." in text
    entropy = text[text.index("<h3>Entropy") : text.index("<h3>Learning rate")]
    (line,) = re.findall(r' d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: var\(--c0\)', entropy)
    assert 200 < len(re.findall("[ML] ", line)) <= 600  # fewer than 500, where points lie on a line
    assert "50" in re.findall(r"<text[^>]*>([^<]+)</text>", entropy)  # the lone peak is inside the picture, by its band
    assert "others" in text[text.index("<h3>Seconds per phase") :]
