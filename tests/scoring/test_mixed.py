"""Mixed criteria: every part on a scale of 0 to 1, its weight the most that it can count, and their limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.cli.footprint import footprints
from libprune.engine.tables import Columns
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Score
from libprune.pipeline.shards import BINS
from libprune.scoring.criteria import CRITERIA, score_units
from libprune.scoring.mixed import TERMS
from tests.support.models import FAMILIES

AMOUNTS = {
    "weight_stats": {"l2": "magnitude_l2", "variance": "weight_variance"},
    "activation_stats": {name: f"activation_{name}" for name in ("magnitude", "variance", "range")},
    "gradient_flow": {"magnitude": "mask_gradient_abs"},
    "cooperative": {name: f"unit_{name}" for name in ("connection", "centrality", "cooperation")},
}
RATIOS = {
    "weight_stats": {name: f"weight_{name}" for name in ("nonzero", "entropy", "effective_rank")},
    "activation_stats": {"frequency": "activation_frequency", "entropy": "activation_entropy"},
    "gradient_flow": {"stability": "stability", "snr": "snr", "sign_consistency": "sign_consistency"},
    "cooperative": {"uniqueness": "unit_uniqueness"},
}
every_mixture = pytest.mark.parametrize("criterion", TERMS)


def one_block(amounts: list[float], ratio: float = 0.5) -> Columns:
    """A layer of MLP channels with the given amounts in every column that is one, and one ratio in all others."""
    units, values = len(amounts), np.array(amounts, dtype=float)
    table: Columns = {
        "layer_idx": np.zeros(units, dtype=int),
        "group_type": np.array(["mlp"] * units, dtype=object),
        "group_idx": np.arange(units),
        "cost": np.full(units, 4),
    }
    table |= {column: values for names in AMOUNTS.values() for column in names.values()}
    table |= {column: np.full(units, ratio) for names in RATIOS.values() for column in names.values()}
    return table | {"magnitude_l2": values**2, "activation_entropy": np.full(units, ratio * np.log(BINS))}


def importance(table: Columns, criterion: str, **settings: object) -> np.ndarray:
    return score_units(table, Score.model_validate({"criterion": criterion, **settings}))["importance"]


@every_mixture
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=8), st.floats(0, 1))
def test_every_component_is_between_nothing_and_its_weight(criterion, amounts, ratio):
    scores = score_units(one_block(amounts, ratio), Score(criterion=criterion))
    weights = getattr(Score(), criterion).model_dump()
    assert sum(weights.values()) == pytest.approx(1)
    assert TERMS[criterion] == tuple(f"{criterion}_{part}" for part in weights)
    for part, weight in weights.items():
        component = scores[f"{criterion}_{part}"]
        assert ((component >= 0) & (component <= weight * (1 + 1e-12))).all()


@every_mixture
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_a_layer_counts_for_nothing(criterion, factor):
    table = one_block([1.0, 2.0, 5.0, 7.0])
    louder = table | {column: factor * table[column] for column in AMOUNTS[criterion].values()}
    np.testing.assert_allclose(importance(louder, criterion), importance(table, criterion))


@every_mixture
def test_a_unit_far_above_all_others_does_not_press_them_together(criterion):
    calm, wild = (importance(one_block([1.0, 2.0, 4.0, last]), criterion) for last in (8.0, 8e9))
    np.testing.assert_allclose(wild[:3], calm[:3])
    assert (np.diff(wild) > 0).all()


@every_mixture
def test_nothing_is_worth_nothing_and_a_typical_unit_half_of_each_amount(criterion):
    dead = importance(one_block([0.0, 0.0, 0.0], ratio=0.0), criterion)
    assert dead.tolist() == [0, 0, 0]
    weights = getattr(Score(), criterion).model_dump()
    half = sum(weights[part] for part in AMOUNTS[criterion]) / 2
    for amounts in ([3.0], [3.0, 3.0, 3.0]):
        np.testing.assert_allclose(importance(one_block(amounts, ratio=0.0), criterion), half)
    mixed = importance(one_block([0.0, 1.0, 2.0], ratio=0.0), criterion)
    assert mixed[0] == 0
    assert mixed[1] == pytest.approx(half)


@every_mixture
def test_where_most_units_have_nothing_any_amount_counts_in_full(criterion):
    found = importance(one_block([0.0, 0.0, 1e-9], ratio=0.0), criterion)
    weights = getattr(Score(), criterion).model_dump()
    assert found[:2].tolist() == [0, 0]
    assert found[2] == pytest.approx(sum(weights[part] for part in AMOUNTS[criterion]))


@pytest.mark.parametrize("term", [(name, part) for name in TERMS for part in AMOUNTS[name] | RATIOS[name]])
def test_a_part_with_all_the_weight_ranks_by_its_column_alone(term):
    criterion, part = term
    column = (AMOUNTS[criterion] | RATIOS[criterion])[part]
    rng = np.random.default_rng(0)
    table = {name: rng.permutation(20) / 20.0 if v.dtype == float else v for name, v in one_block([1.0] * 20).items()}
    weights = {name: float(name == part) for name in getattr(Score(), criterion).model_dump()}
    found = importance(table, criterion, **{criterion: weights})
    np.testing.assert_array_equal(np.argsort(found), np.argsort(table[column]))
    assert np.ptp(found) > 0


def test_an_snr_without_deviation_is_bounded():
    """Where all sequences have the same gradient, the gradients stage gives a ratio near the largest number."""
    table = one_block([1.0, 1.0]) | {"snr": np.array([1e300, 1.0])}
    found = score_units(table, Score(criterion="gradient_flow"))["gradient_flow_snr"]
    np.testing.assert_allclose(found, [0.2, 0.1])


@every_mixture
def test_the_table_of_scores_is_predicted_with_all_components(criterion, monkeypatch):
    from libprune.cli.footprint import Table
    from libprune.engine.describe import describe

    sections = {"prepare": {"model": "m"}, "tokenize": {"text": "t"}, "score": {"criterion": criterion}}
    made: list[Table] = []
    monkeypatch.setattr(Table, "nbytes", property(lambda self: made.append(self) or 0))
    footprints(describe(FAMILIES["llama"](0)), Params.model_validate(sections), stored=FAMILIES["llama"](0).dtype)
    columns = len(score_units(one_block([1.0, 2.0]), Score(criterion=criterion)))
    assert columns in {table.columns for table in made}
    assert set(TERMS[criterion]) == set(CRITERIA[criterion].terms or CRITERIA[criterion].orders)
