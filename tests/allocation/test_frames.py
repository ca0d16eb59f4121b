"""Budgets, frames of whole removals and widths, and plans that contain each other."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate, allocation
from libprune.allocation.decide import decide, summary
from libprune.allocation.frames import Frame, frames_of
from libprune.engine import cost
from libprune.engine.describe import describe
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate, Bits, Budgets
from tests.support.models import FAMILIES
from tests.support.shapes import META, Shape, every_method

SHAPE = Shape(layers=3, kv=3, ffn=8, model=6)
LINES = {"unit": {"attention": 6e-6, "mlp": 1e-6}, "fixed": 2e-6, "outside": 1e-5}
BITS = Bits(layers=4.5, outside=16.0)


def under(budgets: dict[str, float], **changes: object) -> Allocate:
    bits = BITS if "bytes" in budgets else Bits()
    return Allocate(
        **{"method": "search", "ratio": None, "shape": "per_layer", "channel_multiple": 1}
        | {"budgets": Budgets(**budgets), "bits": bits}
        | changes
    )


def given_to(shape: Shape, seed: int) -> dict:
    return {"levels": shape.curves(np.random.default_rng(seed)), "latency": LINES}


def table_of(shape: Shape, seed: int) -> dict:
    return shape.table(1.0 + np.random.default_rng(seed).permutation(len(shape.unit_costs())))


def counted(name: str, size: cost.Size) -> float:
    outside = size.total - size.decoder
    extra = {"parameters": float(size.decoder), "bytes": (4.5 * size.decoder + 16 * outside) / 8}
    return extra[name] if name in extra else float(getattr(size, name))


SHARES = st.dictionaries(
    st.sampled_from(["parameters", "total", "macs", "cache", "latency", "bytes"]), st.floats(0.5, 1), min_size=1
)


@settings(max_examples=15)
@given(SHARES, st.integers(0, 99), st.sampled_from(["per_layer", "uniform"]))
def test_every_budget_holds_exactly_and_no_step_can_be_given_back(budgets, seed, shape):
    architecture, params = SHAPE.architecture(), under(budgets, shape=shape)
    found = decide(Scores(architecture, table_of(SHAPE, seed), META), params, given_to(SHAPE, seed))
    told = {one["name"]: one for one in summary(architecture, found).get("budgets", [])}
    assert told.keys() == budgets.keys()
    left, dense = cost.size(architecture, found.plan), cost.size(architecture, Plan.dense(architecture))
    for name, one in told.items():
        for size, amount in ((left, one["reached"]), (dense, one["dense"])):
            if name != "latency":
                assert amount == pytest.approx(counted(name, size))
        assert one["reached"] <= budgets[name] * one["dense"] * (1 + 1e-12)
        assert one["share"] == pytest.approx(one["reached"] / one["dense"])
    nothing = all(keep.all() for keep in found.plan.keep.values())
    assert nothing or any(one["binds"] for one in told.values())
    assert found.programme["bound"] <= found.programme["divergence"]
    assert found.programme["gap"] < 1e-4


def test_budgets_out_of_reach_are_refused_with_what_can_be_had():
    """One group and one channel of each layer stay: a third of the cache."""
    architecture, scores = SHAPE.architecture(), table_of(SHAPE, 0)
    with pytest.raises(BudgetError, match=r"budgets\.cache = 0\.2 cannot be met: at most 66\.67 % .* 0\.3334 stays"):
        allocate(architecture, scores, under({"cache": 0.2, "macs": 0.9}), given_to(SHAPE, 0))
    with pytest.raises(LibpruneError, match=r"a budget is state, but .* keeps no recurrent state"):
        allocate(architecture, scores, under({"state": 0.5}), given_to(SHAPE, 0))


def test_budgets_that_exclude_each_other_are_named():
    """A channel costs more than a group: as few parameters as asked for need the MLP gone, and the cache attention."""
    shape = Shape(layers=2, kv=2, q=1, d=1, ffn=4, gates=5, model=6)
    free = {"min_groups": 0, "min_channels": 0}
    few = (shape.group_cost + shape.overhead) * shape.layers / shape.decoder + 0.001
    scores, evidence = table_of(shape, 0), given_to(shape, 0)
    for budgets in ({"parameters": few}, {"cache": 0.01}):
        assert allocate(shape.architecture(), scores, under(budgets, **free), evidence).layers == (0, 1)
    with pytest.raises(BudgetError, match=r"parameters and cache can each be met alone.* not together"):
        allocate(shape.architecture(), scores, under({"parameters": few, "cache": 0.01}, **free), evidence)


def test_a_multiple_of_channels_is_chosen_under_budgets_too():
    shape = Shape(layers=4, kv=2, ffn=256)
    params = under({"parameters": 0.8, "cache": 0.75}, channel_multiple="auto")
    found = decide(Scores(shape.architecture(), table_of(shape, 0), META), params, given_to(shape, 0))
    assert found.params.channel_multiple in {32, 64, 128, 256}
    assert all(count % found.params.channel_multiple == 0 for count in found.plan.counts("mlp"))


# Frames


def order_of(shape: Shape, rng: np.random.Generator, parts: bool) -> list:
    """Whole layers, or parts, in a made-up order with divergences that rise."""
    blocks = list(shape.architecture().blocks())
    steps = [[block] for block in blocks] if parts else [[b for b in blocks if b[0] == i] for i in range(shape.layers)]
    rng.shuffle(steps)
    gone, order = frozenset(), [(frozenset(), 0.0)]
    for step, rise in zip(steps[:2], rng.exponential(size=2), strict=True):
        gone |= frozenset(step)
        order.append((gone, order[-1][1] + float(rise)))
    return order


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.floats(0.5, 0.9))
def test_the_best_frame_is_that_of_trying_all_of_them(seed, parts, widths, share):
    rng = np.random.default_rng(seed)
    shape = Shape(layers=3, kv=2, ffn=4, model=6)
    architecture, scores = shape.architecture(), table_of(shape, seed)
    evidence = given_to(shape, seed) | {"depth": order_of(shape, rng, parts)}
    if widths:
        evidence["width"] = {6: 0.0, 4: float(rng.exponential()), 5: float(rng.exponential()) / 2}
    params = under({"parameters": share, "cache": min(1.0, share + 0.2)}, depth="joint")
    totals = {}
    for (number, (gone, lost)), (width, narrower) in product(
        enumerate(evidence["depth"]), evidence.get("width", {6: 0.0}).items()
    ):
        alone = evidence | {"depth": [(gone, lost)], "width": {6: 1e6, width: narrower}}
        try:
            found = allocation(architecture, scores, params, alone)
        except BudgetError:
            continue
        if found.programme["divergence"] > 1e5:
            continue
        totals[number, width] = found.programme["divergence"]
        assert found.plan.removed >= gone
        left = cost.size(architecture, replace(found.plan, width=width))
        assert left.decoder <= share * shape.decoder
    if not totals:
        with pytest.raises(BudgetError):
            allocation(architecture, scores, params, evidence)
        return
    best = allocation(architecture, scores, params, evidence)
    assert best.programme["divergence"] == pytest.approx(min(totals.values()), rel=1e-4)
    for other in best.programme["next"]:
        assert other["divergence"] >= best.programme["divergence"] * (1 - 1e-6)
        true = totals.get((other["removals"], other["width"] or 6))
        assert true is None or other["divergence"] <= true * (1 + 1e-4) + 1e-9


def test_frames_are_those_that_contain_a_smaller_one():
    order = [(frozenset(), 0.0), (frozenset({(0, "mlp")}), 0.5)]
    evidence = {"depth": order, "width": {8: 0.0, 6: 0.25}}
    params = Allocate(method="search", depth="joint")
    assert [(one.removals, one.width, one.divergence) for one in frames_of(params, evidence)] == [
        (0, None, 0.0),
        (0, 6, 0.25),
        (1, None, 0.5),
        (1, 6, 0.75),
    ]
    within = Frame(0, frozenset(), 6, 0.25)
    assert [(one.removals, one.width) for one in frames_of(params, evidence, within)] == [(0, 6), (1, 6)]
    assert [one.removals for one in frames_of(params.model_copy(update={"layers": 1}), evidence)] == [1, 1]
    with pytest.raises(BudgetError, match="has put 1 removals into order"):
        frames_of(params.model_copy(update={"layers": 2}), evidence)


@pytest.mark.parametrize("method", ["search", "global"])
def test_layers_and_columns_that_are_together_more_than_the_ratio_are_refused(method):
    """A layer alone is a third, 2 of 6 columns are another."""
    shape = Shape(layers=3, kv=2, ffn=12, model=6)
    order = [(frozenset(), 0.0), (frozenset((0, part) for part in ("attention", "mlp")), 0.2)]
    params = Allocate(method=method, shape="per_layer", ratio=0.5, depth="joint", layers=1, width=4, channel_multiple=1)
    evidence = given_to(shape, 0) | {"depth": order}
    with pytest.raises(BudgetError, match=r"layers: 1 would take 0\.55.* the columns beyond allocate\.width = 4, more"):
        allocation(shape.architecture(), table_of(shape, 0), params, evidence)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(0.1, 0.6))
def test_a_ratio_is_reached_to_one_step_in_whichever_frame(seed, ratio):
    rng, shape = np.random.default_rng(seed), Shape(layers=3, kv=2, ffn=12, model=6)
    evidence = given_to(shape, seed) | {"depth": order_of(shape, rng, parts=False), "width": {6: 0.0, 4: 0.3}}
    params = Allocate(method="search", shape="per_layer", ratio=ratio, depth="joint", channel_multiple=1)
    found = allocation(shape.architecture(), table_of(shape, seed), params, evidence)
    removed = shape.decoder - cost.size(shape.architecture(), found.plan).decoder
    assert 0 <= round(ratio * shape.decoder) - removed < shape.channel_cost


def test_the_share_in_reach_counts_the_columns_that_go():
    shape = Shape(layers=3, kv=2, ffn=12, model=6)
    params = Allocate(method="global", ratio=0.95, width=4, channel_multiple=1)
    left = cost.size(shape.architecture(), Plan.dense(shape.architecture())).decoder
    smallest = Plan.dense(shape.architecture())
    for layer in range(3):
        smallest = smallest.without((layer, "attention"), slice(1, None)).without((layer, "mlp"), slice(1, None))
    most = left - cost.size(shape.architecture(), replace(smallest, width=4)).decoder
    with pytest.raises(BudgetError, match=rf"removes at most {most / left:.3f} \({most:,} of {round(0.95 * left):,} "):
        allocate(shape.architecture(), table_of(shape, 0), params)


def test_where_no_frame_comes_within_a_step_the_nearest_one_of_least_divergence_is_taken():
    """Each layer can lose its attention or its MLP; two attentions are too little, and one MLP is too much."""
    shape, levels = Shape(layers=2, kv=1, ffn=24, model=6), {}
    for block in shape.architecture().blocks():
        levels[block] = np.linspace(0, 0.1, shape.units[block[1]] + 1)
    attentions = [frozenset({(0, "attention")}), frozenset({(0, "attention"), (1, "attention")})]
    evidence = {"levels": levels, "depth": [(frozenset(), 0.0), (attentions[0], 4.0), (attentions[1], 9.0)]}
    free = {"min_groups": 0, "min_channels": 0, "channel_multiple": 24}
    params = Allocate(method="search", shape="per_layer", ratio=0.34, depth="joint", **free)
    found = allocation(shape.architecture(), table_of(shape, 0), params, evidence)
    assert found.plan.removed == attentions[1]
    assert found.programme["divergence"] == pytest.approx(0.2)


def test_nested_plans_are_found_where_a_frame_has_no_room_for_what_the_smaller_one_removes():
    """What goes in any case leaves too little in the narrowest frame, where no step comes near to the ratio."""
    seed = 529
    shape = Shape(layers=2, kv=1, ffn=7, model=6)
    rng = np.random.default_rng(seed)
    evidence = given_to(shape, seed) | {"depth": order_of(shape, rng, parts=False), "width": {6: 0.0, 5: 0.2, 4: 0.4}}
    limits = {"channel_multiple": 4, "min_channels": 2, "freeze_first": 1, "ratio_of": "total"}
    params = Allocate(method="search", shape="per_layer", ratio=0.2436, nested=(0.147,), width="auto", **limits)
    architecture, scores = shape.architecture(), table_of(shape, seed)
    smaller = allocate(architecture, scores, params.model_copy(update={"ratio": 0.147, "nested": ()}), evidence)
    larger = allocate(architecture, scores, params, evidence)
    assert all(not (keep & ~smaller.keep[block]).any() for block, keep in larger.keep.items())


# Plans that contain each other


@every_method
@settings(max_examples=10)
@given(st.data())
def test_each_larger_cut_contains_the_smaller_ones(method, data):
    seed = data.draw(st.integers(0, 10**6))
    shape = Shape(layers=3, kv=4, ffn=12)
    one, two = sorted(data.draw(st.sets(st.sampled_from([0.1, 0.15, 0.2, 0.3, 0.4]), min_size=2, max_size=2)))
    split = data.draw(st.sampled_from(["importance", "proportional"]))
    params = Allocate(method=method, shape="per_layer", ratio=two, nested=(one,), channel_multiple=1, split=split)
    evidence = shape.evidence(method, seed)
    architecture, scores = shape.architecture(), table_of(shape, seed)
    smaller = allocate(architecture, scores, params.model_copy(update={"ratio": one, "nested": ()}), evidence)
    larger = allocate(architecture, scores, params, evidence)
    for block, keep in larger.keep.items():
        assert not (keep & ~smaller.keep[block]).any()
    removed = shape.decoder - cost.size(architecture, larger).decoder
    step = max(shape.group_cost, shape.channel_cost) * (1 if method != "uniform" else shape.layers)
    assert abs(removed - two * shape.decoder) <= step + 1


@pytest.mark.parametrize("method", ["uniform", "global", "functional", "retention"])
@settings(max_examples=20)
@given(st.data())
def test_whole_layers_leave_room_for_what_smaller_ratios_remove(method, data):
    """Units that go from other layers in any case take their share of the target before one more layer fits."""
    seed = data.draw(st.integers(0, 10**6))
    shape = Shape(layers=7, kv=4, ffn=12)
    ratios = sorted(data.draw(st.sets(st.sampled_from([0.1, 0.2, 0.201, 0.25, 0.3, 0.4]), min_size=2, max_size=3)))
    limits = {"channel_multiple": 1, "min_groups": 0, "min_channels": 0, "split": "proportional"}
    params = Allocate(method=method, shape="per_layer", ratio=ratios[-1], depth="joint", layers=None, **limits)
    order = order_of(shape, np.random.default_rng(seed), parts=False)
    evidence = shape.evidence(method, seed) | {"depth": order}
    architecture, scores, plans = shape.architecture(), table_of(shape, seed), []
    for number, ratio in enumerate(ratios):
        changes = {"ratio": ratio, "nested": tuple(ratios[:number])}
        try:
            plans.append(allocate(architecture, scores, params.model_copy(update=changes), evidence))
        except BudgetError as error:
            assert "finds no plan" in str(error)
            return
    for smaller, larger in pairwise(plans):
        assert all(not (keep & ~smaller.keep[block]).any() for block, keep in larger.keep.items())
    step = max(shape.group_cost, shape.channel_cost) * (1 if method != "uniform" else shape.layers)
    for ratio, plan in zip(ratios, plans, strict=True):
        removed = shape.decoder - cost.size(architecture, plan).decoder
        assert removed <= ratio * shape.decoder + step


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58, 0.6, 0.7])
def test_a_budget_counts_as_the_decimal_number_that_was_written(share):
    """0.7 times 11,520 is a little less than 8,064 for a computer, and one group more went for it."""
    shape = Shape(layers=10, kv=10, q=10, d=8, ffn=8, model=16)
    limits = {"ratio": None, "channel_multiple": 1, "min_groups": 0, "evaluations": 0}
    params = Allocate(method="search", shape="per_layer", budgets={"cache": share}, **limits)
    plan = allocate(shape.architecture(), table_of(shape, 0), params, shape.evidence("search"))
    kept = sum(int(keep.sum()) for (_, part), keep in plan.keep.items() if part == "attention")
    assert kept == round(100 * share)


def test_a_smaller_ratio_that_is_none_is_refused():
    shape = Shape()
    with pytest.raises(BudgetError, match=r"allocate\.nested has 0\.4, which is not smaller than the ratio 0\.3"):
        allocate(shape.architecture(), table_of(shape, 0), Allocate(method="global", ratio=0.3, nested=(0.4,)))


@pytest.mark.parametrize("nested", [(), (0.2, 0.628)])
@pytest.mark.parametrize("method", ["global", "uniform"])
def test_what_the_floors_forbid_is_refused_with_smaller_plans_inside_too(method, nested):
    """The forced removals of the smaller plans are one large step, which is not the distance to what is asked for."""
    shape = Shape()
    params = Allocate(method=method, ratio=0.68, nested=nested, min_groups=2, min_channels=2)
    with pytest.raises(BudgetError, match=rf"ratio = 0\.68 .* {method} removes at most 0\.\d+"):
        allocate(shape.architecture(), table_of(shape, 0), params)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h", "llama"])
@pytest.mark.parametrize("objective", ["active", "state", "bytes", "total"])
def test_the_prices_of_budgets_are_what_the_exact_size_loses(name, objective):
    architecture = describe(FAMILIES[name](0))
    if objective == "state" and architecture.state is None:
        with pytest.raises(LibpruneError, match="keeps no recurrent state"):
            cost.prices(architecture, objective)
        return
    bits = {"layers": 4.5, "outside": 16.0}
    prices = cost.prices(architecture, objective, bits=bits)

    def amount(plan: Plan) -> float:
        size = cost.size(architecture, plan)
        outside = size.total - size.decoder
        return 4500 * size.decoder + 16000 * outside if objective == "bytes" else getattr(size, objective)

    dense = Plan.dense(architecture)
    assert prices.total == amount(dense)
    for part, shape in architecture.parts.items():
        layer = architecture.with_part(part)[-1]
        most = architecture.units(part) - shape.least
        for gone in {0, most} if shape.coupled else {1, most // 2, most}:
            plan = dense.without((layer, part), slice(0, gone))
            assert prices.removed(plan) == amount(dense) - amount(plan), (part, gone)


def test_only_search_has_a_programme():
    assert [name for name, method in METHODS.items() if method.programme] == ["search"]
