"""Results and statistics of comparisons: from rows, lock files and a cache that are made up."""

import csv
import io
import math
from itertools import combinations
from statistics import geometric_mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.experiments.agreement import jaccard, ratio_interval
from libprune.experiments.results import NOT_MEASURED, correlations_by_part, gather_results
from libprune.experiments.sentences import explain_results
from libprune.experiments.summary import (
    Summary,
    compare_settings,
    overlap_by_chance,
    overlap_matrix,
    reference_of,
    summarize,
)
from libprune.experiments.table import NOTHING, overlaps_csv, runs_csv, settings_csv, tabulate_settings
from libprune.scoring.ranks import spearman
from tests.support.compared import UNITS, comparison, experiment, gathered, lock, store, unit_table

RATIOS = {"good": [1.20, 1.22, 1.21], "same": [1.205, 1.215, 1.21], "bad": [2.0, 2.3, 2.1]}


def kept_sets(seed: int = 0) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {name: [rng.random(UNITS) < 0.8 for _ in values] for name, values in RATIOS.items()}


def test_settings_are_listed_by_the_geometric_mean_of_their_ratios(tmp_path):
    found = summarize(gathered(tmp_path, RATIOS))
    assert [one.name for one in found] == sorted(RATIOS, key=lambda name: geometric_mean(RATIOS[name]))
    for one in found:
        assert one.ratio.mean == pytest.approx(geometric_mean(RATIOS[one.name]))
        assert one.ratio.low < one.ratio.mean < one.ratio.high


def test_overlaps_are_paired_by_seed_and_the_diagonal_is_between_seeds(tmp_path):
    kept = kept_sets()
    data = gathered(tmp_path, RATIOS, kept)
    found = summarize(data)
    matrix = overlap_matrix(data, found)
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            sets, others = kept[one.name], kept[other.name]
            pairs = combinations(sets, 2) if i == j else zip(sets, others, strict=True)
            assert matrix[i, j] == pytest.approx(np.mean([jaccard(*pair) for pair in pairs]))
    share = np.mean([one.mean() for sets in kept.values() for one in sets])
    assert overlap_by_chance(data) == pytest.approx(share / (2 - share))


def test_differences_are_sorted_by_what_noise_they_exceed(tmp_path):
    good, same, bad = ({one.name: one for one in summarize(gathered(tmp_path, RATIOS))}[name] for name in RATIOS)
    assert compare_settings(bad, good).kind == "clear"
    assert compare_settings(same, good).kind == "none"
    steady = {"a": [1.200, 1.220, 1.210], "b": [1.205, 1.225, 1.215]}
    found = summarize(gathered(tmp_path, steady))
    assert (
        compare_settings(found[1], found[0]).kind == "seeds"
    )  # the same with every seed, but small beside the windows
    assert compare_settings(good, bad).factor.mean == pytest.approx(1 / compare_settings(bad, good).factor.mean)


@given(st.floats(1.01, 3), st.floats(0.001, 0.2))
def test_with_one_seed_the_windows_alone_decide(ratio, error):
    one, other = (
        Summary("a", {0: value}, {0: error}, ratio_interval([value]), 0.2, {0: 20.0}, {}, math.nan, None, None)
        for value in (1.0, ratio)
    )
    clear = math.log(ratio) > 2 * math.hypot(error, error / ratio)
    assert compare_settings(other, one).kind == ("clear" if clear else "none")


def test_settings_without_a_common_seed_are_not_compared(tmp_path):
    data = gathered(tmp_path, RATIOS)
    del data.results["good"][0], data.results["good"][1], data.results["bad"][2]
    good, bad = ({one.name: one for one in summarize(data)}[name] for name in ("good", "bad"))
    assert compare_settings(good, bad) is None
    assert any("Without a seed in common: bad." in text for text in explain_results(data, [good, bad]))


def test_the_reference_is_the_named_one_or_the_best(tmp_path):
    named = gathered(tmp_path, RATIOS, reference="bad")
    assert reference_of(named, summarize(named)).name == "bad"
    data = gathered(tmp_path, RATIOS)
    assert reference_of(data, summarize(data)).ratio.mean == min(one.ratio.mean for one in summarize(data))


def test_results_are_found_by_their_params_and_the_missing_are_named(tmp_path):
    made = comparison(tmp_path)
    runs = list(made.runs())
    data = gather_results(made, [experiment(runs[0], 1.2)], {runs[1].experiment: "failed"}, lambda _: None, None, {})
    assert list(data.results) == ["fisher"]
    assert data.missing[runs[1].experiment] == "failed"
    assert set(data.missing.values()) == {"failed", "not run"}
    assert any(
        f"Without results: {runs[1].experiment} (failed);" in text for text in explain_results(data, summarize(data))
    )
    with pytest.raises(LibpruneError, match=r"no experiment of HEAD has results .*run `libprune compare run`"):
        gather_results(made, [], {}, lambda _: None, None, {})


def test_correlations_are_spearmans_within_each_part(tmp_path):
    rng = np.random.default_rng(0)
    scores = unit_table(importance=rng.random(UNITS))
    rows = np.sort(rng.permutation(UNITS)[:20])
    measured = {name: values[rows] for name, values in unit_table(loss_increase=rng.random(UNITS)).items()}
    found = correlations_by_part(scores, measured)
    assert set(found) == {"attention", "mlp"}
    for part, value in found.items():
        here = measured["group_type"] == part
        assert value == spearman(scores["importance"][rows][here], measured["loss_increase"][here])


def one_run(folder, tables: dict[str, np.ndarray], cache=True):
    """A comparison of one run whose tables are in the cache."""
    made = comparison(folder, settings={"a": {}}, seeds=[0])
    text = lock(**{name: store(folder, columns) for name, columns in tables.items()})
    return gather_results(made, [experiment(next(made.runs()), 1.2)], {}, lambda _: text, folder if cache else None, {})


def test_tables_come_out_of_the_cache_by_the_hashes_of_the_lock(tmp_path):
    keep, importance = np.arange(UNITS) % 5 > 0, np.arange(UNITS) * 1.0
    measured = unit_table(loss_increase=importance**2)
    data = one_run(
        tmp_path, {"plan": unit_table(keep=keep), "scores": unit_table(importance=importance), "ablation": measured}
    )
    result = data.results["a"][0]
    np.testing.assert_array_equal(result.kept, keep)
    assert result.correlations == pytest.approx({"attention": 1, "mlp": 1})
    assert data.remarks == ()


def test_units_that_were_not_measured_are_said_with_what_to_do(tmp_path):
    scores = unit_table(importance=np.arange(UNITS) * 1.0)
    empty = {name: values[:0] for name, values in unit_table(loss_increase=np.zeros(UNITS)).items()}
    data = one_run(tmp_path, {"plan": unit_table(keep=np.ones(UNITS, bool)), "scores": scores, "ablation": empty})
    assert data.remarks == (NOT_MEASURED,)
    assert data.results["a"][0].correlations == {}


def test_what_the_cache_has_lost_is_said_and_its_columns_are_left_out(tmp_path):
    tables = {"plan": unit_table(keep=np.ones(UNITS, bool))}
    data = one_run(tmp_path, tables, cache=False)
    assert any("artifacts/plan.parquet of some runs is no longer in DVC's cache" in text for text in data.remarks)
    assert any("artifacts/scores.parquet of some runs is in no dvc.lock" in text for text in data.remarks)
    _, header = tabulate_settings(data, summarize(data))
    assert not [name for name in header if name.startswith(("kept", "ranks", "collecting", "peak"))]


def test_every_table_has_every_setting_and_run(tmp_path):
    data = gathered(tmp_path, RATIOS, kept_sets(), seconds={"good": 8.0, "bad": 4.0}, reference="same")
    found = summarize(data)
    cells, header = tabulate_settings(data, found)
    assert [line[0] for line in cells] == [one.name for one in found]
    assert all(len(line) == len(header) for line in cells)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    assert by_name["same"]["to same"] == by_name["same"]["pruning, s"] == NOTHING
    assert (by_name["good"]["collecting, s"], by_name["good"]["pruning, s"]) == ("2.0", "6.0")
    settings = list(csv.DictReader(io.StringIO(settings_csv(data, found))))
    assert [float(row["perplexity_ratio"]) for row in settings] == [one.ratio.mean for one in found]
    assert [row["pruning_seconds"] for row in settings if row["setting"] == "same"] == [""]
    runs = list(csv.DictReader(io.StringIO(runs_csv(data))))
    assert {(row["setting"], float(row["perplexity_ratio"])) for row in runs} == {
        (name, ratio) for name, ratios in RATIOS.items() for ratio in ratios
    }
    pairs = list(csv.DictReader(io.StringIO(overlaps_csv(data, found))))
    assert len(pairs) == 6
    assert all(0 <= float(row["overlap"]) <= 1 for row in pairs)


def test_the_words_name_every_setting_once_by_what_it_exceeds(tmp_path):
    data = gathered(tmp_path, RATIOS, kept_sets())
    verdict, *others = explain_results(data, summarize(data))
    best = summarize(data)[0].name
    rest = "same" if best == "good" else "good"
    assert f"is that of {best}: × 1.210 (" in verdict
    assert f"Beside {best}, with the factor between the two perplexities. Larger than the noise: bad × 1.76" in verdict
    assert f"Not larger than the noise: {rest} × 1.000 (" in verdict
    assert "with 3 seeds it reaches 4.3 standard errors" in others[0]
    assert "in part the luckiest" in others[0]
    assert any("independent choices would by 0." in text for text in others)


def test_one_seed_is_said_to_tell_nothing_of_others(tmp_path):
    data = gathered(tmp_path, {"a": [1.2], "b": [1.9]}, reference="a")
    text = " ".join(explain_results(data, summarize(data)))
    assert "With one seed nothing is known of what another calibration text would do." in text
    assert "luckiest" not in text
    assert "Student" not in text


def test_other_windows_and_other_sizes_are_pointed_out(tmp_path):
    made = comparison(tmp_path)
    rows = [experiment(run, 1.2, removed=0.2 + 0.1 * i, dense=20.0 + i) for i, run in enumerate(made.runs())]
    data = gather_results(made, rows, {}, lambda _: None, None, {})
    text = " ".join(explain_results(data, summarize(data)))
    assert "compare only roughly" in text
    assert "% of the decoder: a larger model" in text
