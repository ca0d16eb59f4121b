"""The rooms of the package: what each may import, how many files it holds, and where each module is tested."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.closure import ROOT, imports

PACKAGE = ROOT / "libprune"
FLOORS = [
    {"engine"},
    {"pipeline"},
    {"models"},
    {"texts", "collection"},
    {"vocabulary"},
    {"statistics", "scoring", "repair"},
    {"narrowing"},
    {"allocation", "results", "report"},
    {"recovery", "export"},
    {"foresight"},
    {"experiments", "masks"},
    {"networks", "project"},
    {"curves"},
    {"cli"},
]
"""A room imports from floors below its own, and from itself."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.glob("*/*.py"))
UNTESTED: dict[str, str] = {}
"""Modules without a test file of their name, and where they are tested."""


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_folder_is_a_room_but_that_of_the_families():
    folders = {path.parent.name for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == FLOOR.keys()
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {*FLOOR, "families"}
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert len(MODULES) == sum(1 for _ in PACKAGE.rglob("*.py")) - 1, "no room has rooms of its own"


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_can_be_looked_over(room):
    assert len(list((PACKAGE / room).glob("*.py"))) <= 16


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path):
    room = path.parent.name
    for other in imports(path):
        if PACKAGE in other.parents and other.parent != PACKAGE and other.parent.name != room:
            assert FLOOR[other.parent.name] < FLOOR[room], f"{name_of(path)} imports {name_of(other)}"


def test_all_rooms_but_the_ground_import_from_others():
    """So that the test of the floors reads real imports."""
    below = {room: {p.parent.name for path in (PACKAGE / room).glob("*.py") for p in imports(path)} for room in FLOOR}
    assert [room for room, others in below.items() if not others - {room, "libprune"}] == ["engine"]


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_importing_a_room_does_nothing(room):
    """But for the rooms that are doors of Python programs."""
    text = (PACKAGE / room / "__init__.py").read_text()
    statements = [node for node in ast.parse(text).body if not isinstance(node, ast.Expr)]
    assert not statements or room in {"networks", "masks"}


def names_of_tests() -> Iterator[str]:
    for path in (ROOT / "tests").glob("*/test_*.py"):
        yield f"{path.parent.name}/{path.stem.removeprefix('test_')}"


def test_every_module_has_a_test_file_of_its_name_or_is_listed():
    modules = {name_of(path) for path in MODULES if path.stem != "__init__"}
    untested = modules - set(names_of_tests())
    assert sorted(untested - UNTESTED.keys()) == []
    assert sorted(UNTESTED.keys() - untested) == [], "listed, but tested under its own name, or gone"


def test_every_test_file_lies_where_its_module_does():
    modules = {name_of(path) for path in MODULES}
    elsewhere = {name for name in names_of_tests() if name.partition("/")[0] in FLOOR} - modules
    assert sorted(elsewhere) == []


@pytest.mark.parametrize("name", sorted(name for name in names_of_tests() if name.partition("/")[0] in FLOOR))
def test_every_test_file_imports_the_module_of_its_name(name):
    room, _, module = name.partition("/")
    assert PACKAGE / room / f"{module}.py" in imports(ROOT / "tests" / room / f"test_{module}.py")


def test_no_test_imports_from_another():
    for path in (ROOT / "tests").rglob("*.py"):
        found = [other for other in imports(path) if other.stem.startswith("test_")]
        assert found == [], f"{path} imports from {found}; what several tests need lies in tests/support"


BEGINNINGS = ("The same", "As ", "Of ", "Likewise", "Nothing", "None")
"""What a docstring does not begin with, since an editor shows it alone."""


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """The names of what has a docstring, or a text behind its value, with that text."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield getattr(node, "name", path.stem), ast.get_docstring(node) or ""
            for before, after in pairwise(node.body):
                if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                    yield ast.unparse(before), str(getattr(after.value, "value", None) or "")


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "stages").glob("*.py"))], ids=name_of)
def test_docstrings_stand_alone(path):
    assert [(name, text) for name, text in documented(path) if text.startswith(BEGINNINGS)] == []
