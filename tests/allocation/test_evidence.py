"""What allocation reads beside the scores: just that, and nothing of another model, text or order of units."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.allocation.evidence import divergence_curves, read_evidence
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import Scores, write_table
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from libprune.pipeline.shards import write_shard
from libprune.statistics.levels import choose_levels, level_table, order_digest, unit_orders
from libprune.statistics.sensitivity import empty_table, removals, sensitivity_table
from tests.support.shapes import Shape

SHAPE = Shape(layers=3, kv=2, ffn=6)
ORIGIN = {"model": "here", "tokens": "text"}
READ = {
    "uniform": set(),
    "global": set(),
    "retention": set(),
    "functional": {"activations"},
    "hgsp": {"sensitivity"},
    "search": {"levels"},
}


@pytest.fixture
def scores() -> Scores:
    return Scores(SHAPE.architecture(), SHAPE.table(1.0 + np.arange(len(SHAPE.unit_costs()))), ORIGIN)


def measure(layout: Layout, scores: Scores, **origin: str) -> None:
    """Write made-up measurements of everything, of the scores' model and text or of others."""
    architecture, meta = scores.architecture, ORIGIN | origin
    layout.activations.mkdir(parents=True)
    for layer in range(architecture.layers):
        write_shard(layout.activations, layer, {"block.cosine_mean": torch.tensor(0.25 * layer)}, meta)
    measured = removals(architecture)
    losses = np.arange(1.0, len(measured) + 1)[:, None]
    write_table(layout.sensitivity, sensitivity_table(measured, losses, np.zeros(1)), meta)
    levels = choose_levels(architecture, 2)
    order = order_digest(unit_orders(architecture, scores.table))
    divergences = np.linspace(0.1, 1.0, len(levels))[:, None]
    write_table(layout.levels, level_table(levels, divergences), {"order": order, **meta})
    write_json(layout.latency, {"model": meta["model"], "unit": {}, "fixed": 0.0, "outside": 0.0})


@pytest.mark.parametrize("method", METHODS)
def test_just_what_the_method_and_the_objective_need_is_read(tmp_path, scores, method):
    layout = Layout(tmp_path)
    measure(layout, scores)
    assert read_evidence(layout, scores, Allocate(method=method)).keys() == READ[method]
    searching = read_evidence(layout, scores, Allocate(method=method, evaluations=3))
    assert searching.keys() == READ[method] | ({"activations"} if method == "search" else set())
    timed = read_evidence(layout, scores, Allocate(method=method, objective="latency"))
    assert timed.keys() == READ[method] | {"latency"}


@pytest.mark.parametrize(("worth", "artifact"), [("functional", "activations"), ("sensitivity", "sensitivity")])
def test_the_worth_of_blocks_is_read_as_well(tmp_path, scores, worth, artifact):
    measure(Layout(tmp_path), scores)
    assert read_evidence(Layout(tmp_path), scores, Allocate(method="global", worth=worth)).keys() == {artifact}


def test_what_is_read_is_what_was_measured(tmp_path, scores):
    layout = Layout(tmp_path)
    measure(layout, scores)
    change = read_evidence(layout, scores, Allocate(method="functional"))["activations"]
    assert change.tolist() == [1.0, 0.75, 0.5]
    increases = read_evidence(layout, scores, Allocate(method="hgsp"))["sensitivity"]
    by_hand = {kind: [] for kind in increases}
    for number, (_, what) in enumerate(removals(scores.architecture)):
        by_hand[what].append(number + 1.0)
    assert {kind: values.tolist() for kind, values in increases.items()} == by_hand
    curves = read_evidence(layout, scores, Allocate(method="search"))["levels"]
    assert curves.keys() == set(scores.architecture.blocks())
    assert all(curve[0] == 0 and (np.diff(curve) >= 0).all() for curve in curves.values())


@pytest.mark.parametrize("method", [name for name in METHODS if READ[name]])
@pytest.mark.parametrize("origin", ["model", "tokens"])
def test_measurements_of_another_model_or_text_are_refused(tmp_path, scores, method, origin):
    layout = Layout(tmp_path)
    measure(layout, scores, **{origin: "elsewhere"})
    with pytest.raises(ArtifactError, match=rf"belongs to {origin} 'elsewhere', .*run `dvc repro`"):
        read_evidence(layout, scores, Allocate(method=method))


def test_levels_of_units_in_another_order_are_refused(tmp_path, scores):
    measure(Layout(tmp_path), scores)
    turned = scores.with_columns({"score": scores.table["score"][::-1].copy()})
    with pytest.raises(ArtifactError, match="belongs to order"):
        read_evidence(Layout(tmp_path), turned, Allocate(method="search"))


def test_what_was_not_measured_names_the_stage_that_is_missing(tmp_path, scores):
    layout = Layout(tmp_path)
    write_table(layout.sensitivity, empty_table(), ORIGIN)
    write_json(layout.latency, {"model": "here"})
    with pytest.raises(ArtifactError, match="run `dvc repro sensitivity`"):
        read_evidence(layout, scores, Allocate(method="hgsp"))
    with pytest.raises(ArtifactError, match="run `dvc repro latency`"):
        read_evidence(layout, scores, Allocate(objective="latency"))
    with pytest.raises(ArtifactError, match="run `dvc repro activations` first"):
        read_evidence(layout, scores, Allocate(method="functional"))


@st.composite
def measured(draw):
    """A shape, and for every block some levels with their divergences, in any order of rows."""
    shape = Shape(layers=draw(st.integers(1, 3)), kv=draw(st.integers(1, 4)), ffn=draw(st.integers(1, 9)))
    value = st.integers(-4, 40).map(lambda k: k / 8)
    rows = [
        (layer, part, removed, draw(value))
        for layer in range(shape.layers)
        for part, units in shape.units.items()
        for removed in draw(st.sets(st.integers(1, units), min_size=1))
    ]
    return shape, draw(st.permutations(rows))


def table_of(rows: list[tuple[int, str, int, float]]) -> Columns:
    layers, parts, removed, divergence = zip(*rows, strict=True)
    return {
        "layer_idx": np.array(layers),
        "group_type": np.array(parts, dtype=object),
        "removed": np.array(removed),
        "divergence": np.array(divergence),
    }


@given(measured())
def test_a_curve_starts_at_0_never_falls_and_is_the_highest_so_far_at_every_measured_level(problem):
    shape, rows = problem
    curves = divergence_curves(shape.architecture(), table_of(rows))
    assert list(curves) == list(shape.architecture().blocks())
    for (layer, part), curve in curves.items():
        own = {removed: value for i, name, removed, value in rows if (i, name) == (layer, part)}
        assert curve.shape == (shape.architecture().units(part) + 1,)
        assert curve[0] == 0
        assert (np.diff(curve) >= -1e-12).all()
        for removed in own:
            highest = max(0.0, *(value for other, value in own.items() if other <= removed))
            assert curve[removed] == pytest.approx(highest, abs=1e-12)


@given(measured())
def test_between_measured_levels_a_curve_is_a_straight_line(problem):
    shape, rows = problem
    for (layer, part), curve in divergence_curves(shape.architecture(), table_of(rows)).items():
        knots = sorted({0} | {removed for i, name, removed, _ in rows if (i, name) == (layer, part)})
        for one, two in pairwise(knots):
            np.testing.assert_allclose(np.diff(curve[one : two + 1], 2), 0, atol=1e-12)
        assert (curve[knots[-1] :] == curve[knots[-1]]).all()


def test_levels_that_rise_are_passed_through_and_a_fall_is_levelled():
    shape = Shape(layers=1, kv=2, ffn=6)
    rows = [(0, "attention", 1, 0.5), (0, "attention", 2, 2.0)]
    rows += [(0, "mlp", 2, 1.0), (0, "mlp", 4, 0.6), (0, "mlp", 6, 3.0)]
    curves = divergence_curves(shape.architecture(), table_of(rows))
    assert curves[0, "attention"].tolist() == [0, 0.5, 2]
    assert curves[0, "mlp"].tolist() == [0, 0.5, 1, 1, 1, 2, 3]
