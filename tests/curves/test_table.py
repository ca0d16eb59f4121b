"""Tables and sentences of a curve."""

import csv
import io
import math
from dataclasses import replace

import pytest

from libprune.curves.table import (
    CONTEXT,
    curve_csv,
    explain_bends,
    measured_bend,
    memory,
    predicted_bend,
    tabulate_measured,
    tabulate_plans,
)
from libprune.experiments.dvc_experiments import DISTANCE
from tests.support.curved import drawn, made_up, measured

CORNER = {0.1: math.exp(0.01), 0.2: math.exp(0.02), 0.3: math.exp(0.03), 0.4: math.exp(0.23), 0.5: math.exp(0.43)}
"""Perplexity ratios whose logarithm rises by 0.01 a tenth, and by 0.2 beyond 30 %."""


def cells(table) -> list[dict[str, str]]:
    rows, header = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_plans_are_a_table_with_the_dense_model_first_and_no_empty_columns():
    curve = made_up((0.25, 0.5))
    dense, quarter, half = cells(tabulate_plans(curve))
    assert (dense["ratio"], quarter["ratio"], half["removed"]) == ("dense", "25 %", "50.00 %")
    assert quarter["divergence"] == f"{4 * 0.25**4:.3g}"
    assert {"active, M", "states, B", "pass, ms"}.isdisjoint(dense)
    assert "divergence" not in cells(tabulate_plans(made_up(predicts=False)))[0]
    times = [replace(one, seconds=0.01) for one in curve.planned]
    timed = replace(curve, dense=replace(curve.dense, seconds=0.02), planned=tuple(times))
    assert [row["pass, ms"] for row in cells(tabulate_plans(timed))] == ["20.0", "10.0", "10.0"]


def test_measured_models_have_intervals_speeds_and_a_recovery_column_only_if_one_was_trained():
    one = drawn({0.2: 1.2})
    (row,) = cells(tabulate_measured(one))
    assert row["ratio"] == "20 %"
    assert row["perplexity"].startswith("× 1.200 (1.179 to 1.221)")
    assert row["prefill"] == "× 1.20 (1.11 to 1.29)"
    assert "recovered" not in row
    trained = replace(one, measured={0.2: measured(0.2, 1.2, after=1.1)})
    assert cells(tabulate_measured(trained))[0]["recovered"].startswith("× 1.100 (1.0")
    unknown = replace(one, measured={0.2: replace(one.measured[0.2], evaluation=None)})
    (row,) = cells(tabulate_measured(unknown))
    assert row["perplexity"] == "× 1.200 ± 0.010"
    assert "prefill" not in row


def test_the_file_of_figures_has_a_row_for_every_ratio_unrounded():
    curve = made_up((0.1, 0.2), skipped={0.95: "=too much"})
    dense, first, second, skipped = csv.DictReader(io.StringIO(curve_csv(drawn({0.2: 1.23456789}, curve))))
    assert (dense["ratio"], dense["total_parameters"]) == ("0.0", str(curve.dense.size.total))
    assert first["perplexity_ratio"] == ""
    assert float(first["predicted_divergence"]) == 4 * 0.1**4
    assert second["perplexity_ratio"] == "1.23456789"
    assert float(second["perplexity_ratio_low"]) < 1.23456789 < float(second["perplexity_ratio_high"])
    assert (second["prefill_slowest"], second["prefill_fastest"]) == ("1.11", "1.29")
    assert int(second["memory_bytes"]) == int(second["bytes"]) + CONTEXT * int(second["cache_bytes"])
    assert (skipped["ratio"], skipped["skipped"], skipped["bytes"]) == ("0.95", "'=too much", "")


def test_memory_counts_weights_cache_and_states():
    one = replace(made_up().planned[0], weights=7, cache=2, state=5)
    assert memory(one) == 7 + 2 * CONTEXT + 5


def test_a_corner_of_the_measured_curve_is_told_with_both_slopes():
    made = drawn(CORNER, error=1e-4)
    bend, points = measured_bend(made)
    assert points[bend.place].ratio == 0.3
    _, told = explain_bends(made)
    assert told == (
        "The measured curve bends at 30 %: up to there a tenth of the decoder parameters costs 0.01 nats a token on "
        "average, and from there to 50 % 0.2."
    )


def test_a_corner_within_the_noise_or_none_is_told_so():
    assert explain_bends(drawn(CORNER, error=0.2))[1] == "The measured curve has no clear bend up to 50 %."
    assert explain_bends(drawn({0.1: 1.1})) == explain_bends(drawn({})), "a single model is no curve"
    assert explain_bends(drawn({}, made_up(predicts=False))) == []
    assert predicted_bend(made_up(predicts=False)) is None


def test_trained_models_are_judged_after_training_if_all_were():
    after = {ratio: measured(ratio, 9.0, 1e-4, after=value) for ratio, value in CORNER.items()}
    made = replace(drawn({}), measured=after)
    assert made.trained
    bend, points = measured_bend(made)
    assert points[bend.place].ratio == 0.3
    some = replace(made, measured=after | {0.1: measured(0.1, 9.0)})
    assert not some.trained
    assert [one.ratio for one in some.figures] == [9.0] * len(CORNER)


def test_embeddings_bend_by_their_distance():
    found = {
        ratio: replace(one, experiment=replace(one.experiment, measure=DISTANCE))
        for ratio, value in {0.1: 0.01, 0.2: 0.02, 0.3: 0.2}.items()
        for one in [measured(ratio, value, 1e-4)]
    }
    made = replace(drawn({}, made_up((0.1, 0.2, 0.3))), measured=found)
    bend, points = measured_bend(made)
    assert (points[bend.place].ratio, bend.before) == (0.2, pytest.approx(0.1))
    low, high = found[0.1].interval(0.01, 1e-4)
    assert low == pytest.approx(0.01 - (high - 0.01))
    assert "costs 0.01 of 1 - cosine on average" in explain_bends(made)[1]
