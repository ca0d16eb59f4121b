"""Retention: what a block's own scores say of how much it can lose, with a budget and without."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.allocation.allocate import allocate, settle
from libprune.allocation.decide import decide, summary
from libprune.allocation.retention import CONSERVATIVE, removable_units, retained_share
from libprune.engine.errors import BudgetError, LibpruneError, ParamsError
from libprune.engine.tables import split_blocks
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Allocate
from tests.support.shapes import Shape, removed_parameters
from tests.support.tiny import write_params

META = {"criterion": "wanda", "fusion": "none", "comparable": True, "scaling": "none"}
IMPORTANCE = arrays(float, st.integers(1, 12), elements=st.integers(0, 1000).map(float))
SHAPE = Shape(layers=4, kv=4, ffn=40)


def table(seed: int):
    """Scores of blocks that differ in how unlike their units are."""
    rng = np.random.default_rng(seed)
    spread = np.repeat(rng.choice([0.1, 1.0, 3.0], size=2 * SHAPE.layers), [4, 40] * SHAPE.layers)
    return SHAPE.table(np.exp(spread * rng.normal(size=len(spread))))


def unfixed(**limits) -> Allocate:
    return Allocate(method="retention", ratio=None, shape="per_layer", **limits)


# One block


@given(IMPORTANCE, st.floats(0.5, 0.99))
def test_as_many_go_as_leave_the_share_and_one_more_would_not(importance, share):
    count = removable_units(importance, share)
    held = np.sort(importance if importance.any() else np.ones_like(importance))
    whole = int(count)
    assert 0 <= count < len(held)
    assert held[whole:].sum() >= share * held.sum() * (1 - 1e-9)
    assert held[whole + 1 :].sum() <= share * held.sum() * (1 + 1e-9)


@given(IMPORTANCE, st.sampled_from(sorted(CONSERVATIVE)), st.integers(1, 9), st.randoms())
def test_what_a_block_keeps_knows_no_scale_and_no_order(importance, network, factor, random):
    shuffled = importance.copy()
    random.shuffle(shuffled)
    assert retained_share(factor * shuffled, network) == retained_share(importance, network)


@pytest.mark.parametrize(
    ("units", "variation", "share"),
    [(5, 2.0, 0.8), (10, 3.0, 0.7), (17, 4.0, 0.7), (3, 2**0.5, 0.85), (1, 0.0, 0.85)],
)
def test_the_share_falls_where_one_unit_holds_everything(units, variation, share):
    """The coefficient of variation of one unit among n that are worth nothing is the root of n - 1."""
    importance = np.eye(1, units)[0]
    assert importance.std() / importance.mean() == pytest.approx(variation)
    assert retained_share(importance, "transformer") == share


def test_more_is_kept_the_further_an_error_is_carried_and_units_alike_lose_as_many_as_the_share_says():
    assert sorted(CONSERVATIVE, key=CONSERVATIVE.get) == ["transformer", "mixed", "snn", "rnn"]
    for network, share in CONSERVATIVE.items():
        assert 0.8 < retained_share(np.ones(100), network) == share < 1
        assert removable_units(np.ones(100), share) == pytest.approx(100 * (1 - share))


# Without a budget


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from(sorted(CONSERVATIVE)))
def test_without_a_ratio_every_block_loses_what_its_scores_allow(seed, network):
    scores, architecture = table(seed), SHAPE.architecture()
    params = settle(architecture, scores, unfixed(network_type=network), {})
    decision = decide(Scores(architecture, scores, META), params)
    for block, importance in split_blocks(architecture, scores["importance"]):
        share = retained_share(importance, network)
        assert (~decision.plan.keep[block]).sum() == int(removable_units(importance, share))
        assert importance[decision.plan.keep[block]].sum() >= share * importance.sum() * (1 - 1e-9)
    told = summary(architecture, decision)
    assert told["ratio"] == pytest.approx(told["removed"] / SHAPE.decoder)
    assert told["target"] == told["removed"] == removed_parameters(SHAPE, decision.plan)


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(0, 3), st.integers(1, 40), st.integers(1, 7), st.integers(0, 2))
def test_the_ratio_that_comes_out_respects_floors_multiples_and_frozen_layers(seed, groups, channels, multiple, first):
    limits = {"min_groups": groups, "min_channels": channels, "channel_multiple": multiple, "freeze_first": first}
    scores, architecture = table(seed), SHAPE.architecture()
    free = settle(architecture, scores, unfixed(), {}).ratio
    try:
        params = settle(architecture, scores, unfixed(**limits), {})
    except BudgetError as error:
        assert "finds no block that can lose a unit" in str(error)
        return
    assert params.ratio <= free
    plan = decide(Scores(architecture, scores, META), params).plan
    for (layer, part), keep in plan.keep.items():
        assert keep.sum() >= (groups if part == "attention" else channels)
        assert keep.all() or layer >= first
        assert keep.all() or part == "attention" or keep.sum() % multiple == 0


def test_a_given_ratio_stays_and_other_methods_need_one(tmp_path):
    params = unfixed().model_copy(update={"ratio": 0.25, "channel_multiple": 1})
    assert settle(SHAPE.architecture(), table(0), params, {}) is params
    path = write_params(tmp_path / "params.yaml", "m", "t", allocate={"ratio": None, "method": "global"})
    with pytest.raises(
        ParamsError, match=r"ratio: null leaves the ratio to allocate\.method: retention, not to global"
    ):
        load_params(path)
    write_params(path, "m", "t", allocate={"ratio": None, "method": "retention"})
    assert load_params(path).allocate.ratio is None


# With a budget


@settings(max_examples=15)
@given(st.integers(0, 99), st.floats(0.02, 0.3))
def test_a_budget_takes_the_same_multiple_of_what_every_block_may_lose(seed, ratio):
    """No MLP is more than one channel behind the block that has come furthest; a channel is the cheapest step."""
    scores, architecture = table(seed), SHAPE.architecture()
    plan = allocate(architecture, scores, unfixed().model_copy(update={"ratio": ratio}))
    wanted = {
        block: removable_units(importance, retained_share(importance, "transformer"))
        for block, importance in split_blocks(architecture, scores["importance"])
    }
    gone = {block: int((~keep).sum()) for block, keep in plan.keep.items()}
    reached = max(gone[block] / wanted[block] for block in gone)
    for block in gone:
        at_floor = gone[block] + 1 == SHAPE.ffn
        assert block[1] == "attention" or at_floor or (gone[block] + 1) / wanted[block] >= reached * (1 - 1e-9)
    assert 0 <= round(ratio * SHAPE.decoder) - removed_parameters(SHAPE, plan) < SHAPE.channel_cost


def test_negative_scores_have_no_shares_and_are_refused():
    scores = SHAPE.table(np.linspace(-1, 1, len(SHAPE.unit_costs())))
    with pytest.raises(LibpruneError, match=r"retention reads shares .* score\.scaling to none or minmax"):
        allocate(SHAPE.architecture(), scores, Allocate(method="retention"))
