"""The runs of a curve are experiments of the project's params with another ratio, and are found again."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from libprune.curves import measured as module
from libprune.curves.measured import EVALUATION, curve_comparison, gather_measured, require_curve, run_curve
from libprune.engine.errors import ParamsError
from libprune.experiments.dvc_experiments import Experiment
from libprune.pipeline.atomic import write_json
from libprune.pipeline.digests import sealed
from libprune.pipeline.params import load_params
from tests.support import evaluated
from tests.support.curved import made_up
from tests.support.params import untrained
from tests.support.swept import row


@pytest.fixture
def params(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(untrained(), sort_keys=False))
    return path


def done(path: Path, ratio: float, **changes: object) -> Experiment:
    """An experiment with the params of the run of this ratio."""
    (run,) = curve_comparison(path, [ratio], {}).runs()
    experiment = replace(row("x", 1 + ratio), names=(run.experiment,), params=run.leaves, revision=f"r{ratio}")
    return replace(experiment, **changes)


def test_every_ratio_is_a_run_of_the_params_with_the_ratio_alone_changed(params):
    found = curve_comparison(params, [0.1, 0.25], {})
    assert [(run.setting, run.seed) for run in found.runs()] == [("0.1", 0), ("0.25", 0)]
    for run in found.runs():
        assert run.experiment == f"{found.name}-{run.setting}-s0"
        before = dict(next(curve_comparison(params, [0.4], {}).runs()).leaves)
        assert dict(run.leaves) == before | {"allocate.ratio": float(run.setting)}


def test_other_params_give_other_names_but_another_ratio_does_not(params):
    data = untrained()
    names = {curve_comparison(params, [0.1], {}).name}
    for section, key, value in (
        ("allocate", "ratio", 0.7),
        ("allocate", "method", "global"),
        ("slice", "repair", "none"),
    ):
        params.write_text(yaml.safe_dump(data | {section: data[section] | {key: value}}))
        names.add(curve_comparison(params, [0.1], {}).name)
    assert len(names) == 3


def test_runs_of_nested_plans_name_the_smaller_ratios_and_those_of_the_file_never_count(params):
    nested = {0.2: (0.1,), 0.3: (0.1, 0.2)}
    runs = list(curve_comparison(params, [0.1, 0.2, 0.3], nested).runs())
    assert [run.changes.get("allocate.nested") for run in runs] == [None, [0.1], [0.1, 0.2]]
    assert curve_comparison(params, [0.1], nested).name != curve_comparison(params, [0.1], {}).name
    data = untrained()
    params.write_text(yaml.safe_dump(data | {"allocate": data["allocate"] | {"ratio": 0.5, "nested": [0.4]}}))
    (run,) = curve_comparison(params, [0.3], {}).runs()
    assert run.changes["allocate.nested"] == []


def test_other_nested_ratios_and_params_that_runs_must_share_give_other_names(params):
    fixed = {"allocate.channel_multiple": 32, "allocate.evaluations": 0}
    (run,) = (found := curve_comparison(params, [0.3], {0.3: (0.1,)}, fixed)).runs()
    assert {key: run.changes[key] for key in fixed} == fixed
    names = {curve_comparison(params, [0.3], {0.3: (smaller,)}).name for smaller in (0.1, 0.2)} | {found.name}
    assert len(names) == 3


def test_nested_sizes_that_the_params_forbid_are_refused_before_anything_is_measured(params):
    def require(nested: bool, **allocate: object) -> None:
        data = yaml.safe_load(params.read_text())
        params.write_text(yaml.safe_dump(data | {"allocate": data["allocate"] | allocate}))
        require_curve(params, load_params(params).allocate, [0.1, 0.2, 0.3], nested)

    require(True)
    require(True, method="search")
    require(False, method="functional", depth="joint", layers=None, shape="per_layer")
    with pytest.raises(ParamsError, match=r"setting '0\.2': .*nested"):
        require(True)


def test_a_ratio_that_makes_the_params_wrong_is_refused(params):
    data = untrained()
    params.write_text(yaml.safe_dump(data | {"allocate": data["allocate"] | {"method": "nothing"}}))
    with pytest.raises(ParamsError, match=r"allocate\.method"):
        curve_comparison(params, [0.1], {})


def stored(cache: Path, content: dict) -> str:
    """A lock of a run whose evaluation lies in the cache."""
    place = cache / "files/md5/ab/cdef"
    place.parent.mkdir(parents=True)
    write_json(place, sealed(content))
    return yaml.safe_dump({"stages": {"evaluate": {"outs": [{"path": EVALUATION, "md5": "abcdef"}]}}})


def test_results_are_found_by_their_params_with_their_evaluation_from_the_cache(params, tmp_path):
    wanted = curve_comparison(params, [0.1, 0.2, 0.3], {})
    rows = [done(params, 0.1), replace(done(params, 0.2), names=("other",)), row("y")]
    locks = {"r0.1": stored(tmp_path, evaluated.EVALUATION)}
    found, remarks = gather_measured(wanted, rows, locks.get, tmp_path)
    assert found.keys() == {0.1, 0.2}
    assert found[0.1].speed("prefill") == (1.204, 1.11, 1.29)
    low, high = found[0.1].interval(1.1, 0.01)
    assert low < 1.1 < high
    assert (found[0.2].evaluation, found[0.2].speed("prefill")) == (None, None)
    assert found[0.2].interval(1.1, 0.01) != found[0.1].interval(1.1, 0.01)
    assert remarks == [f"{EVALUATION} of some runs is in no dvc.lock, so that columns about it are empty."]


def test_only_chosen_ratios_with_a_plan_and_without_results_are_run(params, tmp_path, monkeypatch):
    rows = [done(params, 0.1)]
    ran: list[str] = []

    def run_all(comparison, todo, logs, costs, echo):
        ran.extend(run.setting for run in todo)
        rows.extend(done(params, float(run.setting)) for run in todo if run.setting != "0.3")
        return {run.experiment: "it failed" for run in todo if run.setting == "0.3"}

    monkeypatch.setattr(module, "run_all", run_all)
    monkeypatch.setattr(module, "show", list)
    monkeypatch.setattr(module, "gather", lambda shown, lock_of: (list(rows), {}))
    monkeypatch.setattr(module, "read_lock", lambda revision: None)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    said: list[str] = []
    curve = made_up((0.1, 0.2, 0.3, 0.4))
    found, failed, _ = run_curve(params, curve, (0.1, 0.2, 0.3, 0.9), tmp_path, said.append)
    assert ran == ["0.2", "0.3"]
    assert said == [f"{curve_comparison(params, [0.1], {}).name}: 1 of 3 have results"]
    assert found.keys() == {0.1, 0.2}
    assert list(failed.values()) == ["it failed"]
    ran.clear()
    found, failed, _ = run_curve(params, curve, (), tmp_path, said.append)
    assert found == {}, "without a repository there are no experiments to look for"
    monkeypatch.setattr(module, "in_repository", lambda folder: True)
    assert run_curve(params, curve, (), tmp_path, said.append)[0].keys() == {0.1, 0.2}
    assert ran == []
