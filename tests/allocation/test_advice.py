"""What is said of gradients and layers."""

import json

import numpy as np
import pytest
from hypothesis import given

from libprune.allocation.advice import Fixed, advise, over_pruned, shares_lost
from libprune.engine import cost
from libprune.engine.plan import Plan
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.sections import Allocate
from tests.support.models import random_plan
from tests.support.shapes import Shape, shapes

WIDE = Shape(layers=10, ffn=30)
"""Two thirds of a layer are its channels."""


def told(ratio: float, after: float | None = None, plan: Plan | None = None, order: int | None = 1, **settings) -> dict:
    architecture = WIDE.architecture()
    fix, orders = settings.pop("fix", "none"), {} if order is None else {"component": order}
    scores = Scores(architecture, {}, {"gradient_orders": orders})
    fixed = Fixed(scores, fix, ratio, ratio if after is None else after)
    return advise(fixed, plan or Plan.dense(architecture), Allocate(**settings))


def without_channels(lost: dict[int, int]) -> Plan:
    keep = dict(Plan.dense(WIDE.architecture()).keep)
    for layer, count in lost.items():
        keep[layer, "mlp"] = np.arange(WIDE.ffn) >= count
    return Plan(keep)


# Gradients


def test_vanishing_gradients_are_named_with_what_to_try():
    advice = ["gradient ratio 2,300: severe vanishing; try allocate.gradient_fix=auto"]
    assert told(2300.0, method="global")["advice"] == told(2300.0, method="hgsp")["advice"] == advice
    assert "mild vanishing" in told(300.0, method="hgsp")["advice"][0]
    assert told(99.0, method="hgsp")["advice"] == []


def test_nothing_is_advised_where_gradients_play_no_part():
    assert told(2300.0, method="uniform")["advice"] == []
    assert told(2300.0, method="global", order=None)["advice"] == []
    assert told(2300.0, method="global", order=0)["advice"] == []
    assert told(2300.0, 5.0, method="global", fix="adaptive")["advice"] == []


def test_a_fix_that_harms_or_changes_little_is_named():
    (worse,) = told(8.0, 12.5, method="hgsp", fix="depth")["advice"]
    assert "from 8.0 to 12.5" in worse
    (little,) = told(2300.0, 5.0, method="uniform", fix="adaptive")["advice"]
    assert "changes little" in little


def test_an_infinite_ratio_can_be_written_as_json():
    found = json.loads(json.dumps(told(float("inf"), method="global"), allow_nan=False))
    assert (found["gradient_ratio"], found["gradient_ratio_after_fix"], found["verdict"]) == (
        None,
        None,
        "severe vanishing",
    )


# Layers


@given(shapes())
def test_the_shares_lost_add_up_to_what_the_plan_removes(shape):
    architecture = shape.architecture()
    plan = random_plan(architecture, "per_layer")
    shares = shares_lost(architecture, plan)
    removed = cost.prices(architecture, "parameters").removed(plan)
    assert shares.mean() == pytest.approx(removed / architecture.decoder_parameters)
    assert ((shares >= 0) & (shares < 1)).all()


def test_layers_that_lose_too_much_are_named_the_first_ones_apart():
    found = told(1.0, plan=without_channels({0: 30, 7: 30, 8: 5}))
    assert found["over_pruned_layers"] == [0, 7]
    named, early = found["advice"]
    assert named.endswith("clearly more than the others: 0 (65 %), 7 (65 %)")
    assert "1 of the first 5 layers" in early
    assert "allocate.freeze_first=1" in early


def test_many_such_layers_are_too_many():
    two, three = (told(1.0, plan=without_channels(dict.fromkeys(range(6, 6 + n), 30)))["advice"] for n in (2, 3))
    assert len(two) == 1
    assert "more than 20 % of the layers" in three[1]


def test_where_all_layers_lose_half_none_stands_out():
    assert over_pruned(np.full(10, 0.52)) == []
    assert over_pruned(np.array([0.52] * 9 + [0.7])) == [9]
    lost = np.array([0.0] * 5 + [0.6] * 5)
    assert over_pruned(lost) == [5, 6, 7, 8, 9]
    assert over_pruned(lost, freeze_first=5) == over_pruned(lost[::-1].copy(), freeze_last=5) == []


def test_layers_that_were_removed_on_purpose_are_not_over_pruned():
    assert over_pruned(np.array([1.0, 1.0, 0.2, 0.2, 0.7])) == [4]


def test_freezing_is_advised_only_where_most_layers_stay_free():
    (_, early) = told(1.0, plan=without_channels({4: 30}))["advice"]
    assert "freeze_first" not in early
