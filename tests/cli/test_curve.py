"""`libprune curve` refuses what cannot be, measures what is missing first, and plans and writes the rest."""

from typing import Any

import pytest
from typer.testing import CliRunner

from libprune.cli import curve
from libprune.cli.main import app
from libprune.curves import plans
from libprune.curves.plans import Curve
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params
from libprune.project import run as runner
from tests.support import tiny
from tests.support.closure import ROOT
from tests.support.curved import made_up


def called(*words: str):
    return CliRunner().invoke(app, ["curve", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.2", "1.5"], "'1.5' is no ratio"),
        (["0.2,0.2"], "the ratio 0.2 is named twice"),
        (["0.2", "--run", "some"], "'some' is no ratio"),
        (["0.2,0.3", "--run", "0.4"], "--run 0.4 is not among the ratios 0.2, 0.3"),
        (["0.2"], "has no dvc.yaml; change to the folder of a project"),
        ([], "has no dvc.yaml"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = called(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_runs_without_a_repository_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    monkeypatch.setattr(runner, "run", lambda project, stages: pytest.fail("stages ran"))
    done = called("0.2", "--run", "all")
    assert done.exit_code == 1
    assert "need a git repository" in done.stderr and "leave --run out" in done.stderr


def test_a_curve_is_measured_planned_and_written(tmp_path, monkeypatch):
    """What is missing is measured by the stages before allocate; plans are drawn under the name of the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "artifacts").mkdir()
    write_json(tmp_path / "artifacts/origin.json", {"name": "its name"})
    tiny.write_params(tmp_path / "params.yaml", "model", "text.txt")
    asked: list[Any] = []
    monkeypatch.setattr(runner, "run", lambda project, stages: asked.append(stages))

    def plan(layout: Layout, params: Params, ratios: tuple[float, ...], nested: bool) -> Curve:
        asked.append((ratios, nested))
        return made_up((0.1, 0.3), predicts=False, skipped={0.9: "it is too much"})

    monkeypatch.setattr(plans, "plan_curve", plan)
    done = called("0.1,0.3", "0.9")
    assert done.exit_code == 0, done.output
    before, planned = asked
    assert planned == ((0.1, 0.3, 0.9), False)
    assert {"score", "levels", "latency"} <= set(before) and "allocate" not in before
    assert done.stdout.startswith("2 plans in ")
    assert "Without a plan: 90 %, since it is too much." in done.stdout
    assert done.stdout.endswith("written: report/curve/curve.html, curve.md, curve.csv\n")
    assert "<h1>its name: sizes of one measurement</h1>" in (tmp_path / curve.OUT / "curve.html").read_text()
