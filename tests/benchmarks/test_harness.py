"""Contestants in processes of their own: what they return, and what happens when they do not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import harness
from benchmarks.figures import bar, case, speedup_bar, speedups, summary, write_result
from benchmarks.harness import ContestantError, alternate, at_its_best

SPEC = {"model": "none", "precision": "float32", "threads": 1, "workload": "none", "options": {}}


def quiet(_):
    pass


def test_a_run_returns_seconds_tokens_memory_and_versions(contestant):
    with contestant("fine", "def measure(state): return {'seconds': 0.5, 'tokens': 7, 'losses': [1.0]}") as fine:
        run = fine.run()
        assert run.pop("peak_rss_bytes") > 1_000_000
        assert run == {"seconds": 0.5, "tokens": 7, "losses": [1.0]}
        assert "python" in fine.versions


def test_the_state_can_say_what_it_chose(contestant):
    body = """
        class State:
            about = {"batch": 4}
        def prepare(spec): return State()
    """
    with contestant("choosy", body) as choosy:
        choosy.start()
        assert choosy.about == {"batch": 4}


def test_what_libraries_print_does_not_disturb(contestant):
    body = """
        import os, subprocess
        def measure(state):
            print("progress: 50 %"); os.write(1, b"from C\\n"); subprocess.run(["echo", "from a child"])
            return {"seconds": 1.0, "tokens": 1}
    """
    with contestant("noisy", body) as noisy:
        assert noisy.run()["tokens"] == 1


def test_memory_counts_children(contestant):
    hungry = "held = bytearray(200_000_000); print('up', flush=True); import time; time.sleep(60)"
    body = f"""
        import subprocess
        def prepare(spec):
            child = subprocess.Popen([sys.executable, "-c", {hungry!r}], stdout=subprocess.PIPE)
            child.stdout.readline()
            return child
    """
    with contestant("parent", body) as parent:
        assert parent.run()["peak_rss_bytes"] > 200_000_000


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "body, reason",
    [
        ("def prepare(spec): raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("def measure(state): raise ValueError('bad batch')", "ValueError: bad batch"),
        ("def prepare(spec): import os; os._exit(3)", "ended without an answer (exit status 3)"),
        ("def measure(state): import os; os.kill(os.getpid(), 9)", "ended without an answer (signal SIGKILL)"),
        ("def measure(state): return {'seconds': 1.0}", "returned no tokens"),
        ("raise SystemExit('cannot import it')", "ended without an answer (exit status 1)"),
    ],
)
def test_a_failure_is_named_with_its_reason(contestant, body, reason):
    broken = contestant("broken", body)
    with pytest.raises(ContestantError) as caught:
        broken.run()
    assert caught.value.reason == reason
    assert str(caught.value).startswith("broken: ")


def test_the_last_output_is_shown(contestant):
    with pytest.raises(ContestantError, match="the disk is full"):
        contestant("broken", "def prepare(spec): print('the disk is full'); raise OSError('no')").run()


def test_a_spec_that_lacks_something_is_refused(contestant):
    with pytest.raises(ContestantError, match="the spec has no workload and no options"):
        contestant("lacking", spec={"model": "m", "precision": "float32", "threads": 1}).run()


@pytest.mark.parametrize("where", ["prepare(spec)", "measure(state)"])
def test_one_that_hangs_is_killed_with_all_that_it_started(contestant, where, tmp_path):
    note = tmp_path / "child"
    body = f"""
        import subprocess, time, pathlib
        def {where}:
            child = subprocess.Popen(["sleep", "600"])
            pathlib.Path({str(note)!r}).write_text(str(child.pid))
            time.sleep(600)
    """
    stuck = contestant("stuck", body)
    stuck.start_deadline = stuck.run_deadline = 3
    started = time.monotonic()
    with pytest.raises(ContestantError, match=r"stuck: did not .* within 3 s"):
        stuck.run()
    assert time.monotonic() - started < 15
    assert _soon(lambda: not _alive(int(note.read_text())), 5)


def _alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_contestant_outlives_the_benchmark(contestant, tmp_path, how):
    note = tmp_path / "pid"
    body = f"""
        import os, pathlib, time
        def measure(state):
            pathlib.Path({str(note)!r}).write_text(str(os.getpid()))
            time.sleep(600)
    """
    script = contestant("endless", body).script
    program = (
        f"import sys; sys.path.insert(0, {str(harness.HERE.parent)!r})\n"
        "from benchmarks.harness import Contestant, alternate, main\n"
        f"main(lambda _: alternate([Contestant('endless', sys.executable, {script!r}, {SPEC!r})], 1, required=()))"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    try:
        assert _soon(note.exists, 20)
        benchmark.send_signal(how)
        benchmark.wait(timeout=45)
        assert _soon(lambda: not _alive(int(note.read_text())), 5)
    finally:
        benchmark.kill()
        benchmark.wait()


def _soon(condition, seconds):
    for _ in range(10 * seconds):
        if condition():
            return True
        time.sleep(0.1)
    return False


# ---------------------------------------------------------------- in turn


def test_contestants_run_in_turn_after_one_warm_up_each(contestant, tmp_path):
    diary = tmp_path / "diary"

    def body(name):
        return f"""
            def measure(state):
                with open({str(diary)!r}, "a") as diary: diary.write({name!r})
                return {{"seconds": 1.0, "tokens": 2}}
        """

    outcome = alternate([contestant("a", body("a")), contestant("b", body("b"))], 3, required=(), say=quiet)
    assert diary.read_text() == "ab" + "ababab"
    assert [len(runs) for runs in outcome.runs.values()] == [3, 3]


def test_one_that_fails_is_left_out_unless_it_is_required(contestant):
    body = """
        runs = []
        def measure(state):
            runs.append(1)
            if len(runs) > 2: raise RuntimeError("tired")
            return {"seconds": 1.0, "tokens": 2}
    """
    outcome = alternate([contestant("pellucid"), contestant("peer", body)], 3, say=quiet)
    assert outcome.failures == {"peer": "RuntimeError: tired"}
    assert list(outcome.runs) == ["pellucid"] and len(outcome.runs["pellucid"]) == 3
    with pytest.raises(ContestantError, match="tired"):
        alternate([contestant("pellucid", body)], 3, say=quiet)


def test_the_fastest_variant_is_taken(contestant):
    def taking(seconds):
        return f"def measure(state): return {{'seconds': {seconds}, 'tokens': 12}}"

    variants = [
        contestant("peer", taking(2), variant="slow"),
        contestant("peer", taking(1), variant="fast"),
        contestant("peer", taking(3), variant="slower"),
        contestant("peer", "def prepare(spec): raise OSError('no such mode')", variant="broken"),
    ]
    best, tried = at_its_best(variants, say=quiet)
    assert best.variant == "fast"
    assert tried == {"slow": 6.0, "fast": 12.0, "slower": 4.0, "broken": "failed: OSError: no such mode"}
    assert [v._process is not None for v in variants] == [False, True, False, False]


def test_no_variant_that_works_is_a_failure(contestant):
    broken = "def prepare(spec): raise OSError('no AVX512')"
    variants = [contestant("peer", broken, variant="a"), contestant("peer", broken, variant="b")]
    outcome = alternate([[contestant("pellucid")], variants], 1, say=quiet)
    assert outcome.failures == {"peer": "OSError: no AVX512"}
    made = speedup_bar("faster", outcome, "peer", 2.0)
    assert made["holds"] is None and made["why"] == "peer could not run: OSError: no AVX512"


# ---------------------------------------------------------------- figures


def runs(*pairs):
    return [{"seconds": seconds, "tokens": tokens, "peak_rss_bytes": 5} for seconds, tokens in pairs]


def test_speedups_are_per_round():
    fast, slow = runs((1.0, 100), (2.0, 100)), runs((3.0, 100), (4.0, 50))
    assert speedups(fast, slow) == [3.0, 4.0]
    assert speedups(fast, slow, per_token=False) == [3.0, 2.0]


def test_summary():
    made = summary(runs((1.0, 10), (4.0, 20), (2.0, 10)))
    assert (made["median"], made["min"], made["max"]) == (2.0, 1.0, 4.0)
    assert made["tokens_per_second"] == 5.0 and made["tokens"] == [10, 20, 10]


@pytest.mark.parametrize(
    "values, bound, at_least, value, holds",
    [
        ([3.0, 1.0, 2.0], 2.0, True, 2.0, True),
        ([3.0, 1.0, 2.0], 2.1, True, 2.0, False),
        ([0.5, 0.7], 0.6, False, 0.6, True),
        (0.61, 0.6, False, 0.61, False),
        (None, 2.0, True, None, None),
        ([], 2.0, True, None, None),
    ],
)
def test_bars(values, bound, at_least, value, holds):
    made = bar("x", values, bound, at_least)
    assert (made["value"], made["holds"]) == (value, holds)


def test_results_are_written_whole(tmp_path, contestant):
    outcome = alternate([contestant("pellucid"), contestant("peer")], 2, say=quiet)
    path = write_result(
        "sample",
        cases={"dense": case({"prompts": 3}, outcome)},
        bars=[speedup_bar("equal", outcome, "peer", 1.0)],
        machine={"cpu": "one"},
        path=tmp_path / "deep" / "sample.json",
        notes=["A note."],
    )
    result = json.loads(path.read_text())
    assert result["bars"][0]["holds"] is True
    assert result["cases"]["dense"]["contestants"]["peer"]["pellucid_is_faster"] == 1.0
    assert result["notes"] == ["A note."] and result["command"].startswith("python -m benchmarks.sample")
    assert [p.name for p in path.parent.iterdir()] == ["sample.json"]


def test_an_error_is_one_line_and_exit_code_2(capsys):
    def command(_):
        raise harness.BenchmarkError("the oven is cold")

    with pytest.raises(SystemExit) as caught:
        harness.main(command)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the oven is cold\n"
