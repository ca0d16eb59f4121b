"""Plans of a curve are those of single runs of the stage allocate, and their figures are those of the models."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from libprune.allocation.advice import Fixed
from libprune.allocation.decide import Decision, Ground, decide
from libprune.curves.plans import DEFAULT, parse_ratios, plan_curve, shared_params
from libprune.engine import cost
from libprune.engine.errors import ArtifactError, ParamsError
from libprune.pipeline.artifacts import Scores, read_architecture, read_json, read_plan, read_table, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Allocate
from libprune.statistics import latency
from tests.support import tiny
from tests.support.shapes import META, Shape

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
        result = read_json(project / "metrics/allocation.json", "allocate")
        assert one.removed == result["share_removed"]
        assert one.divergence == result.get("programme", {}).get("divergence")
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
    none_measured = {"allocate.evaluations": 0} if method == "search" else {}
    assert curve.fixed == {"allocate.channel_multiple": 1, **none_measured}
    for large, small in pairwise(curve.points):
        assert not any((small.plan.keep[block] & ~keep).any() for block, keep in large.plan.keep.items())
    tiny.change_params(project, "allocate", ratio=0.4, nested=[0.1, 0.25])
    tiny.run_stages(project, ["allocate"])
    assert curve.planned[-1].plan.digest == read_plan(layout, read_architecture(layout))[0].digest
    layout.plan.unlink()
    tiny.change_params(project, "allocate", nested=[])


@pytest.mark.parametrize("method", ["global", "search"])
def test_single_runs_contain_each_other_although_each_ratio_alone_has_a_multiple_of_its_own(method):
    shape, ratios = Shape(layers=2, kv=2, ffn=512), (0.1, 0.2, 0.5)
    scores = Scores(shape.architecture(), shape.table(np.linspace(1, 2, len(shape.unit_costs()))), META)
    ground = Ground(Fixed(scores, "none", 1.0, 1.0), scores, shape.evidence(method))
    asked = Allocate(method=method, shape="per_layer")

    def plans(asked: Allocate) -> list[Decision]:
        smaller = [{"ratio": ratio, "nested": ratios[:number]} for number, ratio in enumerate(ratios)]
        return [decide(scores, asked.model_copy(update=one), ground.evidence) for one in smaller]

    assert len({one.params.channel_multiple for one in plans(asked)}) > 1
    found = plans(asked.model_copy(update=shared_params(ground, asked, ratios)))
    for small, large in pairwise(one.plan for one in found):
        assert not any((large.keep[block] & ~keep).any() for block, keep in small.keep.items())


def test_the_measured_loss_of_a_width_that_is_given_counts(project):
    layout = Layout(project / "artifacts")
    meta = read_table(layout.scores, "score")[1]
    whole = read_architecture(layout).sizes["model"]
    written = {"width": np.array([whole - 2, whole - 4]), "divergence": np.array([0.25, 0.75])}
    write_table(layout.widths, written, {"model": meta["model"], "tokens": meta["tokens"]})
    curve = curve_of(project, (0.3, 0.5), method="search", objective="parameters", width=whole - 4)
    assert [one.plan.width for one in curve.planned] == [whole - 4] * 2
    levels = curve_of(project, (0.3, 0.5), width=whole - 2)
    for one, wider in zip(curve.planned, levels.planned, strict=True):
        assert one.divergence >= 0.75
        assert wider.divergence >= 0.25
    layout.widths.unlink()
    tiny.change_params(project, "allocate", width=None)


def test_a_curve_of_budgets_is_refused(project):
    asked = {"method": "search", "ratio": None, "budgets": {"parameters": 0.8}}
    with pytest.raises(ParamsError, match=r"allocate\.budgets sets the size; leave the budgets empty"):
        curve_of(project, (0.3,), **asked)
    tiny.change_params(project, "allocate", ratio=0.2, budgets={})


def test_what_is_missing_is_named(project):
    with pytest.raises(ArtifactError, match="sensitivity"):
        curve_of(project, (0.3,), method="hgsp", objective="parameters")
    tiny.change_params(project, "allocate", method="uniform")


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
