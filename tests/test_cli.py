"""The command line as a stranger meets it: what each command prints, and how it says no."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_commands import (
    Process,
    make_data,
    make_models,
    ppo_config,
    rm_config,
    sft_config,
    shrink_quickstart,
    write_toml,
)

from pellucid import __version__, cli
from pellucid.cli import main
from pellucid.errors import RewardError
from pellucid.models import resolve_device, resolve_precision

Capture = pytest.CaptureFixture[str]
RUNS = ("quickstart", "sft", "rm", "ppo")
COMMANDS = (*RUNS, "generate", "gym", "doctor")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_models(folder)
    return make_data(folder)


def refuses(capsys: Capture, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pellucid: error: ") and len(err.splitlines()) <= 2
    return err


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_command_it_lists_the_commands(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and __version__ in out
    assert all(f"pellucid {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_each_command_has_help(name: str, flag: str, capsys: Capture) -> None:
    assert main([name, flag]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"usage: pellucid {name}") and len(out.splitlines()) > 2


def test_help_needs_no_config_and_does_not_look_at_the_rest(capsys: Capture) -> None:
    assert main(["ppo", "nothing.toml", "--help", "--rubbish"]) == 0


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from pellucid.cli import main; main(['ppo', '--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ---------------------------------------------------------------- saying no


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pop"], "unknown command 'pop'; did you mean 'ppo'?"),
        (["quick"], "did you mean 'quickstart'?"),
        (
            ["xyz"],
            "unknown command 'xyz'; commands: quickstart, sft, rm, ppo, generate, gym, view, report, replay, learn, doctor",
        ),
        (["--resume"], "unknown command '--resume'"),
        (["sft", "--hlep"], "unknown key 'hlep' in the top level; did you mean 'help'?"),
        (["generate", "--model", "m", "--prompt", "a", "--resume"], "--resume needs a value|unknown key 'resume'"),
        (["doctor", "--run.seed", "1"], "doctor: unrecognized arguments: --run.seed 1"),
        (["ppo"], "command line: models is missing"),
        (["ppo", "nothing.toml"], "nothing.toml: no such config file"),
        (["ppo", "--algo.gamma", "0.9", "run.toml"], "the config file comes first"),
        (["generate", "--model", "m"], r"give either prompt or \[data\]"),
        (["generate", "--model", "no/such/model", "--prompt", "a"], "no/such/model: no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refuses(capsys, *arguments))
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_config_is_a_file(capsys: Capture, tmp_path: Path) -> None:
    assert "is a folder; a TOML file is needed" in refuses(capsys, "ppo", str(tmp_path))
    path = tmp_path / "run.toml"
    path.write_text("[run]\nseed = = 1\n")
    assert re.search(r"run.toml: not valid TOML: .*line 2", refuses(capsys, "ppo", str(path)))


def test_debug_shows_the_traceback(home: Path, tmp_path: Path) -> None:
    flags = [
        "sft",
        "--model",
        str(tmp_path / "nothing"),
        "--data.source",
        "x.jsonl",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    for debug in ([], ["--debug"]):
        process = Process([*flags, *debug], tmp_path / "x")
        process.wait()
        assert ("Traceback" in process.log.read_text()) == bool(debug)


def test_debug_raises_what_it_would_have_said(capsys: Capture) -> None:
    from pellucid.errors import ConfigError

    with pytest.raises(ConfigError, match="models is missing"):
        main(["ppo", "--debug"])


@pytest.mark.parametrize(("name", "hint"), [("sft", "; continue with --resume"), ("generate", "")])
def test_an_interruption_is_130(name: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model, _, defaults = cli.COMMANDS[name]
    monkeypatch.setitem(cli.COMMANDS, name, (model, interrupted, defaults))
    flags = ["--data.source", "x"] if name == "sft" else ["--prompt", "x"]
    assert main([name, "--model", "m", *flags]) == 130
    assert capsys.readouterr().err == f"pellucid: interrupted{hint}\n"


def test_an_error_of_a_command_is_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fails(*_: Any) -> None:
        raise RewardError("it broke\nlast checkpoint: here")

    monkeypatch.setitem(cli.COMMANDS, "quickstart", (cli.COMMANDS["quickstart"][0], fails, {"run": {"dir": "x"}}))
    assert "it broke\nlast checkpoint: here" in refuses(capsys, "quickstart")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m pellucid.cli ppo --help | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert found.stderr == "" and found.stdout.startswith("usage: pellucid ppo")


# ---------------------------------------------------------------- doing


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_stage_prints_its_steps_and_nothing_on_stderr(
    stage: str, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = {"sft": sft_config, "rm": rm_config, "ppo": ppo_config}[stage](home, tmp_path / "run")
    assert main([stage, str(write_toml(tmp_path / "run.toml", config)), "--run.seed=5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "12 rows" in out or "24 rows" in out or "18 rows" in out
    assert re.search(r"^ +step  ", out, re.MULTILINE) and re.search(r"^ +5  ", out, re.MULTILINE)
    assert json.loads((tmp_path / "run/summary.json").read_text())["seed"] == 5


def test_the_program_itself_is_quiet_on_stderr(home: Path, tmp_path: Path) -> None:
    """In a process of its own, where no earlier import has silenced anything."""
    path = write_toml(tmp_path / "run.toml", sft_config(home, tmp_path / "run"))
    command = [sys.executable, "-W", "default", "-m", "pellucid.cli", "sft", str(path)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_quickstart_ends_with_its_verdict(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    steps = ["--sft-steps", "2", "--rm-steps", "2", "--ppo-steps", "2"]
    process = Process(["quickstart", "--run.dir", str(run_dir), *steps], run_dir, setup=shrink_quickstart)
    assert process.wait() == 0, process.log.read_text()
    said = process.log.read_text()
    assert "reward model agrees with the gold preference on" in said and f"run directory: {run_dir}" in said
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"reward_model_accuracy", "gold_win_rate", "kl_per_sequence", "seconds", "seed"} <= summary.keys()


def test_generate_prints_the_samples(home: Path, capsys: Capture) -> None:
    flags = ["--model", str(home / "policy"), "--device", "cpu", "--max-new-tokens", "5"]
    assert (
        main(["generate", *flags, "--prompt", "The tea, was", "--prompt", "The soup", "--samples-per-prompt", "2"]) == 0
    )
    out, err = capsys.readouterr()
    assert err == "" and out.count("The tea, was") == 2 and out.count("The soup") == 2


def test_generate_writes_the_samples(home: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--model", str(home / "policy"), "--device", "cpu", "--max-new-tokens", "5", "--temperature", "0"]
    data = ["--data.source", str(home / "prompts.jsonl"), "--data.limit", "3", "--data.max-tokens", "32"]
    assert main(["generate", *flags, *data, "--output", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["The tea was", "The soup was", "The bread was"]
    assert capsys.readouterr().err == ""


def test_generate_refuses_what_does_not_fit(home: Path, capsys: Capture) -> None:
    flags = ["--model", str(home / "policy"), "--device", "cpu", "--max-new-tokens", "500", "--prompt", "The"]
    assert main(["generate", *flags]) == 2
    assert "with max_new_tokens=500 that makes" in capsys.readouterr().err


# ---------------------------------------------------------------- doctor


def test_doctor_is_fine_here_and_really_samples(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid import doctor

    monkeypatch.setattr(doctor, "hub_reachable", lambda _: False)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("all fine\n")
    for name in ("versions", "cpu", "memory", "disk", "auto", "extras", "hub", "self-test"):
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    gap = re.search(r"log-probs differ by (\S+) nats", out)
    tolerance = {"float32": 1e-3, "bfloat16": 0.05}[resolve_precision("auto", resolve_device("auto"))]
    assert gap is not None and float(gap[1]) < tolerance
    assert "cannot be reached: local folders, files and the built-in corpus work" in out


def test_doctor_names_each_problem(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid import doctor

    def broken(_: list[str]) -> str:
        raise RuntimeError("the sampler is off\nmore")

    monkeypatch.setattr(doctor, "CHECKS", {"disk": doctor._disk, "self-test": broken})
    monkeypatch.setattr(doctor, "LOW_DISK", 1 << 60)
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "self-test    failed" in lines and lines[-1] == "2 problems"
    assert "problem: self-test: RuntimeError: the sampler is off" in lines


def test_doctor_does_not_wait_for_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from pellucid import doctor

    released = threading.Event()
    monkeypatch.setattr(doctor, "hub_reachable", lambda _: released.wait(60))
    monkeypatch.setattr(doctor, "HUB_TIMEOUT", 0.05)
    assert "cannot be reached" in doctor._hub([])
    released.set()
