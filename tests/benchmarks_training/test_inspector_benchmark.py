"""The benchmark of the page: rehearsed in a browser on a small record, and what it says without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **env):
    command = [sys.executable, "-m", "benchmarks.inspector", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no chromedriver on the PATH")
def test_a_rehearsal_from_the_record_to_the_page_of_results(tmp_path):
    from benchmarks import report

    path = tmp_path / "inspector.json"
    done = run("--tiny", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert len(result["bars"]) == 9 and all(bar["value"] is not None for bar in result["bars"])
    (measured,) = result["rounds"]
    for name, page in measured["pages"].items():
        assert page["paint"] > 0 and 0 < page["content"] <= page["settled"] < 20_000, name
        assert all(page["counts"]) and page["server_memory"][0] > 10 * 2**20, name
    payloads = measured["pages"]["token"]["payloads"]
    assert {"run/0/step/1/samples.json", "run/0/step/1/chunk/6.json"} <= set(payloads) and min(payloads.values()) > 0
    assert measured["pages"]["token"]["counts"][0] == 48 and measured["scroll"]["rows"] == 200
    assert measured["scroll"]["frames"] > 5 and (len(measured["jumps"]), len(measured["clicks"])) == (3, 4)
    assert (len(measured["sort"]), len(measured["filter"])) == (6, 6)
    page = report.page(report.results(tmp_path))
    assert all(table["title"] in page for table in result["tables"])


def test_a_slow_page_fails_its_bars():
    from benchmarks.inspector import PAGES, bars

    pages = {name: {"content": 400.0} for name in PAGES}
    quick = {
        "scroll": {"frames": [16.7] * 20, "blank": 0},
        "jumps": [20.0],
        "sort": [50.0],
        "filter": [250.0],
        "clicks": [30.0],
    }
    assert all(bar["holds"] for bar in bars([{"pages": pages, **quick}] * 3))
    slow = {
        "pages": {name: {"content": 1001.0} for name in PAGES},
        "scroll": {"frames": [16.7] * 18 + [51.0] * 2, "blank": 0},
        "jumps": [20.0, None], "sort": [301.0], "filter": [301.0], "clicks": [101.0],
    }  # fmt: skip
    assert not any(bar["holds"] for bar in bars([slow]))
    blank = bars([{"pages": pages, **quick}] * 2 + [{"pages": pages, **quick, "jumps": [None]}])
    assert [bar["name"] for bar in blank if not bar["holds"]] == ["frames and jumps in which the table showed no rows"]


@pytest.mark.parametrize("size", [1, 19, 20, 21, 200])
def test_a_percentile_is_one_of_the_values(size):
    from benchmarks.inspector import percentile

    values = np.random.default_rng(size).normal(size=size)
    for percent in (5, 50, 95):
        assert percentile(list(values), percent) == np.percentile(values, percent, method="inverted_cdf")


def test_a_page_that_shows_another_record_is_not_measured():
    from benchmarks.harness import BenchmarkError
    from benchmarks.inspector import check_count

    check_count("rows", 200, 200)
    with pytest.raises(BenchmarkError, match="the page shows 199 rows of 200"):
        check_count("rows", 199, 200)


@pytest.mark.parametrize(
    "arguments, said",
    [(["--rounds", "0"], "--rounds must be at least 1"), (["--tiny"], "chromedriver is not on the PATH")],
)
def test_what_is_missing_is_one_sentence_and_exit_code_2(arguments, said, tmp_path):
    done = run(*arguments, PATH=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
