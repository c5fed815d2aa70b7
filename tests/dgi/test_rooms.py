"""The folders of dgi: imports between them run one way, and names can be imported from where they were before."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dgi
from dgi._moved import MOVED

ROOT = Path(dgi.__file__).parent
# From the ground up: a room imports from itself and from what stands before it.
ROOMS = (
    "extras",
    "config",
    "pictures",
    "progress",
    "data",
    "model",
    "training",
    "retrieval",
    "evaluation",
    "integrations",
    "demo",
    "cli",
)
SOURCES = {
    "dgi." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path.parent != ROOT or path.stem in ROOMS
}


def imported_modules(module: str) -> set[str]:
    """The modules of dgi that a module imports anywhere in its code; packages stand for their ``__init__``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in whole}
    return {name for name in found if name.split(".")[0] == "dgi"}


def test_every_module_stands_in_a_room() -> None:
    assert {name.split(".")[1] for name in SOURCES} == set(ROOMS)
    assert {path.stem for path in ROOT.glob("*.py")} - set(ROOMS) == {"__init__", "__main__", "_moved"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_run_one_way(module: str) -> None:
    room = ROOMS.index(module.split(".")[1])
    for name in imported_modules(module):
        assert name in SOURCES, f"{module} imports {name}, which is no module of a room"
        assert ROOMS.index(name.split(".")[1]) <= room, f"{module} imports {name} from a room above its own"


def test_no_circle() -> None:
    # A package's __init__ lists what its modules hold; its modules do not import it.
    graph = {module: imported_modules(module) for module in SOURCES}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_is_the_new_one(old: str) -> None:
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])


def test_public_names_are_where_they_were() -> None:
    """Names of version 0.1.0, by the module that people imported them from."""
    lines = (Path(__file__).parent / "public_names.txt").read_text().splitlines()
    names = {module: values.split() for module, values in (line.split(": ") for line in lines)}
    missing = [
        f"{module}.{name}"
        for module, values in names.items()
        for name in values
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing
