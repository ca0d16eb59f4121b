"""The score stage on made-up statistics: fusion, another criterion by part, and what its metadata promise."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.engine.tables import Columns, unit_index
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import find_criterion, join_tables, score_units
from libprune.scoring.expression import criteria_of
from libprune.scoring.scaling import SCALINGS
from libprune.scoring.score import component_columns, foretold, fusion_lines, score_layout
from libprune.statistics.ablation import empty_table
from tests.support.scored import (
    ARCHITECTURE,
    FISHER,
    LOSS,
    ORIGIN,
    SHAPE,
    TAYLOR,
    WANDA,
    copied,
    measured,
    write_tables,
)
from tests.support.shapes import Shape

SCALED = pytest.mark.parametrize("scaling", SCALINGS)
EVERY_FUSION = pytest.mark.parametrize("fusion", ["weighted", "simple", "adaptive", "learned", "best"])
PARTS = ("attention", "mlp")


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    return write_tables(tmp_path_factory.mktemp("artifacts"))


def scored(layout: Layout, criterion: str, **params) -> tuple[Columns, dict]:
    return score_layout(layout, Score(criterion=criterion, **params))


def alone(layout: Layout, name: str, scaling: str = "none") -> Columns:
    """The table of one criterion, by the functions that know of no other."""
    params = Score(criterion=name, scaling=scaling)
    return score_units(join_tables(layout, find_criterion(name), params)[0], params)


def blocks(table: Columns) -> Iterator[np.ndarray]:
    """The rows of every block."""
    for layer in range(SHAPE.layers):
        for part in PARTS:
            yield (table["layer_idx"] == layer) & (table["group_type"] == part)


def assert_parts_add_up(table: Columns) -> None:
    index = {"layer_idx", "group_type", "group_idx", "importance", "cost", "score"}
    total = sum(values for name, values in table.items() if name not in index)
    np.testing.assert_allclose(total, table["importance"], rtol=1e-12, atol=1e-12)


# One criterion


@pytest.mark.parametrize("name", ["taylor", "taylor_2nd", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("scaling", ["none", *SCALINGS])
@EVERY_FUSION
def test_a_single_criterion_is_itself_whatever_the_fusion(layout, name, scaling, fusion):
    table, meta = scored(layout, name, scaling=scaling, fusion=fusion)
    expected = alone(layout, name, scaling)
    assert table.keys() == expected.keys()
    for column, values in expected.items():
        np.testing.assert_array_equal(table[column], values)
    assert (meta["criterion"], meta["fusion"], meta["fused"]) == (name, "none", {})
    assert meta["comparable"] == find_criterion(name).comparable
    assert meta["gradient_orders"] == find_criterion(name).orders


# Fusion on a scale


@SCALED
@pytest.mark.parametrize("fusion", ["weighted", "simple", "adaptive"])
def test_the_order_of_the_criteria_does_not_matter(layout, scaling, fusion):
    one, _ = scored(layout, "taylor + wanda + magnitude", scaling=scaling, fusion=fusion)
    two, _ = scored(layout, "magnitude+taylor+wanda", scaling=scaling, fusion=fusion)
    np.testing.assert_allclose(one["score"], two["score"], rtol=1e-12, atol=1e-12)
    assert_parts_add_up(one)


@SCALED
@pytest.mark.parametrize("fusion", ["weighted", "simple", "adaptive"])
def test_criteria_that_say_the_same_keep_their_order_and_their_scale(layout, scaling, fusion):
    """`taylor` and `taylor_group` are equal here."""
    table, _ = scored(layout, "taylor + taylor_group", scaling=scaling, fusion=fusion)
    np.testing.assert_allclose(table["score"], alone(layout, "taylor", scaling)["score"], rtol=1e-9, atol=1e-12)


@SCALED
def test_all_weight_on_one_criterion_is_that_criterion(layout, scaling):
    table, _ = scored(layout, "1*taylor + 0*wanda", scaling=scaling)
    np.testing.assert_allclose(table["score"], alone(layout, "taylor", scaling)["score"], atol=1e-12)


@SCALED
def test_weights_are_linear_in_the_scaled_criteria(layout, scaling):
    table, meta = scored(layout, "3*taylor + wanda", scaling=scaling)
    parts = [alone(layout, name, scaling)["importance"] for name in ("taylor", "wanda")]
    np.testing.assert_allclose(table["importance"], 0.75 * parts[0] + 0.25 * parts[1], atol=1e-12)
    np.testing.assert_array_equal(table["score"], table["importance"])
    assert meta["criterion"] == "0.75*taylor + 0.25*wanda"
    assert (meta["fusion"], meta["comparable"], meta["gradient_orders"]) == ("weighted", False, {})


def test_simple_is_weighted_with_equal_weights(layout):
    simple, _ = scored(layout, "taylor+wanda", scaling="rank", fusion="simple")
    weighted, _ = scored(layout, "7*taylor+7*wanda", scaling="rank")
    np.testing.assert_allclose(simple["score"], weighted["score"], rtol=1e-12)


def test_adaptive_gives_a_criterion_that_is_constant_in_a_layer_no_weight_there(layout, tmp_path):
    own, index = copied(layout, tmp_path), unit_index(ARCHITECTURE)
    flat = np.where(index["layer_idx"] == 1, 3.0, WANDA)
    write_table(own.root / "activations" / "units.parquet", index | {"wanda_l2": flat}, ORIGIN)
    table, _ = scored(own, "taylor+wanda", scaling="minmax", fusion="adaptive")
    rows = table["layer_idx"] == 1
    np.testing.assert_allclose(table["score"][rows], alone(own, "taylor", "minmax")["score"][rows], atol=1e-12)
    assert (table["wanda"][rows] == 0).all()
    assert table["wanda"][~rows].any()


# Fusion in nats


def test_criteria_in_nats_are_weighted_without_a_scale_and_keep_what_gradient_fixes_read(layout):
    table, meta = scored(layout, "taylor + fisher")
    np.testing.assert_allclose(table["importance"], (TAYLOR + FISHER) / 2)
    np.testing.assert_allclose(table["score"], table["importance"] / table["cost"])
    assert meta["comparable"]
    assert meta["gradient_orders"] == {"taylor": 1, "fisher": 2}
    assert_parts_add_up(table)


def test_a_component_that_two_criteria_share_is_summed_under_its_name(layout):
    table, meta = scored(layout, "taylor + 3*taylor_2nd")
    np.testing.assert_allclose(table["taylor"], TAYLOR)
    np.testing.assert_allclose(table["fisher"], 0.75 * FISHER)
    assert meta["gradient_orders"] == {"taylor": 1, "fisher": 2}


@pytest.mark.parametrize("fusion", ["weighted", "simple", "adaptive"])
def test_unlike_criteria_without_a_scale_are_refused(layout, fusion):
    with pytest.raises(LibpruneError, match=r"of taylor \(nats\), wanda \(activation\) adds unlike things; set score"):
        scored(layout, "taylor + wanda", fusion=fusion)


def test_learned_predicts_nats_from_the_measured_units_and_says_how_well(layout):
    table, meta = scored(layout, "taylor + wanda + magnitude", fusion="learned")
    np.testing.assert_allclose(table["importance"], LOSS, rtol=1e-6)
    np.testing.assert_allclose(table["score"], table["importance"] / table["cost"])
    assert (meta["fusion"], meta["comparable"], meta["gradient_orders"]) == ("learned", True, {})
    assert_parts_add_up(table)
    for part in PARTS:
        facts = meta["fused"][part]
        assert facts["coefficients"] == pytest.approx({"taylor": 2, "wanda": 0.5, "magnitude": 0}, abs=1e-6)
        assert facts["r2"] == pytest.approx(1)
        assert sum(facts["shares"].values()) == pytest.approx(1)
    assert [line.split(" of ")[0] for line in fusion_lines(meta)] == [
        f"{part}: R² 1.000 ± 0.000 on held-out units" for part in PARTS
    ]


def test_learned_refuses_a_scaling_that_takes_the_magnitudes_away(layout):
    with pytest.raises(LibpruneError, match="predicts nats from the criteria's own magnitudes"):
        scored(layout, "taylor + wanda", fusion="learned", scaling="rank")


@pytest.mark.parametrize("fusion", ["learned", "best"])
def test_without_measured_units_what_needs_them_is_refused(layout, tmp_path, fusion):
    own = copied(layout, tmp_path)
    write_table(own.ablation, empty_table(), {"model": ""})
    with pytest.raises(ArtifactError, match=r"holds no measured unit, .* set ablation\.units"):
        scored(own, "taylor + wanda", fusion=fusion)
    assert scored(own, "taylor", fusion=fusion)[1]["fusion"] == "none"


# Another criterion for each part


def test_each_part_may_have_a_criterion_of_its_own(layout):
    table, meta = scored(layout, "magnitude", attention="taylor", mlp="fisher")
    attention = table["group_type"] == "attention"
    np.testing.assert_array_equal(table["importance"], np.where(attention, TAYLOR, FISHER))
    np.testing.assert_array_equal(table["attention.taylor"], np.where(attention, TAYLOR, 0))
    assert meta["criterion"] == "attention: taylor, mlp: fisher"
    assert meta["comparable"], "both are in nats"
    assert meta["gradient_orders"] == {"attention.taylor": 1, "mlp.fisher": 2}
    assert_parts_add_up(table)


@pytest.mark.parametrize(("attention", "mlp"), [("taylor", "wanda"), ("taylor", "random"), ("magnitude", "magnitude")])
def test_parts_compare_only_where_both_are_in_the_same_unit(layout, attention, mlp):
    _, meta = scored(layout, "taylor", attention=attention, mlp=mlp)
    assert not meta["comparable"]
    assert meta["gradient_orders"] == {}


def test_one_part_may_be_learned_beside_a_criterion_in_nats(layout):
    table, meta = scored(layout, "taylor + wanda", mlp="fisher", fusion="learned")
    attention = table["group_type"] == "attention"
    np.testing.assert_allclose(table["importance"], np.where(attention, LOSS, FISHER), rtol=1e-6)
    assert meta["comparable"]
    assert meta["gradient_orders"] == {}, "a fix on one part alone would weigh parts, not layers"
    assert list(meta["fused"]) == ["attention"]


def test_best_takes_for_each_part_the_criterion_that_ranks_the_losses_best(layout, tmp_path):
    own, index = copied(layout, tmp_path), unit_index(ARCHITECTURE)
    losses = np.where(index["group_type"] == "attention", WANDA**3, FISHER)
    write_table(own.ablation, measured(slice(1, None, 3), losses), ORIGIN)
    table, meta = scored(own, "taylor + wanda + fisher", fusion="best", scaling="rank")
    assert meta["criterion"] == "attention: wanda, mlp: fisher"
    for part, name in (("attention", "wanda"), ("mlp", "fisher")):
        rows = table["group_type"] == part
        np.testing.assert_array_equal(table["score"][rows], alone(layout, name, "rank")["score"][rows])
        assert meta["fused"][part]["rank_correlations"][name] == pytest.approx(1)


@pytest.mark.parametrize(
    "params",
    [
        {"criterion": "wanda"},
        {"criterion": "taylor_2nd", "scaling": "rank"},
        {"criterion": "taylor + taylor_2nd + taylor_group"},
        {"criterion": "taylor_2nd + wanda", "scaling": "rank"},
        {"criterion": "taylor + wanda", "fusion": "learned"},
        {"criterion": "wanda", "mlp": "taylor_2nd"},
        {"criterion": "taylor_2nd", "mlp": "taylor + fisher"},
    ],
)
def test_the_columns_that_a_table_will_have_are_known_before(layout, params):
    table, _ = score_layout(layout, Score(**params))
    asked = criteria_of(ARCHITECTURE, Score(**params))
    assert component_columns(asked, Score(**params)) == len(table) - 6


# Small layers


@SCALED
@pytest.mark.parametrize("fusion", ["weighted", "simple", "adaptive"])
def test_a_layer_of_one_unit_is_scored_like_any_other(tmp_path, scaling, fusion):
    shape, layout = Shape(layers=2, kv=1, ffn=2), Layout(tmp_path)
    architecture = shape.architecture()
    layout.architecture.write_text(architecture.to_json())
    origin, index = {"model": architecture.fingerprint, "tokens": "text"}, unit_index(architecture)
    write_table(layout.weights, index | {"cost": shape.unit_costs(), "magnitude_l1": np.arange(6.0)}, origin)
    write_table(layout.root / "gradients" / "units.parquet", index | {"taylor": np.ones(6)}, origin)
    table, _ = scored(layout, "taylor + magnitude", scaling=scaling, fusion=fusion)
    assert np.isfinite(table["score"]).all()
    for rows in blocks(table):
        assert (np.diff(table["score"][rows]) >= 0).all()


# What is known before there are scores

READ = ("taylor", "taylor_group", "taylor_2nd", "fisher", "unit_fisher", "wanda", "magnitude", "random")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.sampled_from(READ), min_size=1, max_size=2, unique=True).map(" + ".join), min_size=2,
                   max_size=2),
    fusion=st.sampled_from(["weighted", "simple", "adaptive", "learned", "best"]),
    scaling=st.sampled_from(["none", *SCALINGS]),
)  # fmt: skip
def test_what_is_foretold_of_scores_is_what_they_say(layout, texts, fusion, scaling):
    params = Score(attention=texts[0], mlp=texts[1], fusion=fusion, scaling=scaling)
    told = foretold(criteria_of(ARCHITECTURE, params), params)
    try:
        meta = score_layout(layout, params)[1]
    except LibpruneError:  # criteria that do not go together
        return
    if told is None:
        assert fusion == "best"
        return
    assert {key: meta[key] for key in ("comparable", "fusion", "scaling")} == {
        key: told[key] for key in ("comparable", "fusion", "scaling")
    }
    assert sorted(meta["gradient_orders"].values() or [0])[-1] == max(told["gradient_orders"].values(), default=0)
    assert bool(meta["gradient_orders"]) == bool(told["gradient_orders"])
