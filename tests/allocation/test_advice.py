"""What is said of gradients and layers, and the allocate stage under a fix."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from libprune.allocation.advice import Fixed, advise, over_pruned, shares_lost
from libprune.allocation.gradient_fix import factors_of
from libprune.engine import cost
from libprune.engine.errors import ArtifactError
from libprune.engine.plan import Plan
from libprune.engine.tables import split_blocks
from libprune.pipeline.artifacts import read_architecture, read_plan, read_table, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.scores import Scores
from libprune.pipeline.sections import Allocate
from libprune.statistics.gradient_health import gradient_ratio
from tests.support import tiny
from tests.support.models import random_plan
from tests.support.shapes import Shape, shapes
from tests.support.tiny import change_params

WIDE = Shape(layers=10, ffn=30)
"""Two thirds of a layer are its channels."""


def told(ratio: float, after: float | None = None, plan: Plan | None = None, order: int | None = 1, **settings) -> dict:
    architecture = WIDE.architecture()
    fix, orders = settings.pop("fix", "none"), {} if order is None else {"component": order}
    scores = Scores(architecture, {}, {"gradient_orders": orders})
    fixed = Fixed(scores, fix, ratio, ratio if after is None else after)
    return advise(fixed, plan or Plan.dense(architecture), Allocate(**settings))


def without_channels(lost: dict[int, int]) -> Plan:
    keep = dict(Plan.dense(WIDE.architecture()).keep)
    for layer, count in lost.items():
        keep[layer, "mlp"] = np.arange(WIDE.ffn) >= count
    return Plan(keep)


# Gradients


def test_vanishing_gradients_are_named_with_what_to_try():
    advice = ["gradient ratio 2,300: severe vanishing; try allocate.gradient_fix=auto"]
    assert told(2300.0, method="global")["advice"] == told(2300.0, method="hgsp")["advice"] == advice
    assert "mild vanishing" in told(300.0, method="hgsp")["advice"][0]
    assert told(99.0, method="hgsp")["advice"] == []


def test_nothing_is_advised_where_gradients_play_no_part():
    assert told(2300.0, method="uniform")["advice"] == []
    assert told(2300.0, method="global", order=None)["advice"] == []
    assert told(2300.0, method="global", order=0)["advice"] == []
    assert told(2300.0, 5.0, method="global", fix="adaptive")["advice"] == []


def test_a_fix_that_harms_or_changes_little_is_named():
    (worse,) = told(8.0, 12.5, method="hgsp", fix="depth")["advice"]
    assert "from 8.0 to 12.5" in worse
    (little,) = told(2300.0, 5.0, method="uniform", fix="adaptive")["advice"]
    assert "changes little" in little


def test_an_infinite_ratio_can_be_written_as_json():
    found = json.loads(json.dumps(told(float("inf"), method="global"), allow_nan=False))
    assert (found["gradient_ratio"], found["gradient_ratio_after_fix"], found["verdict"]) == (
        None,
        None,
        "severe vanishing",
    )


# Layers


@given(shapes())
def test_the_shares_lost_add_up_to_what_the_plan_removes(shape):
    architecture = shape.architecture()
    plan = random_plan(architecture, "per_layer")
    shares = shares_lost(architecture, plan)
    removed = cost.prices(architecture, "parameters").removed(plan)
    assert shares.mean() == pytest.approx(removed / architecture.decoder_parameters)
    assert ((shares >= 0) & (shares < 1)).all()


def test_layers_that_lose_too_much_are_named_the_first_ones_apart():
    found = told(1.0, plan=without_channels({0: 30, 7: 30, 8: 5}))
    assert found["over_pruned_layers"] == [0, 7]
    named, early = found["advice"]
    assert named.endswith("clearly more than the others: 0 (65 %), 7 (65 %)")
    assert "1 of the first 5 layers" in early
    assert "allocate.freeze_first=1" in early


def test_many_such_layers_are_too_many():
    two, three = (told(1.0, plan=without_channels(dict.fromkeys(range(6, 6 + n), 30)))["advice"] for n in (2, 3))
    assert len(two) == 1
    assert "more than 20 % of the layers" in three[1]


def test_where_all_layers_lose_half_none_stands_out():
    assert over_pruned(np.full(10, 0.52)) == []
    assert over_pruned(np.array([0.52] * 9 + [0.7])) == [9]
    lost = np.array([0.0] * 5 + [0.6] * 5)
    assert over_pruned(lost) == [5, 6, 7, 8, 9]
    assert over_pruned(lost, freeze_first=5) == over_pruned(lost[::-1].copy(), freeze_last=5) == []


def test_layers_that_were_removed_on_purpose_are_not_over_pruned():
    assert over_pruned(np.array([1.0, 1.0, 0.2, 0.2, 0.7])) == [4]


def test_freezing_is_advised_only_where_most_layers_stay_free():
    (_, early) = told(1.0, plan=without_channels({4: 30}))["advice"]
    assert "freeze_first" not in early


# The stage


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model with its gradients, scores and sensitivity."""
    folder = tmp_path_factory.mktemp("project")
    model, text = str(tiny.write_model(folder / "model")), str(tiny.write_text(folder / "text.txt"))
    settings = {"score": {"criterion": "taylor"}, "allocate": {"method": "hgsp", "shape": "per_layer"}}
    tiny.write_params(folder / "params.yaml", model, text, **settings)
    for name in ("prepare", "tokenize", "gradients", "hessian", "score", "sensitivity"):
        import_module(f"stages.{name}").main(folder / "params.yaml", folder / "artifacts")
    return folder


def allocated(folder: Path, **settings) -> tuple[Plan, dict, dict]:
    """The plan with its metadata, and what the metrics say of gradients."""
    change_params(folder, "allocate", **settings)
    import_module("stages.allocate").main(folder / "params.yaml", folder / "artifacts", folder / "metrics")
    layout = Layout(folder / "artifacts")
    plan, meta = read_plan(layout, read_architecture(layout))
    return plan, meta, json.loads((folder / "metrics/allocation.json").read_text())


def test_the_stage_writes_the_scores_under_the_fix_and_both_ratios(project, capsys):
    layout = Layout(project / "artifacts")
    plain, before, _ = allocated(project, gradient_fix="none")
    fixed, meta, metrics = allocated(project, gradient_fix="adaptive+depth", depth_weights="linear")
    architecture, scores = read_architecture(layout), read_table(layout.scores, "score")[0]
    rows, tensors = (read_table(layout.gradients / f"{name}.parquet", "gradients")[0] for name in ("layers", "tensors"))
    factors = factors_of("adaptive+depth", tensors, architecture.layers, "linear")
    table = read_table(layout.plan, "allocate")[0]
    np.testing.assert_allclose(table["importance"], scores["taylor"] * factors[scores["layer_idx"]])
    np.testing.assert_allclose(table["score"], table["importance"] / table["cost"])
    assert meta["diagnosis"] == metrics["diagnosis"]
    assert meta["diagnosis"]["fix"] == "adaptive+depth"
    assert before["diagnosis"]["fix"] == "none"
    assert meta["diagnosis"]["gradient_ratio"] == pytest.approx(gradient_ratio(rows))
    means = [rows["mean_abs"][rows["layer_idx"] == i].mean() * factors[i] for i in range(architecture.layers)]
    assert meta["diagnosis"]["gradient_ratio_after_fix"] == pytest.approx(max(means) / min(means))
    for block, score in split_blocks(architecture, scores["score"]):
        for plan in (plain, fixed):
            keep = plan.keep[block]
            assert keep.all() or score[~keep].max() <= score[keep].min(), "a fix leaves the order in a block"
    assert all(f"note: {sentence}" in capsys.readouterr().out for sentence in metrics["diagnosis"]["advice"])


def test_layers_that_collapse_are_gone_from_the_saved_model(project, quick_proof):
    collapse = {"collapse_below": 0.95, "allow_layer_removal": True, "ratio": 0.4}
    plan, _, metrics = allocated(project, gradient_fix="none", **collapse)
    architecture = read_architecture(Layout(project / "artifacts"))
    assert 0 < len(plan.layers) < architecture.layers
    assert metrics["removed"] <= metrics["target"]
    change_params(project, "slice", repair="none")
    import_module("stages.slice").main(project / "params.yaml", project / "artifacts", project / "metrics")
    config = json.loads((project / "artifacts/pruned/config.json").read_text())
    assert config["num_hidden_layers"] == len(plan.layers)
    allocated(project, **collapse | {"collapse_below": 0.0, "allow_layer_removal": False, "ratio": 0.2})


@pytest.mark.parametrize("artifact", ["sensitivity.parquet", "gradients/layers.parquet", "gradients/tensors.parquet"])
def test_statistics_of_another_text_are_refused(project, artifact):
    path = project / "artifacts" / artifact
    table, meta = read_table(path, "some")
    before = path.read_bytes()
    write_table(path, table, meta | {"tokens": "other"})
    try:
        with pytest.raises(ArtifactError, match=path.name):
            allocated(project, gradient_fix="adaptive")
    finally:
        path.write_bytes(before)


def test_of_nothing_measured_the_stage_that_is_missing_is_named(project):
    change_params(project, "allocate", method="uniform")
    import_module("stages.sensitivity").main(project / "params.yaml", project / "artifacts")
    with pytest.raises(ArtifactError, match="run `dvc repro sensitivity`"):
        allocated(project, method="hgsp")
