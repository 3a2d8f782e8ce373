"""The house keeps its floors: who may import whom, who owns which third-party package, and how long things are."""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pellucid

SOURCE = Path(pellucid.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = (
    {"types", "config", "core"},
    {"data", "models", "metrics", "checkpoint", "trace"},
    {"rollout", "rewards"},
    {"execution"},
    {"stages"},
    {"learn", "inspector"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BASEMENT = {"errors", "files"}
"""Below every floor: imports nothing of the house, and anyone may import it."""
ROOFS = {"__init__", "doctor"}
"""The package's own front, and `pellucid doctor`, which belongs to the command line: they may see everything."""
OWNERS = {
    "ray": ["execution/ray*.py"],
    "gymnasium": ["rollout/gym.py"],
    "vllm": ["rollout/vllm.py"],
    "transformers": ["data/*.py", "models/*.py", "rollout/embedded*.py"],
}
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted module, line, whether only a type checker runs it), wherever in the file it stands."""
    tree = ast.parse(path.read_text(), filename=str(path))
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    package = ["pellucid", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in checking
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "pellucid":
                for alias in node.names:
                    yield f"pellucid.{alias.name}", node.lineno, id(node) in checking
            else:
                yield module, node.lineno, id(node) in checking


def house_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of each import from this package."""
    for module, line, _ in imports(path):
        first, *rest = module.split(".")
        if first == "pellucid":
            yield (rest[0] if rest and (rest[0] in FLOOR or rest[0] in BASEMENT | ROOFS) else "__init__"), line


def test_every_room_is_on_a_floor():
    assert {room_of(path) for path in FILES} <= set(FLOOR) | BASEMENT | ROOFS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    room = room_of(path)
    if room in ROOFS:
        return
    for other, line in house_rooms(path):
        if other == room or other in BASEMENT:
            continue
        # `from pellucid import __version__` is a constant, not a room.
        if other == "__init__" and FLOOR.get(room) == len(FLOORS) - 1:
            continue
        if other == "doctor":
            assert room == "cli", f"{name_of(path)}:{line} imports doctor"
            continue
        assert room not in BASEMENT, f"{name_of(path)}:{line} is below every floor and imports {other}"
        assert other in FLOOR, f"{name_of(path)}:{line} imports {other}"
        assert FLOOR[other] < FLOOR[room], (
            f"{name_of(path)}:{line}: {room} is on floor {FLOOR[room]} and imports {other}, on floor {FLOOR[other]}"
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_packages_have_their_owners(path):
    for module, line, _ in imports(path):
        allowed = OWNERS.get(module.split(".")[0])
        if allowed is not None:
            assert any(fnmatch.fnmatch(name_of(path), pattern) for pattern in allowed), (
                f"{name_of(path)}:{line} imports {module}, which belongs to {', '.join(allowed)}"
            )


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "core"], ids=name_of)
def test_core_needs_torch_only(path):
    for module, line, _ in imports(path):
        first = module.split(".")[0]
        assert first in {"torch", "pellucid"} | set(sys.stdlib_module_names), f"{name_of(path)}:{line} imports {module}"


def test_modules_import_each_other_in_no_circle():
    dotted = {path: ".".join(["pellucid", *path.relative_to(SOURCE).with_suffix("").parts]) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in dotted.items()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:  # at the top level only: what runs on import
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    target = inner if inner in modules else node.module
                    if target in modules and target != name:
                        graph[name].add(target)
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in seen:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            seen[name] = 1

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < LONGEST_FILE, name_of(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < LONGEST_FUNCTION, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"


def test_heavy_and_optional_packages_are_imported_where_they_are_used():
    """`import pellucid` and the command line's help must not wait for, or need, any of these."""
    optional = {"ray", "vllm", "gymnasium", "datasets", "wandb", "trackio", "tensorboard", "sklearn", "fastapi"}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = optional & {name.split(".")[0] for name in names}
            assert not found, f"{name_of(path)}:{node.lineno} imports {found} at the top"
