"""`pellucid COMMAND [CONFIG.toml] [--section.key value …]`."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pellucid import __version__
from pellucid.config import (
    GenerateConfig,
    GymConfig,
    PPOConfig,
    QuickstartConfig,
    RMConfig,
    Section,
    SFTConfig,
    help_text,
    load_config,
)
from pellucid.errors import ConfigError, PellucidError

USAGE = """pellucid {version}: RLHF that can be seen through

  pellucid quickstart                   SFT, reward model and PPO on the built-in corpus, in minutes
  pellucid sft CONFIG.toml              supervised fine-tuning
  pellucid rm CONFIG.toml               reward model from preference pairs
  pellucid ppo CONFIG.toml              PPO (or RLOO, GRPO, …) with actor, critic, reward and reference
  pellucid generate --model DIR --prompt TEXT
  pellucid gym CONFIG.toml              REINFORCE, A2C or PPO in Gymnasium's environments
  pellucid view RUN_DIR …               the page of one or several runs: curves, data flow, samples, tokens
  pellucid report RUN_DIR               one HTML file: curves, table, samples before and after
  pellucid replay RUN_DIR --step K      executes a recorded step again and compares every tensor
  pellucid learn                        the road in eight chapters, each of which runs
  pellucid doctor                       what this machine and installation can do

  --section.key value   overrides a key of the config      pellucid ppo --help lists them all
  --resume              continues the run in run.dir
  --debug               shows the traceback of an error
"""


def _ppo(config: Any, resume: bool) -> None:
    from pellucid.stages.run import train_ppo

    train_ppo(config, resume=resume)


def _sft(config: Any, resume: bool) -> None:
    from pellucid.stages.supervised import train_sft

    train_sft(config, resume)


def _rm(config: Any, resume: bool) -> None:
    from pellucid.stages.supervised import train_rm

    train_rm(config, resume)


def _generate(config: Any, resume: bool) -> None:
    from pellucid.stages.generate import generate

    generate(config)


def _gym(config: Any, resume: bool) -> None:
    from pellucid.stages.gym import train_gym

    train_gym(config, resume)


def _quickstart(config: Any, resume: bool) -> None:
    from pellucid.inspector.report import report
    from pellucid.stages.quickstart import quickstart

    quickstart(config, resume)
    print(f"report: {report(config.run.dir)}")


COMMANDS: dict[str, tuple[type[Section], Callable[[Any, bool], None], dict[str, Any]]] = {
    "quickstart": (QuickstartConfig, _quickstart, {"run": {"dir": "runs/quickstart"}}),
    "sft": (SFTConfig, _sft, {"run": {"dir": "runs/sft"}}),
    "rm": (RMConfig, _rm, {"run": {"dir": "runs/rm"}}),
    "ppo": (PPOConfig, _ppo, {"run": {"dir": "runs/ppo"}}),
    "generate": (GenerateConfig, _generate, {}),
    "gym": (GymConfig, _gym, {"run": {"dir": "runs/gym"}}),
}


class _Parser(argparse.ArgumentParser):
    """The commands that read a run directory: positional arguments and a few flags, no config."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('pellucid ')}: {message}; see {self.prog} --help")


def _view_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a run directory; several are compared"
    )
    parser.add_argument(
        "--bundle", type=Path, metavar="OUT", help="write the page as static files into a folder instead"
    )
    parser.add_argument("--steps", metavar="1,5-9", help="which recorded steps go into the bundle; all if absent")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; beyond this machine a token is required"
    )
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one (the default)")
    parser.add_argument("--token", help="the token that a browser must bring; made up where one is required")
    parser.add_argument("--open", action="store_true", dest="open_browser", help="open the page in the default browser")


def _view(**options: Any) -> None:
    from pellucid.inspector.view import view

    view(**options)


def _report_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--output", type=Path, help="where to; RUN_DIR/report.html, or the folder RUN_DIR/report, if absent"
    )
    parser.add_argument(
        "--markdown", action="store_const", const="markdown", default="html", dest="form",
        help="a folder with report.md and its pictures instead",
    )  # fmt: skip


def _report(**options: Any) -> None:
    from pellucid.inspector.report import report

    print(report(**options))


def _replay_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory of a PPO run")
    parser.add_argument("--step", type=int, nargs="+", required=True, metavar="K", help="one or several recorded steps")


def _replay(run_dir: Path, step: list[int]) -> None:
    from pellucid.stages.replay import replay

    for one in step:
        replay(run_dir, one)


def _learn_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("chapter", nargs="?", metavar="N", help="a chapter's number, or all; the list if absent")
    parser.add_argument("--seed", type=int, default=0, help="of everything random in a chapter")
    parser.add_argument("--out", type=Path, default=Path("runs/learn"), help="where pictures, pages and exercises go")
    parser.add_argument(
        "--exercises", action="store_true", help="print a chapter's exercises, and write a file to fill in"
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check the answers in that file")


def _learn(**options: Any) -> int:
    from pellucid.learn.command import learn

    return learn(**options)


def _doctor() -> int:
    from pellucid.doctor import doctor

    return doctor()


class Tool(NamedTuple):
    """A command without a config: what it is for, its arguments, and what it does with them (an exit code, or None for 0)."""

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., int | None]

    def parser(self, name: str) -> _Parser:
        parser = _Parser(prog=f"pellucid {name}", description=self.purpose, allow_abbrev=False)
        self.arguments(parser)
        return parser


TOOLS = {
    "view": Tool("Opens the page of one or several runs, also of one that is still going.", _view_parser, _view),
    "report": Tool("Writes a run's curves, figures and samples into one HTML file.", _report_parser, _report),
    "replay": Tool(
        "Executes recorded steps of a PPO run again and compares every tensor with the record.", _replay_parser, _replay
    ),
    "learn": Tool(
        "The road in eight chapters, from a policy gradient to the whole pipeline, on this library's own code.",
        _learn_parser,
        _learn,
    ),
    "doctor": Tool(
        "What this machine and installation can do; exit code 2 when something is broken.", lambda _: None, _doctor
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something that the user can mend (one or two lines on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _dispatch([a for a in arguments if a != "--debug"])
        sys.stdout.flush()
        return code
    except PellucidError as error:
        if debug:
            raise
        print(f"pellucid: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        trains = bool(arguments) and arguments[0] in COMMANDS and "run" in COMMANDS[arguments[0]][0].model_fields
        print(f"pellucid: interrupted{'; continue with --resume' if trains else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(version=__version__), end="")
        return 0
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name in TOOLS:
        try:
            options = TOOLS[name].parser(name).parse_args(rest)
        except SystemExit:  # argparse has printed the help
            return 0
        return TOOLS[name].run(**vars(options)) or 0
    if name not in COMMANDS:
        known = [*COMMANDS, *TOOLS]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(known)}"
        raise ConfigError(f"unknown command {name!r}; {hint}")
    model, command, defaults = COMMANDS[name]
    trains = "run" in model.model_fields
    if "-h" in rest or "--help" in rest:
        _print_help(name, model, defaults)
        return 0
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    resume = trains and "--resume" in rest
    config = load_config(model, path, [flag for flag in rest if not (trains and flag == "--resume")], defaults)
    command(config, resume)
    if trains:
        print(f"look at it: pellucid view {shlex.quote(str(config.run.dir))}")
    return 0


def _print_help(name: str, model: type[Section], defaults: dict[str, Any]) -> None:
    flags = "[--resume] [--debug]" if "run" in model.model_fields else "[--debug]"
    summary = (model.__doc__ or "").partition(": ")[2].strip()
    print(f"usage: pellucid {name} [CONFIG.toml] [--section.key VALUE …] {flags}\n\n{summary[0].upper()}{summary[1:]}")
    print("Keys are those of the TOML file; a flag overrides the file. VALUE none makes an optional key absent.\n")
    print(help_text(model, defaults), end="")


if __name__ == "__main__":
    sys.exit(main())
