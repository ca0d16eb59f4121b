"""What a run tells of itself: which stages work, which are ahead, and what changed since the last result."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.describe import describe
from libprune.pipeline import story
from libprune.pipeline.params import Params
from libprune.pipeline.story import (
    STEPS,
    earlier_result,
    memory_of,
    read_memory,
    remember,
    stages_ahead,
    telling,
    working,
)
from libprune.pipeline.terminal import CONTINUES, logging_to, say
from tests.support import tiny
from tests.support.closure import ROOT
from tests.support.models import FAMILIES

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ASKS: dict[str, dict[str, dict[str, Any]]] = {
    "hessian": {"hessian": {"estimator": "fisher"}},
    "ablation": {"ablation": {"units": 1}},
    "sensitivity": {"allocate": {"method": "hgsp"}},
    "depth": {"allocate": {"depth": "joint"}},
    "levels": {"allocate": {"method": "search"}},
    "width": {"allocate": {"width": 36}},
    "latency": {"allocate": {"objective": "latency"}},
    "teacher": {"recover": {"method": "lora"}},
    "recover": {"recover": {"method": "full"}},
    "export": {"export": {"formats": ["gguf"]}},
}
"""Stages that have nothing to do unless a setting asks for them, with that setting."""


def params(**changes: dict[str, Any]) -> Params:
    """The defaults with changes."""
    return Params.model_validate({"prepare": {"model": "m"}, "tokenize": {"text": "t"}} | changes)


def test_every_stage_is_told_of_in_the_order_of_the_pipeline_but_that_which_sets_links():
    assert ["sources", *STEPS] == list(PIPELINE)


def test_a_stage_works_only_where_a_setting_asks_for_it():
    always = [stage for stage in STEPS if stage not in ASKS]
    assert working(params()) == always
    for stage, changes in ASKS.items():
        assert stage in working(params(**changes)), stage
        assert set(working(params(**changes))) - {stage, "teacher", "recover"} == set(always)


@pytest.mark.parametrize("stage", ASKS)
def test_a_stage_that_is_called_idle_ends_at_once_with_one_line(stage, tmp_path, capsys):
    """There is no model, no text and no statistic, and it does not miss them."""
    path = tiny.write_params(tmp_path / "params.yaml", "none", "none", hessian={"estimator": "none"})
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/architecture.json").write_text(describe(FAMILIES["llama"](0)).to_json())
    more = [tmp_path / "metrics"] if stage in {"export", "recover"} else []
    import_module(f"stages.{stage}").main(path, tmp_path / "artifacts", *more)
    assert len(capsys.readouterr().out.splitlines()) == 1


# The stages that are ahead


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the pipeline and its params, all of whose stages are in dvc.lock with these params."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    changes = {"recover": {"method": "full"}, "hessian": {"estimator": "none"}}
    tiny.write_params(tmp_path / "params.yaml", "none", "none", **changes)
    data = yaml.safe_load((tmp_path / "params.yaml").read_text())
    locked = {
        name: {"params": {"params.yaml": {key: story._value(data, key) for key in one.get("params", [])}}}
        for name, one in PIPELINE.items()
        if name != "sources"
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": locked}))
    return tmp_path


def test_in_a_first_run_all_stages_are_ahead(project):
    (project / "dvc.lock").unlink()
    assert stages_ahead("prepare", [], []) == PIPELINE.keys() - {"sources"}
    done = ["prepare", "tokenize"]
    assert stages_ahead("gradients", done, []) == PIPELINE.keys() - {"sources", *done}


def test_after_a_change_of_the_ratio_only_what_depends_on_it_is_ahead(project):
    tiny.change_params(project, "allocate", ratio=0.35)
    expected = {"allocate", "slice", "recover", "export", "evaluate", "report"}
    assert stages_ahead("allocate", [], []) == expected
    assert stages_ahead("slice", ["allocate"], []) == expected - {"allocate"}


def test_a_change_further_on_is_ahead_too(project):
    tiny.change_params(project, "recover", seed=7)
    assert stages_ahead("evaluate", [], []) == {"teacher", "recover", "export", "evaluate", "report"}
    assert stages_ahead("evaluate", ["teacher", "recover", "export"], []) == {"evaluate", "report"}


def test_targets_of_the_command_end_the_run(project):
    (project / "dvc.lock").unlink()
    ahead = stages_ahead("prepare", [], ["python", "dvc", "repro", "score"])
    assert "score" in ahead
    assert not ahead & {"allocate", "slice", "evaluate", "report"}
    assert stages_ahead("score", ["prepare"], ["dvc", "repro", "--downstream", "score"]) >= {"allocate", "report"}


# A run under DVC, whose part a program plays


DVC = """
import os, subprocess, sys
code = (
    "import sys; from pathlib import Path; from libprune.pipeline import story; story._FORECAST = 'forecast'\\n"
    "with story.telling(sys.argv[1], Path('params.yaml'), Path('artifacts'), lambda: 10**6):\\n"
    "    print('at work', flush=True)"
)
for stage in os.environ["STAGES"].split():
    environment = os.environ | {"DVC_STAGE": stage, "DVC_ROOT": os.getcwd()}
    subprocess.run([sys.executable, "-c", code, stage], env=environment, check=True)
"""


def test_the_first_stage_announces_the_run_each_says_its_number_and_its_cost_is_kept(project):
    """Idle stages say only what they print themselves."""
    (project / ".dvc/tmp").mkdir(parents=True)
    (project / "dvc.lock").unlink()
    told = {"lines": ["it takes long"], "work": {"prepare": 5.0}}
    (project / "forecast.py").write_text(f"print('a line of the model\\'s own code')\nprint({json.dumps(told)!r})")
    order = ["sources", "prepare", "ablation", "tokenize"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), "."]), "STAGES": " ".join(order)}
    command = [sys.executable, "-c", DVC]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line != "at work" and "peak memory" not in line] == [
        "it takes long",
        "[1/11] prepare: reading the model",
        "[2/11] tokenize: drawing the texts",
    ]
    assert lines.count("at work") == 4
    assert {path.name for path in (project / "logs").iterdir()} == {f"{stage}.log" for stage in order}
    costs = read_memory(project / ".dvc/tmp/libprune/costs.json")
    assert costs.keys() == {"prepare"}, "only of it the work is known"
    assert (costs["prepare"]["work"], costs["prepare"]["memory"]) == (5.0, 10**6)


@pytest.mark.parametrize("printed", ["", "print('no JSON')", "print(5)"])
def test_a_forecast_that_says_nothing_stops_nothing(project, monkeypatch, capsys, printed):
    (project / "silent_forecast.py").write_text(printed)
    monkeypatch.setattr(story, "_FORECAST", "silent_forecast")
    monkeypatch.setenv("PYTHONPATH", str(project))
    run = story._Run(project, 1, [], params())
    assert run.enter("report", Path("params.yaml"), Path("artifacts")) == "1/1"
    assert capsys.readouterr().out == "1 stages will run. What they take cannot be told: no message\n"


def test_a_forecast_that_fails_says_why_and_stops_nothing(project, monkeypatch, capsys):
    monkeypatch.setattr(story, "_FORECAST", "no_such_module")
    run = story._Run(project, 1, [], params())
    assert run.enter("report", Path("params.yaml"), Path("artifacts")) == "1/1"
    said = capsys.readouterr().out
    assert said.startswith("1 stages will run. What they take cannot be told: ")
    assert "no_such_module" in said


def test_a_stage_that_was_foretold_is_counted_until_the_run_has_passed_it(project, monkeypatch):
    monkeypatch.setattr(story._Run, "_announce", lambda *_: None)
    (project / "dvc.lock").rename(project / "lock-away")
    assert story._Run(project, 1, [], params()).enter("gradients", Path("p"), Path("a")) == "1/7"
    (project / "lock-away").rename(project / "dvc.lock")
    assert story._Run(project, 1, [], params()).enter("score", Path("p"), Path("a")) == "2/6", "activations is skipped"
    assert story._Run(project, 1, [], params()).enter("report", Path("p"), Path("a")) == "3/3"


def test_the_time_of_a_stage_that_went_on_from_a_saved_state_is_not_kept(project):
    run = story._Run(project, 1, [], params())
    run._state["work"] = {"gradients": 2.0}
    with logging_to(project / "x.log"):
        say(f"{CONTINUES}: 1 of 2 are done")
        run.leave("gradients", 1.0, 1)
    assert read_memory(project / story.COSTS) == {}
    with logging_to(project / "x.log"):
        run.leave("gradients", 1.0, 1)
    assert read_memory(project / story.COSTS)["gradients"]["seconds"] == 1.0


# What is remembered


@pytest.mark.parametrize("content", ["", "[]", "{", "nothing", "\x00"])
def test_what_cannot_be_read_is_as_if_it_had_never_been_written(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    assert read_memory(tmp_path / "x.json") == read_memory(tmp_path / "gone.json") == {}


def test_what_cannot_be_written_is_forgotten(tmp_path):
    (tmp_path / "a").write_text("a file")
    remember(tmp_path / "a/x.json", {})
    assert stages_ahead("score", [], []) >= {"score"}


def test_the_memory_is_found_from_any_folder_of_the_project(tmp_path):
    assert memory_of(tmp_path) is None
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / "a/b").mkdir(parents=True)
    assert memory_of(tmp_path / "a/b") == memory_of(tmp_path) == tmp_path / ".dvc/tmp/libprune"


def test_a_result_is_compared_with_the_last_one_that_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    file = tmp_path / "params.yaml"
    file.write_text("allocate: {ratio: 0.2, method: uniform}")
    assert earlier_result({"perplexity": 1.2}, keep=True) is None
    assert earlier_result({"perplexity": 1.2}, keep=True) is None, "the same once more"
    file.write_text("allocate: {ratio: 0.3, method: uniform}")
    for keep in (False, True, False, True, False):
        found = earlier_result({"perplexity": 1.4}, keep=keep)
        assert found is not None
        assert found.figures == {"perplexity": 1.2}
        assert found.changed == {"allocate.ratio": (0.2, 0.3)}
    back = earlier_result({"perplexity": 1.2})
    assert back is not None
    assert back.figures == {"perplexity": 1.4}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_whatever_the_results_the_earlier_one_has_other_figures(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("results")
    (folder / ".dvc/tmp").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, value in enumerate(values):
            found = earlier_result({"x": value}, keep=True)
            others = [one for one in values[:number] if one != value]
            assert (found.figures["x"] if found else None) == (others[-1] if others else None)


def test_telling_needs_neither_a_params_file_nor_dvc(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with telling("report", tmp_path / "params.yaml", tmp_path, lambda: 10**6):
        pass
    begins, ends = capsys.readouterr().out.splitlines()
    assert begins == "report: writing the report"
    assert ends.endswith("peak memory 1 MB")
