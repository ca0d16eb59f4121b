"""Results of comparisons, gathered from rows, lock files and a cache that are made up."""

import numpy as np
import pytest

from libprune.engine.errors import LibpruneError
from libprune.experiments.results import NOT_MEASURED, correlations_by_part, gather_results
from libprune.experiments.sentences import explain_results
from libprune.experiments.summary import summarize
from libprune.experiments.table import tabulate_settings
from libprune.scoring.ranks import spearman
from tests.support.compared import UNITS, comparison, experiment, lock, store, unit_table


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
