"""Sweep tables: every row and setting is in them, and nothing is said that noise could say."""

import csv
import io
from math import hypot

from hypothesis import given
from hypothesis import strategies as st

from libprune.experiments.dvc_experiments import Experiment
from libprune.experiments.sweep_table import (
    csv_text,
    differing,
    markdown_text,
    params_diff,
    remarks,
    setting,
    tabulate_experiments,
)
from tests.support.swept import row

any_params = st.lists(
    st.dictionaries(st.sampled_from(["preset", "a.x", "b.x", "a.y", "b.z"]), st.sampled_from([1, 2.5, "p", None, [1]])),
    min_size=1,
    max_size=5,
)


def rows_of(found: list[dict[str, object]]) -> list[Experiment]:
    return [Experiment((f"e{i}",), one, 1.0 + i, 0.1, 20.0, 0.2, 1.1, None) for i, one in enumerate(found)]


@given(any_params)
def test_columns_are_the_params_that_differ_under_names_that_no_other_param_has(found):
    rows = rows_of(found)
    names = differing(rows)
    every = {name for one in rows for name in one.params}
    assert set(names) == {name for name in every if len({setting(one, name) for one in rows}) > 1}
    for name, short in names.items():
        assert [other for other in every if other == short or other.endswith(f".{short}")] == [name]


@given(any_params)
def test_every_table_has_every_row_and_setting(found):
    rows = rows_of(found)
    cells, header = tabulate_experiments(rows)
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    for one, line, record in zip(rows, cells, read, strict=True):
        assert len(line) == len(header)
        assert line[0] == record["experiment"] == one.label
        assert float(record["perplexity_ratio"]) == one.ratio
        assert [record[name] for name in differing(rows)] == [setting(one, name) for name in differing(rows)]
    assert all(f"| {one.label} |" in markdown_text(rows, {}) for one in rows)


def test_a_settings_pipe_does_not_break_the_markdown_table():
    text = markdown_text([row("a", slice__repair="x|y"), row("b", slice__repair="z")], {})
    assert r"x\|y" in text


estimates = st.tuples(st.floats(1, 2), st.floats(0.001, 0.2))


@given(st.lists(estimates, min_size=2, max_size=6).map(sorted))
def test_rows_are_called_worse_exactly_beyond_two_standard_errors_of_the_difference(found):
    rows = [row(f"e{i}", *estimate) for i, estimate in enumerate(found)]
    (best, least), *others = found
    worse = [f"e{i}" for i, (value, se) in enumerate(others, 1) if value - best > 2 * hypot(se, least)]
    said = " ".join(remarks(rows, {}))
    assert (f"Worse than e0 by more than two standard errors of the difference: {', '.join(worse)}." in said) == bool(
        worse
    )
    assert ("Within two standard errors of e0" in said) == (len(worse) < len(others))
    assert "as if the two results were independent" in said


def test_results_on_other_windows_are_not_judged_by_the_noise():
    said = remarks([row("a"), row("b", 1.9, dense=20.0001), row("c", 1.9, dense=21.0)], {})
    assert "Worse than a by more than two standard errors of the difference: b." in said
    assert any(line.startswith("Measured on other windows than a,") and line.endswith(": c.") for line in said)


def test_different_sizes_are_pointed_out():
    small = Experiment(("b",), {}, 1.3, 0.01, 20.0, removed=0.4, prefill=1.1, size=1)
    assert "between 20.0 and 40.0 %" in " ".join(remarks([row("a"), small], {}))
    assert "of the decoder" not in " ".join(remarks([row("a"), row("b")], {}))


def test_the_command_names_the_best_two_that_differ_in_params():
    again = Experiment(("again", "workspace"), {"s.x": 1}, 1.3, 0.01, 20.0, 0.2, 1.1, None)
    assert params_diff([row("best", s__x=1), again, row("next", s__x=2)]) == "dvc params diff best next"
    assert params_diff([row("best", s__x=1), again]) is None


def test_the_figures_before_and_after_recovery_have_columns_of_their_own():
    rows = [row("a", 1.3, after=1.1), row("b", 1.5)]
    cells, header = tabulate_experiments(rows)
    first, second = (dict(zip(header, line, strict=True)) for line in cells)
    assert header.index("recovered") == header.index("perplexity") + 1
    assert (first["perplexity"], first["recovered"]) == ("× 1.300 ± 0.010", "× 1.100 ± 0.005")
    assert first["trained"] == "40,960 tokens, 113,274 parameters, 90 s"
    assert (second["perplexity"], second["recovered"], second["trained"]) == ("× 1.500 ± 0.010", "–", "–")
    one, other = csv.DictReader(io.StringIO(csv_text(rows)))
    assert (float(one["perplexity_ratio"]), float(one["recovered_ratio"])) == (1.3, 1.1)
    assert (float(one["recovered_tokens"]), float(one["recovered_trained_parameters"])) == (40_960, 113_274)
    assert {value for name, value in other.items() if name.startswith("recovered")} == {""}


def test_without_recovery_there_is_no_column_and_no_word_of_it():
    rows = [row("a", 1.3), row("b", 1.5)]
    assert not {"recovered", "trained"} & set(tabulate_experiments(rows)[1])
    assert "recover" not in csv_text(rows) + markdown_text(rows, {})


def test_rows_are_judged_by_the_figure_that_all_of_them_have():
    """What is worse before recovery is not after it, and the other way round."""
    every = [row("a", 1.9, after=1.1), row("b", 1.3, after=1.102), row("c", 1.3, after=1.5)]
    said = remarks(every, {})
    assert said[0] == "The rows are ordered and judged by the perplexity after recovery."
    assert "Worse than a by more than two standard errors of the difference: c." in said
    assert "Within two standard errors of a: b." in said
    said = remarks([row("b", 1.3, after=1.2), row("a", 1.9, after=1.1), row("c", 1.305)], {})
    assert said[0].startswith("The rows are ordered and judged by the perplexity before recovery, since not all")
    assert "Worse than b by more than two standard errors of the difference: a." in said
    assert "Within two standard errors of b: c." in said
