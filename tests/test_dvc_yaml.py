"""dvc.yaml, params.yaml and the code say the same."""

import ast
import subprocess
import sys

import pytest
import yaml

from libprune.pipeline.params import PRESETS, Params
from tests.closure import ROOT, closure

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pydantic")


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
    """Leaf params that a stage's main function reads, by its syntax: all of X for `settings.X`, and `settings.X.y`."""
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
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
def test_declared_code_is_the_import_closure(stage):
    assert code(PIPELINE[stage]["deps"]) == closure(ROOT / f"stages/{stage}.py")


@pytest.mark.parametrize("stage", PIPELINE)
def test_declared_params_are_the_params_read(stage):
    assert set(PIPELINE[stage].get("params", [])) == params_read(stage)


def test_params_file_lists_every_param():
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    preset = {"preset"} if data.pop("preset", None) else set()
    listed = {f"{section}.{leaf}" for section, leaves in data.items() for leaf in leaves}
    assert listed | preset == set().union(*(section_fields(section) for section in SECTIONS))


def test_packages_do_nothing_at_import():
    assert (ROOT / "libprune/__init__.py").read_text() == ""
    assert (ROOT / "stages/__init__.py").read_text() == ""


def test_libprune_does_not_know_dvc():
    imported = {
        alias.name
        for path in (ROOT / "libprune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "dvc" not in imported


def test_a_change_of_score_reaches_no_collecting_stage():
    collecting = {"prepare", "tokenize", "gradients", "hessian", "activations", "ablation"}
    for stage in collecting:
        sections = {param.split(".")[0] for param in PIPELINE[stage].get("params", [])}
        assert not sections & {"preset", "score", "levels", "allocate", "slice", "evaluate"}


def test_help_needs_nothing_heavy():
    names = ", ".join(f"stages.{stage}" for stage in PIPELINE)
    program = f"import sys, {names}, libprune.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_every_stage_says_what_it_does():
    for stage in PIPELINE:
        done = subprocess.run(
            [sys.executable, "-m", f"stages.{stage}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "--artifacts" in done.stdout
