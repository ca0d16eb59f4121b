"""The gradient ratio of the layers, and its verdict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.tables import Columns
from libprune.statistics.gradient_health import MILD, SEVERE, gradient_by_layer, gradient_ratio, verdict
from tests.support.tables import gradient_rows

MEANS = st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=6)


def rows_of(means: list[float], batches: int = 3) -> Columns:
    """Two parameters a layer, one half as large and the other half again as large as the mean of the layer."""
    table = [(i, f * mean) for i, mean in enumerate(means) for f in (0.5, 1.5) for _ in range(batches)]
    layers, values = zip(*table, strict=True)
    return {"layer_idx": np.array(layers), "mean_abs": np.array(values)}


@given(MEANS, st.randoms(use_true_random=False))
def test_the_mean_of_a_layer_is_over_its_parameters_and_batches_in_any_order(means, random):
    rows = rows_of(means)
    order = list(range(len(rows["layer_idx"])))
    random.shuffle(order)
    table = gradient_by_layer({name: values[order] for name, values in rows.items()})
    assert table["layer_idx"].tolist() == list(range(len(means)))
    np.testing.assert_allclose(table["mean_abs"], means)


@given(MEANS, st.sampled_from([1e-6, 8.0]))
def test_the_ratio_is_of_the_largest_to_the_smallest_and_knows_no_factor(means, factor):
    ratio = gradient_ratio(rows_of(means))
    assert ratio == pytest.approx(max(means) / min(means))
    assert gradient_ratio(rows_of([factor * mean for mean in means])) == pytest.approx(ratio)


def test_a_layer_without_any_gradient_makes_the_ratio_infinite():
    rows = gradient_rows(4)
    rows["mean_abs"] = np.where(rows["layer_idx"] == 2, 0.0, rows["mean_abs"])
    assert gradient_ratio(rows) == np.inf
    assert verdict(gradient_ratio(rows)) == "severe vanishing"


def test_the_verdict_changes_at_the_bounds():
    assert [verdict(np.nextafter(bound, 0)) for bound in (MILD, SEVERE)] == ["fine", "mild vanishing"]
    assert [verdict(bound) for bound in (MILD, SEVERE)] == ["mild vanishing", "severe vanishing"]
