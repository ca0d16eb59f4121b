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


def test_the_order_of_the_blocks_in_memory_says_nothing():
    keep = {(layer, part): np.arange(3) < layer + len(part) - 1 for layer in (0, 1) for part in ("a", "mm")}
    one, other = Plan(keep), Plan(dict(reversed(keep.items())))
    assert one.digest == other.digest
    assert one.column.tolist() == other.column.tolist()
    swapped = Plan({block: keep[1 - block[0], block[1]] for block in keep})
    assert swapped.digest != one.digest
    assert Plan({(0, "a"): np.array([True]), (1, "a"): np.array([True, False])}).digest != (
        Plan({(0, "a"): np.array([True, True]), (1, "a"): np.array([False])}).digest
    ), "units of another block"


def test_without_removes_also_these_units_and_leaves_the_plan_as_it_was():
    plan = Plan({(0, "a"): np.array([True, False, True]), (0, "m"): np.array([True])})
    for units, left in ((0, [False, False, True]), (np.array([0, 2]), [False] * 3), (slice(None), [False] * 3)):
        fewer = plan.without((0, "a"), units)
        assert fewer.keep[0, "a"].tolist() == left
        assert fewer.keep[0, "m"].tolist() == [True]
    assert plan.keep[0, "a"].tolist() == [True, False, True]


def test_a_width_is_part_of_the_decision_and_goes_with_it():
    keep = {(0, "a"): np.array([True, True])}
    whole, narrow = Plan(keep), Plan(keep, width=4)
    assert len({whole.digest, narrow.digest, Plan(keep, width=5).digest}) == 3
    assert narrow.without((0, "a"), 1).width == 4
    assert narrow.uniform
