"""Experiments as DVC lists them: only results that belong to their settings become rows.

`data/exp_show.json` was written by `dvc exp show --json` of DVC 3.67 in a project of the tiny model, with `magnitude`
applied to the workspace, `deep` running, `waiting` queued and `broken` failed; inputs, processes and
some params are taken out of it.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.experiments.dvc_experiments import Recovered, gather, gather_comparable, outdated
from libprune.experiments.sweep_table import csv_text, remarks, tabulate_experiments
from tests.support.swept import row

RECORDED = json.loads((Path(__file__).parents[1] / "support/data/exp_show.json").read_text())


def no_lock(revision: str) -> None:
    """The dvc.lock of a revision in a project whose dvc.lock is not in git: none."""


def test_recorded_experiments_become_rows_in_the_order_of_perplexity():
    rows, _ = gather(RECORDED, no_lock)
    assert [one.label for one in rows] == ["magnitude = workspace", "master", "unwed-bate"]
    assert [one.params["allocate.ratio"] for one in rows] == [0.3, 0.2, 0.3]
    assert rows[0].params["preset"] == "balanced"
    assert not any(one.proved for one in rows)
    assert any(line.startswith("Without a dvc.lock") for line in remarks(rows, {}))
    master = RECORDED[1]["data"]
    assert rows[1].ratio == master["metrics"]["metrics/evaluation.json"]["data"]["perplexity_ratio"]["value"]
    assert rows[1].size == master["outs"]["artifacts/pruned"]["size"]


def test_equal_experiments_are_one_that_was_made_when_the_last_of_them_was():
    """The workspace, which has no time, is the experiment that was applied to it."""
    rows, _ = gather(RECORDED, no_lock)
    assert [one.made for one in rows] == ["2026-11-22T11:39:20", "2026-11-22T11:37:41", "2026-11-22T11:38:32"]


def test_metrics_that_an_experiment_started_from_are_not_its_result():
    """DVC shows them for a running and for a failed experiment."""
    states = {one["name"]: one["revs"][0] for one in RECORDED[1]["experiments"]}
    assert "metrics/evaluation.json" in states["deep"]["data"]["metrics"]
    assert "metrics/evaluation.json" in states["broken"]["data"]["metrics"]
    _, left_out = gather(RECORDED, no_lock)
    assert left_out == {"deep": "running", "waiting": "queued", "broken": "failed"}
    assert "Not in the table: deep (running); waiting (queued); broken (failed)." in remarks([row("a")], left_out)


def test_results_that_are_older_than_their_params_are_left_out():
    edited = copy.deepcopy(RECORDED)
    edited[0]["data"]["params"]["params.yaml"]["data"]["allocate"]["ratio"] = 0.35
    lock = lock_text({"allocate.ratio": 0.3})
    rows, left_out = gather(edited, lambda revision: lock if revision == "workspace" else None)
    assert "magnitude" in [one.label for one in rows]
    assert left_out["workspace"] == "allocate last ran with allocate.ratio 0.3, not 0.35"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (("metrics", "metrics/evaluation.json"), "no results in metrics/evaluation.json"),
        (("metrics", "metrics/evaluation.json", "data", "speed"), "no results in metrics/evaluation.json"),
    ],
)
def test_a_commit_without_results_is_named(where, reason):
    shown = copy.deepcopy(RECORDED)
    inner = shown[1]["data"]
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    assert gather(shown, no_lock)[1]["master"] == reason


def test_a_perplexity_that_is_not_finite_is_named():
    shown = copy.deepcopy(RECORDED)
    shown[1]["data"]["metrics"]["metrics/evaluation.json"]["data"]["perplexity_ratio"]["value"] = float("inf")
    assert gather(shown, no_lock)[1]["master"] == "perplexity inf"


def test_what_dvc_cannot_read_is_named_with_its_words():
    shown = [*RECORDED, {"rev": "0123456789", "name": None, "data": None, "error": {"msg": "no dvc.yaml"}}]
    shown[-1]["experiments"] = None
    assert gather(shown, no_lock)[1]["0123456"] == "no dvc.yaml"


def lock_text(params: dict[str, object], made: str = "a", read: str = "a") -> str:
    """A dvc.lock of two stages, of which the second reads what the first makes."""
    stages = {
        "allocate": {"params": {"params.yaml": params}, "outs": [{"path": "plan", "md5": made}]},
        "slice": {"deps": [{"path": "plan", "md5": read}, {"path": "libprune/engine/plan.py", "md5": "b"}]},
    }
    return yaml.safe_dump({"schema": "2.0", "stages": stages})


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("abz_", min_size=1, max_size=5)
)
leaf_params = st.dictionaries(st.sampled_from("abcdef").map("s.{}".format), values, min_size=1)


@given(leaf_params, st.data())
def test_results_are_outdated_exactly_if_a_param_has_changed(leaves, data):
    lock = lock_text(leaves)
    assert outdated(leaves | {"other.key": 1}, lock) is None
    key = data.draw(st.sampled_from(sorted(leaves)))
    assert key in outdated(leaves | {key: "changed"}, lock)


def test_a_number_that_yaml_reads_as_text_has_not_changed():
    assert (
        outdated({"slice.damping": 1e-05}, "stages: {slice: {params: {params.yaml: {slice.damping: 1e-05}}}}") is None
    )


def test_a_param_of_several_parts_is_compared_part_by_part_in_any_order():
    lock = lock_text({"score.cooperative": {"connection": 0.3, "uniqueness": 0.7}})
    same = {"score.cooperative.uniqueness": 0.7, "score.cooperative.connection": 0.3}
    assert outdated(same, lock) is None
    changed = outdated(same | {"score.cooperative.uniqueness": 0.6}, lock)
    assert changed == "allocate last ran with score.cooperative.uniqueness 0.7, not 0.6"


@pytest.mark.parametrize(
    ("ran", "now", "changed"),
    [
        (None, {".text": "b"}, ".text None, not b"),
        ({"text": "b"}, {".text": "b", ".minimum": 2}, ".minimum None, not 2"),
        ({"text": "b", "minimum": 2}, {".text": "b"}, ".minimum 2, not None"),
        ({"text": "b"}, {"": None}, ".text b, not None"),
        ({}, {".text": "b"}, ".text None, not b"),
    ],
)
def test_a_param_that_has_got_or_lost_parts_has_changed(ran, now, changed):
    """Results without a smaller vocabulary were shown as those of one, since only the leaves that ran were compared."""
    params = {f"prepare.vocabulary{part}": value for part, value in now.items()}
    said = outdated(params, lock_text({"prepare.vocabulary": ran}))
    assert said == f"allocate last ran with prepare.vocabulary{changed}"


def test_results_are_outdated_if_a_later_stage_has_not_run_again():
    assert outdated({}, lock_text({}, made="new", read="old")) == "slice has not run since plan changed"


def test_outside_of_a_project_the_error_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LibpruneError, match=r"has no dvc\.yaml; run `libprune compare` in the project's folder"):
        gather_comparable()


def test_dvcs_own_error_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(LibpruneError, match=r"`dvc exp show` failed in .*not inside of a DVC repository"):
        gather_comparable()


def test_without_dvc_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LibpruneError, match=r"DVC cannot be run .* pip install dvc"):
        gather_comparable()


def trained(*names: str) -> list:
    """The recorded experiments, of which these have figures after recovery, the lower the higher it was before."""
    shown = copy.deepcopy(RECORDED)
    for commit in shown:
        for state in (commit, *(one["revs"][0] for one in commit["experiments"] or [] if one["revs"])):
            figures = ((state["data"] or {}).get("metrics") or {}).get("metrics/evaluation.json", {}).get("data")
            if figures and state["data"]["params"]["params.yaml"]["data"]["score"]["criterion"] in names:
                before = figures["perplexity_ratio"]["value"]
                ratio = {"value": 1 / before, "se": 0.01}
                figures["recovered"] = {"perplexity_ratio": ratio, "tokens": 9, "seconds": 1.5, "trained_parameters": 7}
    return shown


def test_rows_are_ordered_by_the_figure_after_recovery_only_if_all_have_one():
    every = {one.params["score.criterion"] for one in gather(RECORDED, no_lock)[0]}
    before = [one.label for one in gather(RECORDED, no_lock)[0]]
    rows, _ = gather(trained(*every), no_lock)
    assert [one.label for one in rows] == before[::-1]
    assert [one.recovered for one in rows] == [Recovered(1 / one.ratio, 0.01, 9, 1.5, 7) for one in rows]
    some, _ = gather(trained(rows[0].params["score.criterion"]), no_lock)
    assert {one.recovered is None for one in some} == {True, False}
    assert [one.label for one in some] == before


def test_a_perplexity_after_recovery_that_is_not_finite_is_named():
    shown = trained(RECORDED[1]["data"]["params"]["params.yaml"]["data"]["score"]["criterion"])
    figures = shown[1]["data"]["metrics"]["metrics/evaluation.json"]["data"]
    figures["recovered"]["perplexity_ratio"]["value"] = float("nan")
    assert gather(shown, no_lock)[1]["master"] == "perplexity nan"


def test_results_of_embeddings_are_compared_by_one_minus_the_cosine():
    """Their metrics hold no perplexity."""
    shown = copy.deepcopy(RECORDED)
    for number, state in enumerate([shown[0]["data"], shown[1]["data"], *_tips(shown)]):
        measured = state["metrics"]["metrics/evaluation.json"]["data"]
        del measured["perplexity_ratio"], measured["dense"]
        measured.pop("recovered", None)
        measured["pruned"] |= {"cosine": 0.9 + 0.01 * number, "cosine_se": 0.002, "rank_correlation": 0.8}
    rows, _ = gather(shown, no_lock)
    assert [one.measure.name for one in rows] == ["1 - cosine"] * len(rows)
    assert [one.ratio for one in rows] == sorted(one.ratio for one in rows)
    cells, header = tabulate_experiments(rows)
    assert "1 - cosine" in header
    assert "rank correlation" in header
    assert "perplexity" not in header
    assert cells[0][header.index("1 - cosine")] == f"{rows[0].ratio:.4f} ± 0.0020"
    assert "cosine_distance,cosine_distance_se" in csv_text(rows)
    assert "perplexity" not in " ".join(remarks(rows, {}))


def _tips(shown: list) -> list[dict]:
    states = [one["revs"][0]["data"] for commit in shown for one in commit["experiments"] or []]
    return [state for state in states if state and "metrics/evaluation.json" in (state.get("metrics") or {})]


@pytest.mark.parametrize("cosine", [1.0, 1.0 + 1e-9])
def test_embeddings_that_are_equal_up_to_rounding_have_a_distance_that_can_be_compared(cosine):
    shown = copy.deepcopy(RECORDED[1:])
    measured = shown[0]["data"]["metrics"]["metrics/evaluation.json"]["data"]
    measured["pruned"] |= {"cosine": cosine, "cosine_se": 0.0}
    (found,) = [one for one in gather(shown, no_lock)[0] if "master" in one.names]
    assert found.ratio == pytest.approx(1e-7)
