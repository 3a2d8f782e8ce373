"""`pellucid COMMAND [CONFIG.toml] [--section.key value …]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pellucid import __version__
from pellucid.config import (
    GenerateConfig,
    PPOConfig,
    QuickstartConfig,
    RMConfig,
    Section,
    SFTConfig,
    load_config,
)
from pellucid.errors import ConfigError, PellucidError

USAGE = """pellucid {version}: RLHF that can be seen through

  pellucid quickstart                   SFT, reward model and PPO on the built-in corpus, in minutes
  pellucid sft CONFIG.toml              supervised fine-tuning
  pellucid rm CONFIG.toml               reward model from preference pairs
  pellucid ppo CONFIG.toml              PPO (or RLOO, GRPO, …) with actor, critic, reward and reference
  pellucid generate --model DIR --prompt TEXT
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


def _quickstart(config: Any, resume: bool) -> None:
    from pellucid.stages.quickstart import quickstart

    quickstart(config, resume)


COMMANDS: dict[str, tuple[type[Section], Callable[[Any, bool], None], dict[str, Any]]] = {
    "quickstart": (QuickstartConfig, _quickstart, {"run": {"dir": "runs/quickstart"}}),
    "sft": (SFTConfig, _sft, {"run": {"dir": "runs/sft"}}),
    "rm": (RMConfig, _rm, {"run": {"dir": "runs/rm"}}),
    "ppo": (PPOConfig, _ppo, {"run": {"dir": "runs/ppo"}}),
    "generate": (GenerateConfig, _generate, {}),
}


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something that the user can mend (one or two lines on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch([a for a in arguments if a != "--debug"])
    except PellucidError as error:
        if debug:
            raise
        print(f"pellucid: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pellucid: interrupted; continue with --resume", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(version=__version__), end="")
        return 0
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name == "doctor":
        from pellucid.doctor import doctor

        return doctor()
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; commands: {', '.join([*COMMANDS, 'doctor'])}")
    model, command, defaults = COMMANDS[name]
    if "-h" in rest or "--help" in rest:
        _print_help(name, model)
        return 0
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    resume = "--resume" in rest
    config = load_config(model, path, [flag for flag in rest if flag != "--resume"], defaults)
    command(config, resume)
    return 0


def _print_help(name: str, model: type[Section]) -> None:
    """Every key with its meaning, type and default, drawn from the config models."""
    import tyro

    tyro.cli(model, prog=f"pellucid {name} [CONFIG.toml]", args=["--help"], config=(tyro.conf.AvoidSubcommands,))


if __name__ == "__main__":
    sys.exit(main())
