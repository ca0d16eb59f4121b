"""Hierarchical allocation: its factors against the definition, its limits, and whole layers that go."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import decide, result_shape
from libprune.allocation.hgsp import HARMLESS, block_factors, threshold_of
from libprune.allocation.methods import Evidence
from libprune.engine.cost import prices
from libprune.engine.errors import BudgetError, LibpruneError, ParamsError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, split_blocks
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Allocate
from tests.support import tiny
from tests.support.shapes import EQUAL_COSTS, Shape, drawn, ladders_of, removed_parameters

HGSP = Allocate(method="hgsp", shape="per_layer")
INCREASES = st.lists(st.floats(-0.5, 5), min_size=3, max_size=3).map(np.array)
SENSITIVITIES = st.fixed_dictionaries({"layer": INCREASES, "attention": INCREASES, "mlp": INCREASES})


def same(one: Plan, two: Plan) -> bool:
    return all(np.array_equal(one.keep[block], two.keep[block]) for block in one.keep)


# The factors


@given(SENSITIVITIES, st.floats(0, 3), st.one_of(st.floats(-1, 5), st.integers(0, 100).map("percentile:{}".format)))
def test_every_factor_is_that_of_the_definition(increases, temperature, threshold):
    """B = ln(1 + max(L, HARMLESS)) up to the threshold, of the block's own increase above, to the power of T."""
    params = HGSP.model_copy(update={"temperature": temperature, "threshold": threshold})
    factors = block_factors(Shape().architecture(), increases, params)
    limit = threshold
    if isinstance(threshold, str):
        limit = float(np.quantile(increases["layer"], int(threshold.split(":")[1]) / 100))
    never = not isinstance(threshold, str) and threshold <= 0
    for (layer, part), factor in factors.items():
        whole = not never and increases["layer"][layer] <= limit
        x = increases["layer" if whole else part][layer]
        assert factor == pytest.approx(np.log(1 + max(x, HARMLESS)) ** temperature, rel=1e-6)
        assert factor > 0


@given(SENSITIVITIES, st.floats(0.1, 2))
def test_purely_by_block_or_by_layer_also_where_a_removal_lowers_the_loss(increases, temperature):
    architecture = Shape().architecture()

    def factors(threshold):
        return block_factors(
            architecture, increases, HGSP.model_copy(update={"temperature": temperature, "threshold": threshold})
        )

    assert factors(0.0) == factors("blockwise") == factors(-3.0)
    by_block = {"layer": increases["layer"] * 7 - 1, "attention": increases["attention"], "mlp": increases["mlp"]}
    assert factors("blockwise") == block_factors(
        architecture, by_block, HGSP.model_copy(update={"temperature": temperature, "threshold": 0.0})
    )
    assert all(
        value == factors("layerwise")[layer, "mlp"]
        for (layer, part), value in factors("layerwise").items()
        if part == "attention"
    )
    assert factors("percentile:100") == factors("layerwise")


def test_the_default_threshold_takes_a_quarter_of_the_layers_as_a_whole():
    layers = np.array([0.5, 0.1, 0.4, 0.2, 0.3])
    assert (layers <= threshold_of(Allocate().threshold, layers)).sum() == 2


@pytest.mark.parametrize(
    "threshold", ["percentile", "percentile:", "percentile:101", "percentile:-3", "layers", "0.1x"]
)
def test_a_threshold_that_is_none_is_named(threshold, tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t", allocate={"threshold": threshold})
    with pytest.raises(ParamsError, match=r"allocate\.threshold.*percentile:0 to 100"):
        load_params(path)


# Units


@given(st.data())
def test_temperature_0_is_global_exactly(data):
    shape, scores, params, evidence = drawn(data, "hgsp")
    cold = params.model_copy(update={"temperature": 0.0})
    plain = params.model_copy(update={"method": "global"})
    architecture = shape.architecture()
    assert same(allocate(architecture, scores, cold, evidence), allocate(architecture, scores, plain))


@given(st.data())
def test_it_is_global_on_scores_times_the_factors_of_their_blocks(data):
    shape, scores, params, evidence = drawn(data, "hgsp")
    architecture = shape.architecture()
    factors = block_factors(architecture, evidence["sensitivity"], params)
    blocks = [np.full(shape.units[part], factors[layer, part]) for layer, part in architecture.blocks()]
    weighted = scores | {name: scores[name] * np.concatenate(blocks) for name in ("score", "importance")}
    ranks = [step.rank for steps in ladders_of(architecture, weighted, params).values() for step in steps]
    assume(len(set(np.round(ranks, 12))) == len(ranks))  # equal ranks may round either way
    plain = params.model_copy(update={"method": "global"})
    assert same(allocate(architecture, scores, params, evidence), allocate(architecture, weighted, plain))


def test_blocks_that_matter_more_keep_more_and_the_temperature_strengthens_it():
    shape = EQUAL_COSTS
    scores = shape.table(np.random.default_rng(0).random(len(shape.unit_costs())) + 0.5)
    worth = {"layer": np.array([0.1, 0.2, 0.4]), "attention": np.array([0.05, 0.1, 0.2])}
    evidence = {"sensitivity": worth | {"mlp": worth["attention"]}}
    kept = []
    for temperature in (0.0, 1.0, 2.0):
        params = HGSP.model_copy(update={"temperature": temperature, "threshold": "blockwise", "ratio": 0.4})
        plan = allocate(shape.architecture(), scores, params, evidence)
        kept.append([sum(plan.kept(layer, part) for part in shape.units) for layer in range(3)])
    assert kept[1][0] < kept[0][0]
    assert kept[2][0] <= kept[1][0]
    assert kept[2][2] >= kept[1][2] >= kept[0][2]


def test_scores_that_do_not_compare_or_are_negative_are_refused():
    shape = Shape()
    table, evidence = shape.table(np.ones(len(shape.unit_costs()))), shape.evidence("hgsp")
    meta = {"criterion": "wanda", "comparable": False, "scaling": "none"}
    with pytest.raises(LibpruneError, match=r"hgsp would rank unlike things; set score\.scaling to rank"):
        decide(Scores(shape.architecture(), table, meta), HGSP, evidence)
    for scaling in ("zscore", "minmax"):
        with pytest.raises(LibpruneError, match=f"must be positive, but .*{scaling}"):
            decide(Scores(shape.architecture(), table, meta | {"scaling": scaling}), HGSP, evidence)
    assert decide(Scores(shape.architecture(), table, meta | {"scaling": "rank"}), HGSP, evidence)


# Whole layers


@st.composite
def collapses(draw):
    shape = Shape(layers=draw(st.integers(2, 6)), kv=draw(st.integers(1, 3)), ffn=draw(st.integers(2, 9)))
    params = HGSP.model_copy(
        update={
            "ratio": draw(st.floats(0.1, 0.8)),
            "collapse_below": draw(st.floats(0.05, 1)),
            "depth": "units",
            "temperature": draw(st.sampled_from([0.0, 1.0, 2.0])),
            "freeze_first": draw(st.integers(0, 1)),
            "min_channels": draw(st.integers(1, 2)),
        }
    )
    seed = draw(st.integers(0, 2**32 - 1))
    scores = (1 + np.random.default_rng(seed).permutation(len(shape.unit_costs()))) / 8
    assume(params.ratio * shape.decoder <= shape.reachable(params))
    return shape, scores, params, seed


def made(case: tuple[Shape, np.ndarray, Allocate, int]) -> tuple[Shape, Columns, Allocate, Evidence]:
    shape, scores, params, seed = case
    return shape, shape.table(scores), params, shape.evidence("hgsp", seed)


def kept_shares(shape: Shape, plan: Plan) -> np.ndarray:
    shares = [[plan.kept(layer, part) / shape.units[part] for part in shape.units] for layer in range(shape.layers)]
    return np.mean(shares, axis=1)


@given(collapses())
def test_weak_layers_go_whole_and_the_budget_still_holds(case):
    shape, scores, params, evidence = made(case)
    architecture = shape.architecture()
    plan = allocate(architecture, scores, params, evidence)
    target = round(params.ratio * shape.decoder)
    removed = removed_parameters(shape, plan)
    assert removed <= target
    gone = [layer for layer in range(shape.layers) if layer not in plan.layers]
    assert plan.layers
    assert not set(gone) & set(range(params.freeze_first))
    for layer in plan.layers:
        assert plan.kept(layer, "attention") >= 1
        assert plan.kept(layer, "mlp") >= min(params.min_channels, shape.ffn)
    floors = {"attention": 1, "mlp": params.min_channels}
    staying = [layer for layer in plan.layers if layer in shape.unfrozen(params)]
    at_floors = all(plan.kept(layer, part) <= floors[part] for layer in staying for part in floors)
    assert target - removed < max(shape.group_cost, shape.channel_cost) or at_floors


@given(collapses())
def test_a_layer_goes_only_if_it_would_have_kept_less_and_the_weakest_go_first(case):
    shape, scores, params, evidence = made(case)
    architecture = shape.architecture()
    plan = allocate(architecture, scores, params, evidence)
    without = params.model_copy(update={"collapse_below": 0.0})
    no_floors = without.model_copy(update={"min_groups": 0, "min_channels": 0})
    shares = kept_shares(shape, allocate(architecture, scores, no_floors, evidence))
    gone = [layer for layer in range(shape.layers) if layer not in plan.layers]
    if not gone:
        assert same(plan, allocate(architecture, scores, without, evidence))
        return
    assert max(shares[gone]) < params.collapse_below
    assert {i for i in shape.unfrozen(params) if shares[i] < max(shares[gone])} <= set(gone)


def test_a_budget_that_collapse_and_floors_leave_out_of_reach_is_refused():
    shape = Shape(layers=4)
    scores, evidence = shape.table(1.0 + np.arange(len(shape.unit_costs()))), shape.evidence("hgsp")
    floors = {"min_groups": 4, "min_channels": 11, "depth": "units"}
    params = HGSP.model_copy(update=floors | {"ratio": 0.5, "collapse_below": 0.05})
    with pytest.raises(BudgetError, match=r"hgsp removes at most 0\.2"):
        allocate(shape.architecture(), scores, params, evidence)


def test_collapse_is_refused_where_a_part_costs_nothing():
    shape = Shape()
    params = HGSP.model_copy(update={"objective": "cache", "collapse_below": 0.5, "depth": "units"})
    scores = shape.table(np.ones(len(shape.unit_costs())))
    with pytest.raises(LibpruneError, match="nothing is gained by removing mlp units"):
        allocate(shape.architecture(), scores, params, shape.evidence("hgsp"))


def test_layers_that_kept_their_widths_make_a_stock_shape_with_fewer_layers():
    """All that the budget takes is two of four layers, whole: pure depth pruning."""
    shape = Shape(layers=4, kv=2, ffn=6)
    costs = len(shape.unit_costs()) // 4
    scores = shape.table(np.repeat([5.0, 0.1, 0.2, 5.0], costs) + np.linspace(0, 0.01, 4 * costs))
    params = HGSP.model_copy(
        update={"ratio": 0.5, "collapse_below": 0.9, "depth": "units", "temperature": 0.0, "shape": "auto"}
    )
    plan = allocate(shape.architecture(), scores, params, shape.evidence("hgsp"))
    assert plan.layers == (0, 3)
    assert plan.uniform
    assert removed_parameters(shape, plan) == round(0.5 * shape.decoder) == prices_of(shape, plan)
    assert result_shape(shape.architecture(), plan, params) == "uniform"
    for block, keep in split_blocks(shape.architecture(), scores["score"] > 1):
        assert np.array_equal(plan.keep[block], keep)


def prices_of(shape: Shape, plan: Plan) -> int:
    return prices(shape.architecture(), "parameters").removed(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hgsp", "collapse_below": 0.3}, "needs allocate.depth: units, not none"),
        ({"method": "global", "collapse_below": 0.3, "depth": "units"}, "belongs to allocate.method: hgsp"),
    ],
)
def test_collapse_needs_its_method_and_leave_to_remove_layers(changes, message, tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t", allocate=changes)
    with pytest.raises(ParamsError, match=message):
        load_params(path)


# The presets


@pytest.mark.parametrize(
    ("name", "fix"), [("hgsp", "none"), ("hgsp+adaptive", "adaptive"), ("hgsp+all", "adaptive+depth")]
)
def test_the_presets_of_the_method(name, fix, tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t")
    path.write_text(path.read_text().replace("preset: balanced", f"preset: {name}"))
    allocation = load_params(path).allocate
    assert (allocation.method, allocation.temperature, allocation.threshold) == ("hgsp", 1, 0)
    assert allocation.gradient_fix == fix


def test_a_preset_fills_in_what_is_absent(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("preset: hgsp+all\nprepare: {model: m}\ntokenize: {text: t}\nallocate: {ratio: 0.3}\n")
    found = load_params(path)
    assert (found.allocate.method, found.allocate.threshold, found.allocate.gradient_fix) == (
        "hgsp",
        0,
        "adaptive+depth",
    )
    assert (found.allocate.ratio, found.slice.repair) == (0.3, "sequential")


def test_a_number_in_scientific_notation_without_a_point_is_a_number(tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t")
    path.write_text(path.read_text().replace("threshold: auto", "threshold: 1e-3"))
    assert load_params(path).allocate.threshold == 0.001


def test_a_fix_of_ones_own_wins_over_the_preset(tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t", allocate={"gradient_fix": "auto"})
    path.write_text(path.read_text().replace("preset: balanced", "preset: hgsp+all"))
    assert load_params(path).allocate.gradient_fix == "auto"
