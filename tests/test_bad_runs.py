"""What goes wrong after training began: the error names the step or the sample, and the last checkpoint stays whole.

Rewards that fail, numbers that are not finite, disks that are full, checkpoints that are damaged, and directories that
hold something else. Each runs the command in this process.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_commands import make_data, make_models, ppo_config, rm_config, sft_config, write_toml

from pellucid.checkpoint import _fault
from pellucid.cli import main
from pellucid.execution.learner import Learner

SMALL: dict[str, Any] = {
    "ptx_data": None,
    "algo": {"ptx_coef": 0.0, "num_epochs": 1, "minibatch_size": 6, "micro_batch_size": 6},
}
SMALL |= {"total_steps": 4, "eval": {"every": 0, "num_prompts": 2}}
CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft_config,
    "rm": rm_config,
    "ppo": lambda home, run_dir: ppo_config(home, run_dir, **SMALL),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_models(folder)
    return make_data(folder)


class Runner:
    def __init__(self, home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.folder, self.capsys = home, folder, capsys
        self.run_dir = folder / "run"

    def __call__(self, stage: str, *flags: str) -> tuple[int, str, str]:
        path = write_toml(self.folder / "run.toml", CONFIGS[stage](self.home, self.run_dir))
        code = main([stage, str(path), *flags])
        out, err = self.capsys.readouterr()
        return code, out, err

    def fails(self, stage: str, *flags: str) -> str:
        code, _, err = self(stage, *flags)
        assert code == 2, err
        assert err.startswith("pellucid: error: ") and len(err.splitlines()) <= 2 and "Traceback" not in err
        return err

    def completes(self, stage: str, *flags: str) -> str:
        code, out, err = self(stage, *flags)
        assert (code, err) == (0, "")
        return out

    def checkpoints(self) -> dict[str, str | None]:
        """Name -> what is wrong with it."""
        return {path.name: _fault(path) for path in sorted((self.run_dir / "checkpoints").iterdir())}

    def reward(self, body: str) -> list[str]:
        """Flags for a reward function whose third call (step 3) runs `body`."""
        path = self.folder / "reward.py"
        path.write_text(
            "calls = 0\n"
            "def length(prompts, completions, **_):\n"
            "    global calls\n"
            "    calls += 1\n"
            "    scores = [float(len(text)) for text in completions]\n"
            f"    if calls >= 4: {body}\n"  # the first call is the evaluation before step 1
            "    return scores\n"
        )
        return ["--reward.function", f"{path}:length", "--models.reward", "none"]


@pytest.fixture
def run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(home, tmp_path, capsys)


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no such answer')", "reward function length raised ValueError: no such answer on prompt "),
        ("scores[2] = float('nan')", "reward function length returned nan, on prompt "),
        ("scores[2] = float('inf')", "reward function length returned inf, on prompt "),
        ("scores[2] = 1e300", "reward function length returned 1e+300, which is infinite in float32, on prompt "),
        (
            r"raise ValueError('one\n\ntwo\nthree')",
            "reward function length raised ValueError: one two three on prompt ",
        ),
        ("scores[2] = 'good'", "reward function length returned str 'good', not a number, on prompt "),
        ("scores[2] = [1.0]", "reward function length returned list [1.0], not a number, on prompt "),
        ("scores[2] = None", "length has no score for prompt "),
        ("scores.pop()", "reward function length returned 5 scores for 6 samples"),
        ("return 1.0", "reward function length returned float 1.0; it must return a list of 6 numbers"),
        ("return None", "reward function length returned NoneType None; it must return a list of 6 numbers"),
    ],
)
def test_a_reward_function_that_fails_names_itself_and_the_sample(run: Runner, body: str, said: str) -> None:
    error = run.fails("ppo", *run.reward(body))
    assert said in error and ("sample 0" in error or "samples" in error or "list of 6" in error)
    assert f"last checkpoint: {run.run_dir}/checkpoints/step-000002; continue with --resume" in error
    assert run.checkpoints() == {"step-000002": None}


def test_a_mended_reward_function_continues_the_run(run: Runner) -> None:
    run.fails("ppo", *run.reward("1 / 0"))
    assert "resuming after step 2" in run.completes("ppo", *run.reward("pass"), "--resume")
    assert set(run.checkpoints()) == {"step-000002", "step-000004"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing.py:f", "nothing.py: no such file (for the function 'f')"),
        ("reward.py", "is not a function; write file.py:name or package.module:name"),
        ("{folder}/reward.py:size", "has no function 'size'"),
        ("{folder}/broken.py:f", "cannot be imported: SyntaxError"),
        ("no_such_package.rewards:f", "cannot be imported: ModuleNotFoundError"),
        ("{folder}/other.py:f", "reward function f(x) has an unknown signature"),
    ],
)
def test_a_reward_function_that_cannot_be_had_is_named_before_training(run: Runner, spec: str, said: str) -> None:
    run.reward("pass")
    (run.folder / "broken.py").write_text("def f(:")
    (run.folder / "other.py").write_text("def f(x): return x")
    for key in ("--reward.function", "--eval.judge"):
        error = run.fails("ppo", "--models.reward", "none", *run.reward("pass"), key, spec.format(folder=run.folder))
        assert said in error
        assert not (run.run_dir / "metrics.jsonl").exists()


# ---------------------------------------------------------------- numbers that are not finite


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, str], None]:
    """poison(role, update, where): from then on a weight, or a gradient before the step, of that role is not finite."""

    def arm(role: str, update: int, where: str) -> None:
        healthy = Learner.step

        def step(self: Learner) -> dict[str, float]:
            due = self.role == role and self.updates + 1 == update
            parameter = next(self.module.parameters())
            if due and where == "gradient":
                assert parameter.grad is not None
                parameter.grad.view(-1)[0] = float("inf")
            stats = healthy(self)
            if due and where == "weight":
                with torch.no_grad():
                    parameter.view(-1)[:] = float("nan")
            return stats

        monkeypatch.setattr(Learner, "step", step)

    return arm


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize(
    ("where", "update", "said"),
    [("weight", 2, "step 3: {stage}: the loss is nan"), ("gradient", 3, "step 3: {stage}: the gradient of ")],
)
def test_a_loss_or_gradient_that_is_not_finite_names_the_step_of_a_supervised_run(
    run: Runner, poison: Callable[..., None], stage: str, where: str, update: int, said: str
) -> None:
    poison(stage, update, where)
    error = run.fails(stage, "--learn.eval-every", "0", "--run.checkpoint-every", "1")
    assert said.format(stage=stage) in error and "last checkpoint: " in error
    assert run.checkpoints()["step-000001"] is None


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_gradient_that_is_not_finite_names_the_step_and_the_tensor(
    run: Runner, poison: Callable[..., None], role: str
) -> None:
    poison(role, 3, "gradient")
    error = run.fails("ppo")
    assert f"step 3: {role}: the gradient of model.embed_tokens.weight is not finite at update 3" in error
    assert run.checkpoints() == {"step-000002": None}


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_weights_that_are_not_finite_name_the_step(run: Runner, poison: Callable[..., None], role: str) -> None:
    poison(role, 2, "weight")
    error = run.fails("ppo", "--run.checkpoint-every", "1")
    assert "step 3: " in error
    assert set(run.checkpoints().values()) == {None}


def test_a_reward_too_large_to_square_names_the_step(run: Runner) -> None:
    assert "step 3: critic: the loss is " in run.fails(
        "ppo", *run.reward("scores = [3e38, -3e38, 3e38, 1.0, 2.0, 3.0]")
    )
    assert run.checkpoints() == {"step-000002": None}


# ---------------------------------------------------------------- disks


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(options): a tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


@pytest.mark.parametrize("stage", CONFIGS)
@pytest.mark.parametrize("kib", [150, 400, 700])
def test_a_full_disk_is_a_line_and_leaves_whole_files(
    run: Runner, mounted: Callable[[str], Path], stage: str, kib: int
) -> None:
    """At every size of disk something else is the first that does not fit."""
    disk = mounted(f"size={kib}k")
    run.run_dir = disk / "run"
    error = run.fails(stage, "--run.checkpoint-every", "1", "--run.keep-checkpoints", "9")
    assert "cannot be written: No space left on device; free some space" in error
    if (run.run_dir / "checkpoints").exists():
        assert set(run.checkpoints().values()) <= {None}
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    flags = ["--run.checkpoint-every", "1", "--run.keep-checkpoints", "9"]
    run.completes(stage, *flags, *(["--resume"] if "last checkpoint" in error else []))


def test_a_disk_that_fills_while_metrics_are_written_is_a_line(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.metrics import JsonlSink

    healthy = JsonlSink.log

    def log(self: JsonlSink, step: int, metrics: Any) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        healthy(self, step, metrics)

    monkeypatch.setattr(JsonlSink, "log", log)
    error = run.fails("ppo")
    assert f"{run.run_dir}: cannot be written: No space left on device" in error and "step-000002" in error
    monkeypatch.undo()
    run.completes("ppo", "--resume")


def test_a_run_directory_below_a_file_is_told(run: Runner) -> None:
    (run.folder / "file").write_text("")
    run.run_dir = run.folder / "file" / "run"
    assert "file/run: cannot be written: Not a directory" in run.fails("sft")


def test_a_disk_that_is_read_only_is_told(run: Runner, mounted: Callable[[str], Path]) -> None:
    run.run_dir = mounted("ro,size=1m") / "run"
    assert "run: cannot be written: Read-only file system; choose another folder" in run.fails("sft")


def test_the_output_of_generate_below_a_missing_folder_is_told(run: Runner) -> None:
    flags = ["--model", f"{run.home}/policy", "--prompt", "The", "--output", f"{run.folder}/no/out.jsonl"]
    assert main(["generate", *flags, "--device", "cpu"]) == 2
    assert "no/out.jsonl: cannot be written: No such file or directory" in run.capsys.readouterr().err


# ---------------------------------------------------------------- checkpoints and run directories


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_it_would_have(run: Runner) -> None:
    run.completes("sft")
    weights = (run.run_dir / "actor/model.safetensors").read_bytes()
    (run.run_dir / "summary.json").unlink()  # as if it had been killed right before the end
    os.truncate(run.run_dir / "checkpoints/step-000005/model.pt", 1000)
    said = run.completes("sft", "--resume")
    assert "step-000005 is damaged (model.pt does not match its checksum): trying the one before" in said
    assert "resuming after step 4" in said
    assert (run.run_dir / "actor/model.safetensors").read_bytes() == weights


def test_when_no_checkpoint_is_whole_it_does_not_start_over_by_itself(run: Runner) -> None:
    run.completes("sft")
    (run.run_dir / "summary.json").unlink()
    for path in (run.run_dir / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    metrics = (run.run_dir / "metrics.jsonl").read_bytes()
    assert "no checkpoint is whole; restore one, or remove this folder to start over" in run.fails("sft", "--resume")
    assert (run.run_dir / "metrics.jsonl").read_bytes() == metrics


def test_a_run_of_another_config_is_not_resumed(run: Runner) -> None:
    run.completes("sft")
    error = run.fails("sft", "--resume", "--optimizer.lr", "0.5", "--run.seed", "7")
    assert "holds a run of another config (optimizer.lr: 0.01 -> 0.5; run.seed: 0 -> 7); not resumed" in error
    assert "seed = 0" in (run.run_dir / "config.toml").read_text()


def test_a_run_of_another_command_is_not_resumed(run: Runner) -> None:
    run.completes("sft")
    assert "holds a run of another config (" in run.fails("rm", "--resume")


def test_a_directory_that_holds_a_run_needs_resume(run: Runner) -> None:
    run.completes("sft")
    assert "already holds a run; add --resume to continue it, or choose another run.dir" in run.fails("sft")
    assert "already finished" in run.completes("sft", "--resume")


def test_resume_of_nothing_starts_from_the_beginning_and_says_so(run: Runner) -> None:
    assert "holds no checkpoint yet: starting from the beginning" in run.completes("sft", "--resume")


def test_two_processes_in_one_directory(run: Runner) -> None:
    import fcntl

    run.run_dir.mkdir()
    with (run.run_dir / ".lock").open("w") as lock:  # flock is per open file, so this stands for another process
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is running in this directory" in run.fails("sft")


def test_a_checkpoint_of_other_data_is_not_resumed(run: Runner) -> None:
    """The same path with other rows in it: the order of the data would not be the run's own."""
    from tiny_commands import SUPERVISED, write_jsonl

    data = write_jsonl(run.folder / "rows.jsonl", SUPERVISED)
    run.completes("sft", "--data.source", str(data))
    (run.run_dir / "summary.json").unlink()
    write_jsonl(data, SUPERVISED[:-1])
    error = run.fails("sft", "--data.source", str(data), "--resume")
    assert "cannot resume the data order: size was 24 when the state was saved, and is 23 now" in error
