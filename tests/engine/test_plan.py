"""Plans: which layers are left, and whether these are alike."""

import numpy as np

from libprune.engine.plan import Plan


def test_a_plan_is_uniform_only_if_the_layers_left_are_alike_and_whole():
    def plan(*kept: tuple[int, int]) -> Plan:
        counts = {(layer, part): n for layer, pair in enumerate(kept) for part, n in zip("am", pair, strict=True)}
        return Plan({block: np.arange(3) < n for block, n in counts.items()})

    assert plan((2, 1), (2, 1)).uniform
    assert plan((2, 1), (0, 0), (2, 1)).uniform
    assert plan((2, 1), (0, 0), (2, 1)).layers == (0, 2)
    assert not plan((2, 1), (2, 2)).uniform
    assert not plan((2, 0), (2, 0)).uniform
    assert not plan((0, 0), (0, 0)).uniform
    assert plan((2, 0), (0, 0)).layers == (0,)


def test_a_digest_names_the_decision_and_not_the_record():
    keep = {(0, "a"): np.array([True, False]), (0, "m"): np.array([True])}
    assert Plan(keep).digest == Plan({block: units.copy() for block, units in keep.items()}).digest
    assert Plan(keep).digest != Plan(keep | {(0, "a"): np.array([False, True])}).digest


def test_without_removes_also_these_units_and_leaves_the_plan_as_it_was():
    plan = Plan({(0, "a"): np.array([True, False, True]), (0, "m"): np.array([True])})
    for units, left in ((0, [False, False, True]), (np.array([0, 2]), [False] * 3), (slice(None), [False] * 3)):
        fewer = plan.without((0, "a"), units)
        assert fewer.keep[0, "a"].tolist() == left
        assert fewer.keep[0, "m"].tolist() == [True]
    assert plan.keep[0, "a"].tolist() == [True, False, True]
