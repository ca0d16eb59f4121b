"""dvc.yaml, params.yaml and the code say the same."""

import ast
import subprocess
import sys

import pytest
import yaml

from libprune.pipeline.params import PRESETS, Params
from tests.support.closure import ROOT, closure

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SHELVES = ("statistics", "results")
"""Rooms from which each stage takes its own files."""
COLLECTING = ("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "sensitivity")
BEHIND = (
    "scoring",
    "allocation",
    "repair",
    "results",
    "report",
    "experiments",
    "curves",
    "masks",
    "networks",
    "project",
    "cli",
    "foresight",
)
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pydantic", "tqdm")
"""Not loaded for a help text; tqdm reads once, when it is loaded, whether the libraries' bars are to be shown."""


SECTIONS = [name for name in Params.model_fields if name != "preset"]


def section_fields(section: str) -> set[str]:
    """The leaf params of a section, and the preset that may fill them in."""
    leaves = {f"{section}.{leaf}" for leaf in Params.model_fields[section].annotation.model_fields}
    return leaves | ({"preset"} if any(section in values for values in PRESETS.values()) else set())


def presets_of(leaf: str) -> set[str]:
    """The preset, if one may fill in this leaf."""
    section, key = leaf.split(".")
    return {"preset"} if any(key in values.get(section, {}) for values in PRESETS.values()) else set()


def params_read(stage: str) -> set[str]:
    """Leaf params that a stage's main function reads, by its syntax: all of X for `settings.X`, and `settings.X.y`.

    A stage that looks for mistakes reads the whole file.
    """
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    if "foresee" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        return {"params.yaml"}
    leaves = {id(node.value): node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
            leaf = f"{node.attr}.{leaves.get(id(node), '')}"
            fields = section_fields(node.attr)
            found |= {leaf, *presets_of(leaf)} if leaf in fields else fields
    return found


def code(deps: list[str]) -> set[str]:
    return {dep for dep in deps if dep.startswith(("libprune/", "stages/"))}


def test_every_stage_file_is_in_the_pipeline_and_back():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == PIPELINE.keys()


@pytest.mark.parametrize("stage", PIPELINE)
def test_declared_code_covers_the_import_closure_and_nothing_idle(stage):
    """A dependency is a room, or one file of a shelf; one that no import needs would run the stage for nothing."""
    files, declared = closure(ROOT / f"stages/{stage}.py"), code(PIPELINE[stage]["deps"])
    covering = {file: {dep for dep in declared if file == dep or file.startswith(f"{dep}/")} for file in files}
    assert [file for file, deps in covering.items() if not deps] == []
    assert set().union(*covering.values()) == declared
    assert not declared & {"libprune", *(f"libprune/{shelf}" for shelf in SHELVES)}


def test_code_is_declared_in_few_lines():
    assert sum(len(code(stage["deps"])) for stage in PIPELINE.values()) <= 190


@pytest.mark.parametrize("stage", COLLECTING)
def test_no_edit_behind_the_statistics_reaches_a_collecting_stage(stage):
    behind = tuple(f"libprune/{room}" for room in BEHIND)
    assert behind and all((ROOT / room).is_dir() for room in behind)
    assert [dep for dep in PIPELINE[stage]["deps"] if dep.startswith(behind)] == []


def test_what_running_leaves_in_a_room_is_no_change_of_it():
    """Compiled files lie in the rooms, which are dependencies as a whole."""
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert {"__pycache__", "*.pyc"} <= set(ignored)


@pytest.mark.parametrize("stage", PIPELINE)
def test_declared_params_are_the_params_read(stage):
    declared = PIPELINE[stage].get("params", [])
    whole = {name for one in declared if isinstance(one, dict) for name, keys in one.items() if keys is None}
    assert (whole or set(declared)) == params_read(stage)


def test_params_file_lists_every_param():
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    preset = {"preset"} if data.pop("preset", None) else set()
    listed = {f"{section}.{leaf}" for section, leaves in data.items() for leaf in leaves}
    assert listed | preset == set().union(*(section_fields(section) for section in SECTIONS))


def test_packages_do_nothing_at_import():
    assert (ROOT / "stages/__init__.py").read_text() == ""
    program = "import sys, libprune; print([name for name in sys.modules if name.startswith('libprune.')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_libprune_does_not_know_dvc():
    files = list((ROOT / "libprune").rglob("*.py"))
    assert ROOT / "libprune/pipeline/stage.py" in files, "the rooms are looked into"
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "dvc" for name in names), path


def test_a_change_of_score_reaches_no_collecting_stage():
    for stage in set(COLLECTING) - {"sensitivity"}:
        sections = {param.split(".")[0] for param in PIPELINE[stage].get("params", [])}
        assert not sections & {"preset", "score", "levels", "allocate", "slice", "evaluate"}


def test_help_needs_nothing_heavy():
    names = ", ".join(f"stages.{stage}" for stage in PIPELINE)
    program = f"import sys, {names}, libprune.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_checks_params_and_decides_loads_no_torch_and_no_scipy():
    """They take seconds to load, in `libprune params` and in stages that compute for less."""
    names = "libprune.foresight.foresee, libprune.scoring.score, libprune.allocation.decide"
    program = f"import sys, {names}; print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_every_stage_says_what_it_does():
    """Each is run as `python -m` runs it, all in one process."""
    done = subprocess.run([sys.executable, "-c", HELP, *PIPELINE], cwd=ROOT, capture_output=True, text=True, check=True)
    said = dict(zip(PIPELINE, done.stdout.split("\f"), strict=True))
    assert all("--artifacts" in text and text.rstrip().endswith("0") for text in said.values()), said


HELP = """
import runpy, sys
stages, sys.argv[1:] = sys.argv[1:], ["--help"]
for number, stage in enumerate(stages):
    print(end="\\f" if number else "")
    try:
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(end.code or 0)
"""
"""A program that prints the help of the stages that it is given, each with its exit status, and form feeds between."""
