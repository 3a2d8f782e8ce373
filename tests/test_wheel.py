"""The wheel alone, installed in an environment of its own, run from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel in it, and this interpreter's packages within reach.

    A path that a .pth file adds is not searched for further .pth files, so an editable install stays out of reach.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own.strip()) / "dependencies.pth").write_text("\n".join(sorted(packages)) + "\n")
    return folder / "bin"


def run(installed: Path, cwd: Path, program: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [installed / program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pellucid"}
    assert {"pellucid/py.typed", "pellucid/inspector/learn/zh/8-data-flow.md"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {path for pattern in ("*.py", "*.[ch]") for path in (ROOT / "src/pellucid").rglob(pattern)}
    assert {path.relative_to(ROOT / "src").as_posix() for path in sources} <= set(names)


def test_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import pellucid; print(pellucid.__file__)")
    assert where.startswith(str(installed.parent))


def test_version_and_doctor_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    from pellucid import __version__

    assert run(installed, tmp_path, "pellucid", "--version").strip() == __version__
    assert "torch" in run(installed, tmp_path, "pellucid", "doctor").lower()
    assert not list(tmp_path.iterdir())


def test_quickstart_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    tiny = "--sft-steps 3 --rm-steps 3 --ppo-steps 2 --run.threads 1 --run.device cpu".split()
    run(installed, tmp_path, "pellucid", "quickstart", *tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert {"reward_model_accuracy", "gold_win_rate", "kl_per_sequence", "seconds", "seed"} <= summary.keys()
