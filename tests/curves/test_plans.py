"""Plans of a curve are those of single runs of the stage allocate, and their figures are those of the models."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from libprune.curves.plans import DEFAULT, parse_ratios, plan_curve, predicted_divergence
from libprune.engine import cost
from libprune.engine.errors import ArtifactError, ParamsError
from libprune.pipeline.artifacts import read_architecture, read_json, read_plan, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.statistics import latency
from tests.support import tiny
from tests.support.shapes import Shape, plan_without

BEFORE = ["prepare", "tokenize", "gradients", "hessian", "activations", "score", "levels", "latency"]
SEARCH = {"score": {"criterion": "unit_fisher"}, "latency": {"tokens": 4, "widths": 2, "rounds": 1}}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model with all that any method reads, but for the sensitivity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_seconds", tiny.by_parameters)
        folder = tmp_path_factory.mktemp("project")
        asked = {"method": "search", "objective": "latency", "evaluations": 0}
        return tiny.write_project(folder, BEFORE, allocate=asked, **SEARCH)


def curve_of(folder: Path, ratios, **settings):
    tiny.change_params(folder, "allocate", **settings)
    return plan_curve(Layout(folder / "artifacts"), load_params(folder / "params.yaml"), ratios)


@pytest.mark.parametrize("objective", ["parameters", "cache"])
@pytest.mark.parametrize("method", ["uniform", "global", "search"])
def test_plans_are_those_of_single_runs_of_the_stage(project, method, objective):
    curve = curve_of(project, (0.1, 0.25, 0.4), method=method, objective=objective)
    layout = Layout(project / "artifacts")
    for one in curve.planned:
        tiny.change_params(project, "allocate", ratio=one.ratio)
        tiny.run_stages(project, ["allocate"])
        plan, meta = read_plan(layout, read_architecture(layout))
        assert one.plan.digest == plan.digest
        assert one.shape == meta["shape"]
        assert one.removed == read_json(project / "metrics/allocation.json", "allocate")["share_removed"]
    assert [one.ratio for one in curve.planned] == [0.1, 0.25, 0.4]
    assert (curve.skipped, curve.nested) == ({}, {})
    layout.plan.unlink()


def test_figures_are_counted_from_the_plan_and_nothing_is_written(project):
    layout = Layout(project / "artifacts")
    curve = curve_of(project, (0.2, 0.5), method="search", objective="parameters")
    assert not layout.plan.exists()
    architecture, (scores, _) = read_architecture(layout), read_table(layout.scores, "score")
    lines = read_json(layout.latency, "latency")
    prices = cost.prices(architecture, "latency", lines)
    for one in curve.points:
        assert one.size == cost.size(architecture, one.plan)
        assert (one.weights, one.cache, one.state) == (4 * one.size.total, 4 * one.size.cache, 0)
        assert one.seconds == pytest.approx((prices.total - prices.removed(one.plan)) / 1e12)
        keep = np.concatenate([one.plan.keep[block] for block in architecture.blocks()])
        assert one.importance == pytest.approx(1 - scores["importance"][keep].sum() / scores["importance"].sum())
    dense, *planned = curve.points
    assert (dense.ratio, dense.removed, dense.divergence, dense.importance) == (0, 0, 0, 0)
    assert dense.size.total == architecture.total_parameters
    losses = [one.divergence for one in planned]
    assert losses == sorted(losses) and losses[0] > 0


def test_what_cannot_be_removed_is_skipped_with_the_reason_and_the_rest_is_planned(project):
    curve = curve_of(project, (0.3, 0.95), method="uniform", objective="parameters")
    assert [one.ratio for one in curve.planned] == [0.3]
    assert list(curve.skipped) == [0.95]
    assert "cannot be removed" in curve.skipped[0.95]
    assert not curve.predicts and curve.dense.divergence is None


def test_a_search_that_would_measure_is_planned_without(project):
    """Nothing runs: the plans are those that it begins with."""
    plain = curve_of(project, (0.3,), method="search", objective="parameters", evaluations=0)
    searching = curve_of(project, (0.3,), method="search", objective="parameters", evaluations=5)
    assert searching.planned[0].plan.digest == plain.planned[0].plan.digest
    tiny.change_params(project, "allocate", evaluations=0)


@pytest.mark.parametrize("method", ["global", "search"])
def test_nested_plans_lie_within_each_other_and_are_those_of_the_stage(project, method):
    tiny.change_params(project, "allocate", method=method, objective="parameters")
    layout, params = Layout(project / "artifacts"), load_params(project / "params.yaml")
    curve = plan_curve(layout, params, (0.1, 0.25, 0.4, 0.95), nested=True)
    assert curve.nested == {0.25: (0.1,), 0.4: (0.1, 0.25)}
    for large, small in pairwise(curve.points):
        assert not any((small.plan.keep[block] & ~keep).any() for block, keep in large.plan.keep.items())
    tiny.change_params(project, "allocate", ratio=0.4, nested=[0.1, 0.25])
    tiny.run_stages(project, ["allocate"])
    assert curve.planned[-1].plan.digest == read_plan(layout, read_architecture(layout))[0].digest
    layout.plan.unlink()
    tiny.change_params(project, "allocate", nested=[])


def test_a_curve_of_budgets_is_refused(project):
    asked = {"method": "search", "ratio": None, "budgets": {"parameters": 0.8}}
    with pytest.raises(ParamsError, match=r"allocate\.budgets sets the size; leave the budgets empty"):
        curve_of(project, (0.3,), **asked)
    tiny.change_params(project, "allocate", ratio=0.2, budgets={})


def test_what_is_missing_is_named(project):
    with pytest.raises(ArtifactError, match="sensitivity"):
        curve_of(project, (0.3,), method="hgsp", objective="parameters")
    tiny.change_params(project, "allocate", method="uniform")


def test_divergences_of_blocks_add_up_and_joint_ones_take_the_place_of_single_ones():
    shape = Shape()
    architecture, evidence = shape.architecture(), shape.evidence("search")
    curves = evidence["levels"]
    plan = plan_without(architecture, 1, "mlp", 0, 1, 2)
    assert predicted_divergence(evidence, plan) == curves[1, "mlp"][3]
    first, second = (2, "attention"), (0, "attention")
    more = plan.without(first, slice(None))
    assert predicted_divergence(evidence, more) == pytest.approx(curves[1, "mlp"][3] + curves[first][-1])
    order = [(frozenset(), 0.0), (frozenset({first}), 7.0), (frozenset({first, second}), 9.0)]
    joint = evidence | {"depth": order, "width": {4: 0.5, 5: 0.0}}
    assert predicted_divergence(joint, plan) == curves[1, "mlp"][3]
    assert predicted_divergence(joint, more) == pytest.approx(curves[1, "mlp"][3] + 7)
    both = replace(more.without(second, slice(None)), width=4)
    assert predicted_divergence(joint, both) == pytest.approx(curves[1, "mlp"][3] + 9.5)
    assert predicted_divergence({}, plan) is None


def test_ratios_are_read_in_any_form_and_sorted():
    assert parse_ratios(["0.3,0.1", "0.2"]) == (0.1, 0.2, 0.3)
    assert parse_ratios(["0.2, .5"]) == (0.2, 0.5)
    assert DEFAULT == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize("text", ["1", "0", "-0.1", "1.2", "nan", "inf", "half", "0.1,1e9"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ParamsError, match="is no ratio; name shares to remove between 0 and 1"):
        parse_ratios([text])


def test_a_ratio_twice_is_refused():
    with pytest.raises(ParamsError, match=r"the ratio 0\.2 is named twice"):
        parse_ratios(["0.2,0.3", "0.20"])
