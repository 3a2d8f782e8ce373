"""Writes docs/config.md from the config models: python docs/make_config_md.py. tests/test_docs.py compares the two."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from pellucid.config import GenerateConfig, GymConfig, PPOConfig, QuickstartConfig, RMConfig, Section, SFTConfig

COMMANDS: dict[str, type[Section]] = {
    "quickstart": QuickstartConfig,
    "sft": SFTConfig,
    "rm": RMConfig,
    "ppo": PPOConfig,
    "generate": GenerateConfig,
    "gym": GymConfig,
}

INTRO = """# Configuration

<!-- Generated: python docs/make_config_md.py -->

`pellucid COMMAND [CONFIG.toml] [--section.key value …]`: defaults, then the TOML file, then the flags; checked once,
before anything loads, and frozen from then on. A key that does not exist, a value of a wrong type or two that contradict
each other is one line on stderr and exit code 2. The resolved config is written to `config.toml` in the run directory.

- A flag is the dotted key, with `-` or `_`: `--algo.gae-lambda 0.9`, `--algo.gae_lambda=0.9`. A bare flag means true:
  `--algo.packing`.
- A list is comma-separated, `--run.loggers tensorboard,wandb`, or for free text the flag once for each:
  `--prompt "One" --prompt "Two"`. `none` takes a value away: `--algo.value-clip-eps none`.
- In TOML a value that is absent has its default; `none` does not exist there.
- `run.dir` may be left out on the command line and in the file: it is then `runs/COMMAND`. In Python it is required.
- `--resume` continues the run in `run.dir`. `--debug` shows the traceback of an error.
"""


def render() -> str:
    """The whole page."""
    shared: dict[str, type[Section]] = {}
    commands = [_command(name, model, shared) for name, model in COMMANDS.items()]
    sections = [_section(model) for model in shared.values()]
    return "\n".join([INTRO, *commands, "# Sections\n", *sections]).rstrip() + "\n"


def _command(name: str, model: type[Section], shared: dict[str, type[Section]]) -> str:
    lines = [f"## {name}\n", _sentence(model), ""]
    leaves = [(key, field) for key, field in model.model_fields.items() if _model_of(field.annotation) is None]
    if leaves:
        lines += [*_table(leaves), ""]
    lines += ["| section | keys | |", "|---|---|---|"]
    for key, field in model.model_fields.items():
        section = _model_of(field.annotation)
        if section is None:
            continue
        shared.setdefault(section.__name__, section)
        optional = "optional" if field.default is None else "required" if field.is_required() else ""
        note = ", ".join(filter(None, [optional, _changed(section, field.default)]))
        lines.append(f"| `[{key}]` | [{section.__name__}](#{section.__name__.lower()}) | {note} |")
    return "\n".join([*lines, ""])


def _section(model: type[Section]) -> str:
    doc = [_sentence(model), ""] if model.__doc__ and model.__doc__ != Section.__doc__ else []
    return "\n".join([f"## {model.__name__}\n", *doc, *_table(list(model.model_fields.items())), ""])


def _table(fields: list[tuple[str, Any]]) -> list[str]:
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, field in fields:
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {_allowed(field)} | {_default(field)} | {meaning} |")
    return rows


def _sentence(model: type[Section]) -> str:
    return " ".join((model.__doc__ or "").split())


def _model_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also an optional one; None for a leaf."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _changed(section: type[Section], default: Any) -> str:
    """What a section's default instance sets differently from the section's own defaults."""
    if not isinstance(default, section):
        return ""
    own = {key: field.default for key, field in section.model_fields.items()}
    changed = {key: value for key, value in default if value != own[key]}
    return ", ".join(f"`{key}` {_code(value)}" for key, value in changed.items())


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "" if field.default is None else _code(field.default)


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[]`" if not value else f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _allowed(field: Any) -> str:
    """The type and its bounds, for people."""
    bounds = [sign for item in field.metadata for sign in _bounds(item)]
    return " ".join([_type(field.annotation, bounds), *(f"{sign}" for sign in bounds)]).strip()


def _bounds(item: Any) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{sign} {getattr(item, name)}" for name, sign in signs.items() if getattr(item, name, None) is not None]
    for nested in getattr(item, "metadata", []):
        found += _bounds(nested)
    return found


def _type(annotation: Any, bounds: list[str]) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        for item in inner[1:]:
            bounds += _bounds(item)
        return _type(inner[0], bounds)
    if origin is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part, bounds) for part in inner if part is not type(None))
    if origin is tuple:
        return f"list of {_type(inner[0], bounds)}"
    if origin is dict:
        return "table"
    names = {"str": "text", "int": "int", "float": "float", "bool": "`true`, `false`", "Path": "path"}
    return names[annotation.__name__]


if __name__ == "__main__":
    (Path(__file__).parent / "config.md").write_text(render(), encoding="utf-8")
