"""Decisions: the shape, the split, which scores may be used, and the allocate stage under a gradient fix."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import decide, result_shape, summary
from libprune.allocation.gradient_fix import factors_of
from libprune.engine.errors import ArtifactError, BudgetError, LibpruneError
from libprune.engine.plan import Plan, jaccard
from libprune.engine.tables import Columns, split_blocks, unit_index
from libprune.pipeline.artifacts import Scores, read_architecture, read_plan, read_table, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.statistics.gradient_health import gradient_ratio
from tests.support import tiny
from tests.support.shapes import META, Shape, every_method
from tests.support.tiny import change_params


@pytest.mark.parametrize(
    ("expressible", "groups", "message"),
    [
        (None, (3, 4, 4), "the layers of this plan differ in width"),
        ((2, 4), (3, 3, 3), "the stock config of this family cannot say 3 attention units"),
    ],
)
def test_the_uniform_shape_is_refused_where_a_plan_does_not_have_it(expressible, groups, message):
    architecture = Shape(expressible=expressible).architecture()
    fewer = {(layer, "attention"): np.arange(4) < kept for layer, kept in enumerate(groups)}
    plan = Plan({**Plan.dense(architecture).keep, **fewer})
    assert result_shape(architecture, plan, Allocate(shape="auto")) == "per_layer"
    with pytest.raises(BudgetError, match=rf"allocate\.shape is uniform, but {message}; choose"):
        result_shape(architecture, plan, Allocate(shape="uniform"))


@pytest.mark.parametrize("shape", ["auto", "uniform", "per_layer"])
def test_an_even_plan_has_the_shape_that_is_asked_for(shape):
    architecture = Shape(expressible=(2, 4)).architecture()
    asked = result_shape(architecture, Plan.dense(architecture), Allocate(shape=shape))
    assert asked == ("per_layer" if shape == "per_layer" else "uniform")


@pytest.mark.parametrize(("shape", "found"), [("auto", None), ("per_layer", "but allocate.shape is per_layer")])
def test_a_language_model_inside_another_has_layers_all_alike(shape, found):
    architecture = replace(Shape().architecture(), tower=True)
    dense, asked = Plan.dense(architecture), Allocate(shape=shape)
    if found is None:
        assert result_shape(architecture, dense, asked) == "uniform"
        dense, found = (
            Plan(dense.keep | {(0, "mlp"): np.arange(architecture.units("mlp")) > 0}),
            "but the layers of this plan differ",
        )
    with pytest.raises(BudgetError, match=f"can only be written all alike, {found}.*; choose allocate.method: uniform"):
        result_shape(architecture, dense, asked)


def test_scores_that_do_not_compare_are_refused_in_global_unless_scaled():
    shape, meta = Shape(), META | {"comparable": False}
    architecture, scores = shape.architecture(), shape.table(np.arange(48.0))
    with pytest.raises(LibpruneError, match=r"^wanda compares only within a layer and part.*score\.scaling"):
        decide(Scores(architecture, scores, meta), Allocate(method="global"))
    scaled = decide(Scores(architecture, scores, meta | {"scaling": "zscore"}), Allocate(method="global"))
    plain = decide(Scores(architecture, scores, META), Allocate(method="global"))
    assert jaccard(scaled.plan.column, plain.plan.column) == 1
    assert decide(Scores(architecture, scores, meta), Allocate(method="uniform")).plan.uniform


@pytest.mark.parametrize("method", ["uniform", "functional"])
def test_the_importance_of_two_parts_is_added_up_only_where_it_compares(method):
    """Of wanda, the parts of a layer shared the budget by the norms of their inputs."""
    shape, params = Shape(), Allocate(method=method, split="importance")
    architecture, scores, evidence = shape.architecture(), shape.table(np.arange(48.0)), shape.evidence(method)
    with pytest.raises(LibpruneError, match=r"^wanda compares only .* allocate\.split: importance would add up unlike"):
        decide(Scores(architecture, scores, META | {"comparable": False}), params, evidence)
    assert decide(Scores(architecture, scores, META), params, evidence).params.split == "importance"


@pytest.mark.parametrize(
    ("meta", "split"),
    [({}, "importance"), ({"comparable": False}, "proportional"), ({"scaling": "rank"}, "proportional")],
)
def test_the_budget_is_split_by_importance_only_where_scores_compare(meta, split):
    shape = Shape()
    decision = decide(Scores(shape.architecture(), shape.table(np.arange(48.0)), META | meta), Allocate())
    assert decision.params.split == split
    plan = allocate(shape.architecture(), shape.table(np.arange(48.0)), Allocate(split=split))
    assert jaccard(decision.plan.column, plan.column) == 1


@every_method
@settings(max_examples=10)
@given(st.permutations(range(48)), st.permutations(range(48)))
def test_a_second_order_criterion_reports_how_far_each_part_alone_would_agree(method, first, second):
    shape, params = Shape(), Allocate(method=method, ratio=0.4, split="importance")
    architecture, costs, evidence = shape.architecture(), shape.unit_costs(), shape.evidence(method)
    parts = {"taylor": np.array(first) * costs / 4, "fisher": np.array(second) * costs / 4}

    def table(components: dict[str, np.ndarray]) -> Columns:
        importance = np.sum(list(components.values()), axis=0)
        return unit_index(architecture) | {"importance": importance, "cost": costs, "score": importance / costs}

    def overlap(components: dict[str, np.ndarray]) -> dict[str, float]:
        return dict(decide(Scores(architecture, table(components) | components, META), params, evidence).overlap)

    both, one = overlap(parts), allocate(architecture, table(parts), params, evidence)
    for name, values in parts.items():
        alone = allocate(architecture, table({name: values}), params, evidence)
        assert both[name] == jaccard(one.column, alone.column)
    assert overlap(parts | {"fisher": np.zeros(48)})["taylor"] == 1, "a second order of nothing changes nothing"
    assert overlap({"taylor": parts["taylor"]}) == {}


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


def test_the_stage_says_which_multiple_it_chose_and_what_devices_divide(project, capsys):
    for shape, sizes in (("per_layer", None), ("uniform", [1])):
        method = {"per_layer": "global", "uniform": "uniform"}[shape]
        plan, meta, metrics = allocated(project, gradient_fix="none", shape=shape, method=method)
        assert (meta["channel_multiple"], meta["tensor_parallel"]) == (1, sizes)
        assert (metrics["channel_multiple"], metrics["tensor_parallel"]) == (1, sizes)
        lines = capsys.readouterr().out.splitlines()
        width = plan.keep[0, "mlp"].size
        assert f"keeps channels in no multiple: {width} is a multiple of none of 256, 128, 64 and 32" in lines
        assert any(line.startswith("tensor parallelism: 1 (numbers") for line in lines) == (shape == "uniform")
    allocated(project, shape="per_layer", method="hgsp", channel_multiple=2)
    assert "channels in" not in capsys.readouterr().out


def test_layers_that_collapse_are_gone_from_the_saved_model(project, quick_proof):
    collapse = {"collapse_below": 0.95, "depth": "units", "ratio": 0.4}
    plan, _, metrics = allocated(project, gradient_fix="none", **collapse)
    architecture = read_architecture(Layout(project / "artifacts"))
    assert 0 < len(plan.layers) < architecture.layers
    assert metrics["removed"] <= metrics["target"]
    change_params(project, "slice", repair="none")
    import_module("stages.slice").main(project / "params.yaml", project / "artifacts", project / "metrics")
    config = json.loads((project / "artifacts/pruned/config.json").read_text())
    assert config["num_hidden_layers"] == len(plan.layers)
    allocated(project, **collapse | {"collapse_below": 0.0, "depth": "none", "ratio": 0.2})


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


@pytest.mark.parametrize("method", ["uniform", "global", "search"])
def test_the_budget_of_time_is_met_and_what_is_slow_goes_first(method):
    """A group takes as long as six channels here, and has 48 of 180 parameters of a layer's four."""
    shape = Shape(layers=4, kv=6, ffn=24)
    architecture = shape.architecture()
    lines = {"unit": {"attention": 6e-6, "mlp": 1e-6}, "fixed": 0.0, "outside": 1e-3}
    given = shape.evidence("search") | {"latency": lines}
    scores = shape.table(1.0 + np.random.default_rng(0).permutation(len(shape.unit_costs())))
    params = Allocate(method=method, ratio=0.25, objective="latency", shape="per_layer")
    told = summary(architecture, decide(Scores(architecture, scores, META), params, given))
    assert told["target"] == round(0.25 * 4 * (6 * 6 + 24) * 1e6)
    assert told["share_removed"] == pytest.approx(0.25, abs=0.03)


def test_a_global_order_is_by_importance_for_the_time_saved():
    """All importances equal: of what saves twice the time the more goes."""
    shape = Shape(layers=1, kv=4, ffn=12)
    architecture = shape.architecture()
    scores = shape.table(1 / shape.unit_costs())
    for dear, other, slow in (("attention", "mlp", (2e-6, 1e-6)), ("mlp", "attention", (1e-6, 2e-6))):
        lines = {"unit": dict(zip(("attention", "mlp"), slow, strict=True)), "fixed": 0.0, "outside": 0.0}
        ratio = 4e-6 / (4 * slow[0] + 12 * slow[1])  # two of what is slow
        params = Allocate(method="global", ratio=ratio, objective="latency", shape="per_layer")
        plan = decide(Scores(architecture, scores, META), params, {"latency": lines}).plan
        assert plan.kept(0, dear) < shape.units[dear]
        assert plan.kept(0, other) == shape.units[other]


def test_the_overlap_with_the_only_component_is_whole_under_every_objective():
    shape = Shape(layers=2)
    rng = np.random.default_rng(0)
    scores = shape.table(1.0 + rng.permutation(len(shape.unit_costs())))
    scores |= {"taylor": scores["importance"], "fisher": 0 * scores["importance"]}
    lines = {"unit": {"attention": 1e-6, "mlp": 6e-6}, "fixed": 0.0, "outside": 0.0}
    for objective in ("parameters", "cache", "latency"):
        params = Allocate(method="global", ratio=0.3, objective=objective, shape="per_layer")
        decision = decide(Scores(shape.architecture(), scores, META), params, {"latency": lines})
        assert decision.overlap["taylor"] == 1


def test_a_ratio_below_one_step_is_said_to_remove_nothing(project, capsys):
    allocated(project, gradient_fix="none", shape="uniform", method="uniform", objective="cache", ratio=0.01)
    said = capsys.readouterr().out
    assert "note: nothing is removed, since one step of allocate.method: uniform takes more than the ratio 0.01" in said
