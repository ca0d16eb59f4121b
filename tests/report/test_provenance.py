"""The provenance of a result: the commit of its project, and how much text each step saw."""

import subprocess

import numpy as np
import pytest

from libprune.engine.errors import ArtifactError
from libprune.pipeline.artifacts import read_json, read_table, write_table
from libprune.report.provenance import gather_seen, project_state
from libprune.report.report import compose_report
from tests.support.evaluated import LAYOUT, PROVENANCE
from tests.support.reported import write_artifacts


def test_the_commit_of_a_project_is_named_and_its_changes_noticed(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert project_state(tmp_path) == (None, False)
    git("init", "-q")
    assert project_state(tmp_path)[0] is None
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "notes.md").write_text("x\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (tmp_path / "notes.md").write_text("y\n")
    assert project_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert project_state(tmp_path)[1]


def test_each_step_tells_how_much_text_it_saw(tmp_path):
    layout = write_artifacts(tmp_path / "artifacts", 2, recovered=True)
    result = read_json(layout.evaluation, "evaluate")
    origin = {"model": "cafe", "tokens": result["pruning"]["tokens"]}
    seen = {one.step: one for one in gather_seen(layout, origin, result)}
    recovery, repair = result["recovery"], f"repair, {result['pruning']['slice']['repair']}"
    fit = next(step for step in seen if step.startswith(repair))
    assert list(seen) == ["gradients", "activations", "sensitivity", fit, "training", "evaluation"]
    assert (seen["gradients"].sequences, seen["gradients"].length, seen["gradients"].tokens) == (2, 4, 8)
    assert seen["sensitivity"].tokens == 4
    assert (seen["training"].sequences, seen["training"].tokens) == (recovery["sequences"], recovery["tokens"])
    assert seen["evaluation"].tokens == result["protocol"]["windows"] * result["protocol"]["length"]
    text = compose_report(result | {"seen": list(seen.values())}, LAYOUT, PROVENANCE, [], None)
    assert "| gradients | calibration | 2 | 4 | 8 |" in text
    assert (
        f"| training | training | {recovery['sequences']:,} | {recovery['length']:,} | {recovery['tokens']:,} |" in text
    )


@pytest.mark.parametrize(
    ("repair", "fitted", "expected"),
    [
        ("none", None, []),
        ("local", None, [("repair, local, from the activations", "calibration", 2, 8)]),
        ("bias", None, [("repair, bias, from the activations", "calibration", 2, 8)]),
        ("sequential", ("calibration", 1, 4), [("repair, sequential", "calibration", 1, 4)]),
        ("sequential", ("another", 5, 9), [("repair, sequential", "repair", 5, 45)]),
    ],
)
def test_the_text_of_a_repair_is_its_own_or_that_of_the_activations(tmp_path, repair, fitted, expected):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    result = read_json(layout.evaluation, "evaluate")
    origin = {"model": "cafe", "tokens": result["pruning"]["tokens"]}
    result["pruning"]["slice"] |= {"repair": repair}
    if fitted:
        text, sequences, length = fitted
        digest = origin["tokens"] if text == "calibration" else text
        result["pruning"]["repair_text"] = {"tokens": digest, "sequences": sequences, "length": length}
    found = [one for one in gather_seen(layout, origin, result) if one.step.startswith("repair")]
    assert [(one.step, one.text, one.sequences, one.tokens) for one in found] == expected


@pytest.mark.parametrize("stale", ["activations/units", "levels"])
def test_what_was_collected_on_another_text_is_refused(tmp_path, stale):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    result = read_json(layout.evaluation, "evaluate")
    meta = {"model": "cafe", "tokens": "another", "sequences": 2, "length": 4}
    write_table(layout.root / f"{stale}.parquet", {"layer_idx": np.zeros(1, dtype=np.int64)}, meta)
    with pytest.raises(ArtifactError, match="run `dvc repro"):
        gather_seen(layout, {"model": "cafe", "tokens": result["pruning"]["tokens"]}, result)


def test_documents_of_different_lengths_are_counted_as_the_most(tmp_path):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    columns, meta = read_table(layout.calibration_tokens, "tokenize")
    rows = {name: np.stack(list(column)) for name, column in columns.items()}
    write_table(layout.calibration_tokens, rows, meta | {"mode": "labelled"})
    result = read_json(layout.evaluation, "evaluate")
    seen = gather_seen(layout, {"model": "cafe", "tokens": result["pruning"]["tokens"]}, result)
    text = compose_report(result | {"seen": seen}, LAYOUT, PROVENANCE, [], None)
    assert "| gradients | calibration | 2 | up to 4 | up to 8 |" in text
