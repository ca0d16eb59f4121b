"""Experiments: only results that belong to their settings become rows, and nothing is said that noise could say.

`data/exp_show.json` was written by `dvc exp show --json` of DVC 3.67 in a project of the tiny model, with `magnitude`
applied to the workspace, `deep` running, `waiting` queued and `broken` failed; inputs, processes and
some params are taken out of it.
"""

import copy
import csv
import io
import json
import sys
from math import hypot
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.experiments.dvc_experiments import Experiment, gather, gather_comparable, outdated
from libprune.experiments.sweep_picture import COLOURS, PANELS, draw_sweep, write_picture
from libprune.experiments.sweep_table import (
    csv_text,
    differing,
    markdown_text,
    params_diff,
    remarks,
    setting,
    tabulate_experiments,
)

RECORDED = json.loads((Path(__file__).parents[1] / "support/data/exp_show.json").read_text())


def no_lock(revision: str) -> None:
    """Of a project whose dvc.lock is not in git."""


def row(name: str, ratio: float = 1.2, error: float = 0.01, dense: float = 20.0, **params: object) -> Experiment:
    named = {key.replace("__", "."): value for key, value in params.items()}
    return Experiment((name,), named, ratio, error, dense, removed=0.2, prefill=1.1, size=1_000_000)


def swept(numbers: int, words: int = 0) -> list[Experiment]:
    """Three rows that differ in so many numeric and so many named params."""
    return [
        row(
            f"e{i}",
            1 + 0.1 * i,
            **{f"n__{j}": i + j for j in range(numbers)},
            **{f"w__{j}": "abc"[i] for j in range(words)},
        )
        for i in range(3)
    ]


def test_recorded_experiments_become_rows_in_the_order_of_perplexity():
    rows, _ = gather(RECORDED, no_lock)
    assert [one.label for one in rows] == ["magnitude = workspace", "master", "unwed-bate"]
    assert [one.params["allocate.ratio"] for one in rows] == [0.3, 0.2, 0.3]
    assert rows[0].params["preset"] == "balanced"
    assert not any(one.proved for one in rows)
    assert any(line.startswith("Without a dvc.lock") for line in remarks(rows, {}))
    master = RECORDED[1]["data"]
    assert rows[1].ratio == master["metrics"]["metrics/evaluation.json"]["data"]["perplexity_ratio"]["value"]
    assert rows[1].size == master["outs"]["artifacts/pruned"]["size"]


def test_metrics_that_an_experiment_started_from_are_not_its_result():
    """DVC shows them for a running and for a failed experiment."""
    states = {one["name"]: one["revs"][0] for one in RECORDED[1]["experiments"]}
    assert "metrics/evaluation.json" in states["deep"]["data"]["metrics"]
    assert "metrics/evaluation.json" in states["broken"]["data"]["metrics"]
    _, left_out = gather(RECORDED, no_lock)
    assert left_out == {"deep": "running", "waiting": "queued", "broken": "failed"}
    assert "Not in the table: deep (running); waiting (queued); broken (failed)." in remarks([row("a")], left_out)


def test_results_that_are_older_than_their_params_are_left_out():
    edited = copy.deepcopy(RECORDED)
    edited[0]["data"]["params"]["params.yaml"]["data"]["allocate"]["ratio"] = 0.35
    lock = lock_text({"allocate.ratio": 0.3})
    rows, left_out = gather(edited, lambda revision: lock if revision == "workspace" else None)
    assert "magnitude" in [one.label for one in rows]
    assert left_out["workspace"] == "allocate last ran with allocate.ratio 0.3, not 0.35"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (("metrics", "metrics/evaluation.json"), "no results in metrics/evaluation.json"),
        (("metrics", "metrics/evaluation.json", "data", "speed"), "no results in metrics/evaluation.json"),
    ],
)
def test_a_commit_without_results_is_named(where, reason):
    shown = copy.deepcopy(RECORDED)
    inner = shown[1]["data"]
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    assert gather(shown, no_lock)[1]["master"] == reason


def test_a_perplexity_that_is_not_finite_is_named():
    shown = copy.deepcopy(RECORDED)
    shown[1]["data"]["metrics"]["metrics/evaluation.json"]["data"]["perplexity_ratio"]["value"] = float("inf")
    assert gather(shown, no_lock)[1]["master"] == "perplexity inf"


def test_what_dvc_cannot_read_is_named_with_its_words():
    shown = [*RECORDED, {"rev": "0123456789", "name": None, "data": None, "error": {"msg": "no dvc.yaml"}}]
    shown[-1]["experiments"] = None
    assert gather(shown, no_lock)[1]["0123456"] == "no dvc.yaml"


def lock_text(params: dict[str, object], made: str = "a", read: str = "a") -> str:
    """A dvc.lock of two stages, of which the second reads what the first makes."""
    stages = {
        "allocate": {"params": {"params.yaml": params}, "outs": [{"path": "plan", "md5": made}]},
        "slice": {"deps": [{"path": "plan", "md5": read}, {"path": "libprune/engine/plan.py", "md5": "b"}]},
    }
    return yaml.safe_dump({"schema": "2.0", "stages": stages})


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("abz_", min_size=1, max_size=5)
)
leaf_params = st.dictionaries(st.sampled_from("abcdef").map("s.{}".format), values, min_size=1)


@given(leaf_params, st.data())
def test_results_are_outdated_exactly_if_a_param_has_changed(leaves, data):
    lock = lock_text(leaves)
    assert outdated(leaves | {"other.key": 1}, lock) is None
    key = data.draw(st.sampled_from(sorted(leaves)))
    assert key in outdated(leaves | {key: "changed"}, lock)


def test_a_number_that_yaml_reads_as_text_has_not_changed():
    assert (
        outdated({"slice.damping": 1e-05}, "stages: {slice: {params: {params.yaml: {slice.damping: 1e-05}}}}") is None
    )


def test_a_param_of_several_parts_is_compared_part_by_part_in_any_order():
    lock = lock_text({"score.cooperative": {"connection": 0.3, "uniqueness": 0.7}})
    same = {"score.cooperative.uniqueness": 0.7, "score.cooperative.connection": 0.3}
    assert outdated(same, lock) is None
    changed = outdated(same | {"score.cooperative.uniqueness": 0.6}, lock)
    assert changed == "allocate last ran with score.cooperative.uniqueness 0.7, not 0.6"


def test_results_are_outdated_if_a_later_stage_has_not_run_again():
    assert outdated({}, lock_text({}, made="new", read="old")) == "slice has not run since plan changed"


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


@pytest.mark.parametrize("numbers", [1, 4, PANELS, PANELS + 2])
def test_every_numeric_param_that_differs_has_a_panel_with_every_row(numbers):
    panels = draw_sweep(swept(numbers, words=1)).axes
    assert [axes.get_xlabel() for axes in panels] == [f"n.{j}" for j in range(min(numbers, PANELS))]
    for axes in panels:
        points = [point for part in axes.containers for point in zip(*part.lines[0].get_data(), strict=True)]
        assert sorted(y for _, y in points) == pytest.approx([1, 1.1, 1.2])


def test_colours_tell_other_settings_apart_and_a_line_joins_what_differs_in_one_param():
    rows = [row(f"{c}{r}", r, allocate__ratio=r, score__criterion=c) for c in ("fisher", "taylor") for r in (1.1, 1.3)]
    (axes,) = draw_sweep(rows).axes
    lines = [part.lines[0] for part in axes.containers]
    assert [line.get_color() for line in lines] == list(COLOURS[:2])
    assert [list(line.get_xdata()) for line in lines] == [[1.1, 1.3]] * 2
    assert {line.get_linestyle() for line in lines} == {"-"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fisher", "taylor"]


def test_a_row_without_a_number_is_a_line_across_the_panel_and_how_it_is_measured_has_none():
    rows = [row(f"t{t}", 1.2 + t / 10, s__t=t, evaluate__rounds=t) for t in (1, 2)]
    (axes,) = draw_sweep([*rows, row("plain", 1.1, s__t="auto", evaluate__rounds=3)]).axes
    assert axes.get_xlabel() == "s.t"
    assert [text.get_text() for text in axes.texts] == ["plain"]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"] == [[1.1, 1.1]]


def test_too_many_other_settings_are_not_joined_or_coloured():
    rows = [row(f"e{i}", 1.0 + i, s__x=i % 3, s__y=i) for i in range(len(COLOURS) + 2)]
    first, _ = draw_sweep(rows).axes
    assert len(first.containers) == 1
    assert first.containers[0].lines[0].get_linestyle() == "None"
    assert first.get_legend() is None


def test_named_params_alone_give_a_bar_a_row():
    (axes,) = draw_sweep(swept(0, words=2)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["e0: a, a", "e1: b, b", "e2: c, c"]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([1, 1.1, 1.2])


def test_ratios_over_a_decade_have_a_logarithmic_axis():
    (axes,) = draw_sweep([row("a", 1.2, s__x=0.1), row("b", 400.0, s__x=10)]).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (axes,) = draw_sweep([row("a", 1.2, s__x="p"), row("b", 400.0, s__x="q")]).axes
    assert axes.get_xscale() == "log"


def test_the_same_rows_give_the_same_picture(tmp_path):
    for name in ("one", "two"):
        write_picture(tmp_path / f"{name}.png", swept(2))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_outside_of_a_project_the_error_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LibpruneError, match=r"has no dvc\.yaml; run `libprune compare` in the project's folder"):
        gather_comparable()


def test_dvcs_own_error_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(LibpruneError, match=r"`dvc exp show` failed in .*not inside of a DVC repository"):
        gather_comparable()


def test_without_dvc_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LibpruneError, match=r"DVC cannot be run .* pip install dvc"):
        gather_comparable()
