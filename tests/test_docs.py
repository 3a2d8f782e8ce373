"""The documents against the code: commands run, links lead somewhere, every metric and config key is explained."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_commands as tiny
import torch

from pellucid.cli import COMMANDS, TOOLS, main
from pellucid.config import PPOConfig, RMConfig, SFTConfig, load_config
from pellucid.metrics import Reporter

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
METRIC = r"[a-z_]+/[a-z0-9_]+"
QUIET = Reporter(quiet=True)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a bash block."""
    return [
        (page.name, line)
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), "bash")
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets the thread count of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in policy/ and reward/, and the three data files."""
    folder = tmp_path_factory.mktemp("home")
    tiny.make_models(folder)
    return tiny.make_data(folder)


# ---------------------------------------------------------------- links and names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_are_named_exist(page: Path) -> None:
    """`stages/ppo.py`, `docs/…`, `configs/…` are files; `core.gae`, `Learner._audit` are in the code."""
    text = page.read_text(encoding="utf-8")
    source = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("src/pellucid/**/*.py"))
    for name in re.findall(r"`([\w./*-]+\.(?:py|md|toml))`", text):
        if "/" in name and not name.startswith(("path/", "runs/")):
            found = [*ROOT.glob(name), *ROOT.glob(f"src/pellucid/{name}")]
            assert found, f"{name_of(page)} names {name}"
    for name in re.findall(r"`core\.(\w+)`", text):
        assert f"def {name}(" in source or f"class {name}" in source, f"{name_of(page)} names core.{name}"
    for owner, name in re.findall(r"`([A-Z]\w+|stages/\w+|types|execution/\w+)\.(_?[a-z]\w+)`", text):
        if name not in ("py", "md", "toml"):
            assert f"def {name}(" in source, f"{name_of(page)} names {owner}.{name}"


# ---------------------------------------------------------------- config


def keys_of(model: Any, prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        nested = [
            a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
        ]
        yield prefix + key
        if nested:
            yield from keys_of(nested[0], f"{prefix}{key}.")


@pytest.mark.parametrize("page", ["config", "record"])
def test_generated_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location(f"make_{page}_md", ROOT / f"docs/make_{page}_md.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    assert written == module.render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_keys_that_are_named_exist(page: Path) -> None:
    known = {key for model, _, _ in COMMANDS.values() for key in keys_of(model)}
    sections = {key.split(".")[0] for key in known if "." in key}
    for key in re.findall(r"`(?:--)?([a-z_]+(?:\.[a-z_-]+)+)(?: [^`]*)?`", page.read_text(encoding="utf-8")):
        section, _, rest = key.partition(".")
        if (
            section in sections
            and not rest.endswith(("toml", "json", "jsonl", "py"))
            and not rest.startswith("columns.")
        ):
            assert f"{section}.{rest.replace('-', '_')}" in known, f"{name_of(page)} names {key}"


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/**/*.toml")), ids=name_of)
def test_shipped_config_says_its_own_command(file: Path) -> None:
    """The first line is the command that runs it, and that command accepts it."""
    pellucid, command, path = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split()
    assert (pellucid, path) == ("pellucid", name_of(file))
    model, _, defaults = COMMANDS[command]
    load_config(model, file, [], defaults)


# ---------------------------------------------------------------- metrics


def documented(*titles: str) -> set[str]:
    """Names in the first column of the tables under these headings of docs/metrics.md."""
    names: set[str] = set()
    for section in re.split(r"^## ", METRICS, flags=re.MULTILINE)[1:]:
        if section.splitlines()[0] in titles:
            names |= set(re.findall(rf"^\| `({METRIC})` \|", section, re.MULTILINE))
    return names


def logged(run_dir: Path) -> set[str]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return {name for row in rows for name in row} - {"step"}


def test_every_metric_of_sft_is_documented(home: Path, tmp_path: Path) -> None:
    from pellucid import train_sft

    train_sft(SFTConfig.model_validate(tiny.sft_config(home, tmp_path / "run")), reporter=QUIET)
    assert logged(tmp_path / "run") == documented("sft")


def test_every_metric_of_rm_is_documented(home: Path, tmp_path: Path) -> None:
    from pellucid import train_rm

    summary = train_rm(RMConfig.model_validate(tiny.rm_config(home, tmp_path / "run")), reporter=QUIET)
    shared = {name for name in documented("sft") if name.startswith(("optimizer/", "time/"))}
    assert logged(tmp_path / "run") == documented("rm") | shared
    assert all(f"`{name}`" in METRICS for name in summary if name not in ("steps", "seconds", "seed"))


def test_every_metric_of_ppo_is_documented(home: Path, tmp_path: Path) -> None:
    """With a critic, ptx and a judge; and with groups and the KL in the loss: together they log everything."""
    from pellucid import train_ppo

    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    with_critic = tiny.ppo_config(home, tmp_path / "critic", total_steps=2, trace={"alternatives": 2})
    groups = tiny.ppo_config(
        home,
        tmp_path / "groups",
        total_steps=1,
        ptx_data=None,
        rollout={"samples_per_prompt": 2},
        algo={"advantage": "grpo", "kl_in": "loss", "ptx_coef": 0.0},
        trace={"alternatives": 2},
    )
    for config in (with_critic, groups):
        train_ppo(PPOConfig.model_validate(config), judge=judge, reporter=QUIET)
    parts = ("the rollout", "the critic", "the actor", "held-out prompts", "time")
    with_critic_names, group_names = logged(tmp_path / "critic"), logged(tmp_path / "groups")
    assert with_critic_names | group_names == documented(*(f"ppo: {part}" for part in parts))
    critic_only = documented("ppo: the critic") | {"time/values", "time/update_critic", "actor/ptx_loss"}
    assert with_critic_names - group_names == critic_only
    assert group_names - with_critic_names == {"groups/degenerate", "actor/kl_loss"}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/algorithms/*.md")), ids=name_of)
def test_algorithm_page_has_its_parts_and_names_real_metrics(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("**Source.**", "## Formula", "## Flags", "## Metrics", "## Traps"):
        assert part in text
    prefixes = "train eval optimizer time score kl policy rollout advantages groups critic actor".split()
    for name in re.findall(rf"`({METRIC})`", text):
        if name.split("/")[0] in prefixes:
            assert f"`{name}`" in METRICS, f"{name_of(page)} names {name}"


def test_every_algorithm_has_a_page_and_a_paper() -> None:
    from pellucid.execution.workers import POLICY_LOSSES
    from pellucid.stages.advantages import ADVANTAGES

    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/algorithms/*.md"))
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    for name in [*ADVANTAGES, *POLICY_LOSSES]:
        assert f'"{name}"' in pages, name
        assert f'"{name}"' in papers, name


# ---------------------------------------------------------------- commands


@pytest.fixture
def workplace(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's TOML files, and with tiny data and models under the names that it uses."""
    for block in blocks(README, "toml"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
    given = {"sft": "supervised", "pairs": "pairs", "prompts": "prompts", "heldout": "prompts"}
    for name, source in given.items():
        (tmp_path / f"{name}.jsonl").symlink_to(home / f"{source}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text)
def test_commands_in_the_documents_are_accepted(page: str, line: str, workplace: Path) -> None:
    """Long ones by their own parser alone; `test_readme_pipeline_runs` runs the README's."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        target = arguments[0]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: no target {target}"
    elif program == "pellucid" and arguments[0] in COMMANDS:
        model, _, defaults = COMMANDS[arguments[0]]
        flags = [argument for argument in arguments[1:] if argument != "--resume"]
        file = Path(flags.pop(0)) if flags and not flags[0].startswith("--") else None
        if file is not None and not file.exists():
            file = ROOT / file
        load_config(model, file, flags, defaults)
    elif program == "pellucid" and arguments[0] == "doctor":
        assert main(arguments) == 0
    elif program == "pellucid":
        TOOLS[arguments[0]].parser(arguments[0]).parse_args(arguments[1:])
    elif program in ("python", ".ci/run"):
        assert (ROOT / (arguments[0] if arguments else program)).exists()
    elif program.endswith("pip") or program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(name in extras for names in re.findall(r"\[(.*?)\]", line) for name in names.split(","))
    else:
        pytest.fail(f"{page}: {line!r} is a kind of command that this test does not know")


def test_readme_pipeline_runs(home: Path, workplace: Path) -> None:
    """The README's own sft, rm, ppo and generate commands, in its order, made small by further flags."""
    small = {
        "sft": ["--model", str(home / "policy"), "--learn.max-steps", "2"],
        "rm": ["--learn.max-steps", "2", "--center-prompts", "4", "--max-new-tokens", "8"],
        "ppo": "--total-steps 1 --rollout.prompts-per-step 4 --rollout.max-new-tokens 8 --algo.minibatch-size 4 "
        "--algo.micro-batch-size 4 --eval.num-prompts 4".split(),
        "generate": ["--max-new-tokens", "8"],
    }
    lines = [line for page, line in commands() if page == "README.md" and line.startswith("pellucid")]
    run = [shlex.split(line)[1:] for line in lines if line.split()[1] in small]
    assert [arguments[0] for arguments in run] == ["sft", "rm", "ppo", "ppo", "generate"]
    for command, *arguments in run:
        threads = [] if command == "generate" else ["--run.threads", "1"]
        assert main([command, *arguments, *small[command], *threads]) == 0
    assert (workplace / "runs/mine/ppo/summary.json").exists()


def test_readme_commands_over_a_run_do_what_they_say(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`report` and `replay` as they stand; `view` with --bundle, for it would serve for ever."""
    from pellucid import train_ppo

    train_ppo(PPOConfig.model_validate(tiny.ppo_config(home, tmp_path / "runs/demo", total_steps=14)), reporter=QUIET)
    monkeypatch.chdir(tmp_path)
    lines = [
        shlex.split(line)[1:] for page, line in commands() if page == "README.md" and line.endswith(("demo", "14"))
    ]
    over = [arguments for arguments in lines if arguments[0] in TOOLS]
    assert [arguments[0] for arguments in over] == ["view", "report", "replay"]
    for arguments in over:
        assert main([*arguments, *(["--bundle", "page"] if arguments[0] == "view" else [])]) == 0
    assert (tmp_path / "runs/demo/report.html").exists() and (tmp_path / "page/index.html").exists()


def test_readme_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.data import corpus_rows, train_bpe
    from pellucid.execution.local import save_model
    from pellucid.models import new_causal_lm

    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe([row["completion"] for row in corpus_rows("sft", count=50)], vocab_size=512)
    policy = new_causal_lm(
        **tiny.SHAPE | {"context": 128}, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id, seed=0, device="cpu", precision="float32",
    )  # fmt: skip
    save_model(policy, tokenizer, tmp_path / "runs/demo/sft/actor")
    (example,) = blocks(README, "python")
    names: dict[str, Any] = {}
    one_thread = example.replace("RunConfig(", "RunConfig(threads=1, ")  # other tests run beside this one
    exec(compile(one_thread, "README.md", "exec"), names)
    assert names["summary"]["steps"] == 10
    assert (tmp_path / "runs/grateful/actor/model.safetensors").exists()


def test_data_page_reward_function_has_the_right_form() -> None:
    (example,) = blocks((ROOT / "docs/data.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["short"](prompts=["a"], completions=["one two"], other=[1]) == [-0.2]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"pellucid {name}" in shown for name in [*COMMANDS, *TOOLS])


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    """An interpreter that is too old is named, in one line, before anything is installed."""
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.10.1' && exit 0\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "setup", f"PYTHON={old}"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"Pellucid needs Python 3.11 or newer; {old} is Python 3.10.1" in done.stderr
    assert not (tmp_path / ".venv").exists()
    assert sys.version_info >= (3, 11)
