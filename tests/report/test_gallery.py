"""The pictures of the report: every kind of table is drawn, and dvc.yaml lists every picture."""

import numpy as np
import pytest
import yaml

from libprune.report.gallery import NAMES, cut_gallery, gradient_gallery, recovery_gallery, sensitivity_gallery
from libprune.report.gradient_text import gradient_report
from tests.support.closure import ROOT
from tests.support.evaluated import RECOVERY
from tests.support.tables import PLAN_META, gradient_rows, plan_rows, sensitivity_rows, shortened, without_layer

GRADIENTS = {
    "one layer, one batch": (gradient_rows(1, batches=1), ["grad_dist", "grad_heatmap", "layer_variance"]),
    "a layer without gradient and a missing parameter": (
        shortened(without_layer(gradient_rows(3))),
        ["grad_dist", "grad_heatmap", "grad_comparison", "layer_variance"],
    ),
    "no gradient at all": (without_layer(gradient_rows(1)), []),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_drawn_in_the_pictures_that_have_something_to_show(kind):
    rows, names = GRADIENTS[kind]
    pictures = gradient_gallery(rows)
    assert [picture.name for picture in pictures] == names
    for picture in pictures:
        assert picture.png.startswith(b"\x89PNG")
        assert picture.svg.startswith("<svg ")
        assert picture.caption


SCORES = {
    "all zero": (np.zeros(1), 1),
    "negative, zero and positive": (np.array([-3.0, 0.0, 1e-9, 2.0, np.nan]), 3),
}


@pytest.mark.parametrize("kind", SCORES)
def test_every_table_of_scores_is_drawn(kind):
    values, layers = SCORES[kind]
    assert [picture.name for picture in cut_gallery(plan_rows(layers, values), PLAN_META)] == ["kept_share", "scores"]


def test_a_plan_that_cuts_nothing_has_no_picture_and_a_part_that_loses_none_no_panel():
    plan = plan_rows(2, np.arange(20.0))
    assert cut_gallery(plan | {"keep": np.full(20, True)}, PLAN_META) == []
    only_mlp = plan["keep"] | (plan["group_type"] == "attention")
    kept, scores = cut_gallery(plan | {"keep": only_mlp}, PLAN_META)
    assert "attention groups, %" not in kept.svg
    assert "MLP channels, %" in kept.svg
    assert "attention groups" in scores.svg


def test_a_sensitivity_without_standard_errors_is_drawn():
    rows = sensitivity_rows(1)
    (picture,) = sensitivity_gallery(rows | {"standard_error": np.full(3, np.nan)})
    assert picture.png.startswith(b"\x89PNG")


def test_a_training_is_drawn_and_where_there_was_none_nothing_is():
    (picture,) = recovery_gallery(RECOVERY)
    assert picture.name == "learning_curve"
    assert picture.png.startswith(b"\x89PNG")
    assert recovery_gallery(None) == []


def test_tables_without_rows_give_no_picture_and_a_report_that_says_so():
    gradients, plan, measured = gradient_rows(1), plan_rows(1, np.ones(1)), sensitivity_rows(1)
    empty = [{name: values[:0] for name, values in table.items()} for table in (gradients, plan, measured)]
    assert gradient_gallery(empty[0]) == cut_gallery(empty[1], PLAN_META) == sensitivity_gallery(empty[2]) == []
    assert "No gradients" in gradient_report(empty[0], {})


def test_the_pictures_are_the_plots_of_the_pipeline():
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    assert plots == [f"report/gradient_analysis/{name}.png" for name in NAMES]
