"""The width stage: which widths it measures, and what it measures against a direct computation."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from libprune.collection.stream_axes import Narrowed, read_axes
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.masks.export import export_masks
from libprune.models.folder import WeightFiles, load_model
from libprune.models.tokens import read_tokens
from libprune.narrowing.measure import choose_widths
from libprune.pipeline.artifacts import read_architecture, read_plan, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Width
from libprune.results.check import check_folder
from libprune.results.record import read_record
from tests.support import tiny
from tests.support.closure import run_without_torch
from tests.support.models import FAMILIES
from tests.support.predictions import kl, logits_of
from tests.support.processes import together


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A tiny project with a plan that keeps 36 of 48 columns."""
    folder = tmp_path_factory.mktemp("width")
    stages = ("prepare", "tokenize", "gradients", "activations", "score", "width", "allocate")
    changes = {"allocate": {"width": 36, "ratio": 0.3}, "slice": {"damping": 0.001}, "score": {"criterion": "taylor"}}
    return tiny.write_project(folder, stages, width={"sequences": 3}, **changes)


def test_the_divergence_is_that_of_the_model_under_the_mask_and_the_mended_weights(measured):
    layout = Layout(measured / "artifacts")
    architecture = read_architecture(layout)
    table, meta = read_table(layout.widths, "width")
    axes, plan = (
        read_axes(layout.width_axes, {"model": architecture.fingerprint}),
        replace(Plan.dense(architecture), width=36),
    )
    assert (table["width"].tolist(), meta["axes"], meta["measured"]) == ([36], "selected", 3)
    ids = read_tokens(layout.calibration_tokens, architecture.fingerprint)[0][-3:].ids
    model = load_model(layout.model, torch.float32)
    dense = logits_of(model, ids)
    weights = Narrowed(WeightFiles(layout.model), architecture, axes, 36, repair=True)
    with torch.no_grad():
        for parameter in architecture.parameters:
            model.get_parameter(parameter.name).copy_(weights[parameter.name])
    with masked(model, architecture, plan):
        expected = kl(dense, logits_of(model, ids)).mean()
    assert table["divergence"][0] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("repair", ["none", "local", "sequential"])
def test_the_plan_is_sliced_and_proved_with_every_repair(measured, quick_proof, repair):
    tiny.change_params(measured, "slice", repair=repair)
    tiny.run_stages(measured, ["slice"])
    layout = Layout(measured / "artifacts")
    assert not (layout.work / "slice").exists(), "no fits are left"
    architecture = read_architecture(layout)
    plan, meta = read_plan(layout, architecture)
    record = read_record(layout.pruned)
    assert plan.width == meta["width"] == record.plan.width == 36
    assert record.config["hidden_size"] == record.architecture.sizes["model"] == 36
    removed = 1 - record.provenance["parameters"]["pruned"]["decoder"] / architecture.decoder_parameters
    assert removed == pytest.approx(0.3, abs=0.005), "columns count towards the ratio"
    assert "| columns of the residual stream | 48 | 36 |" in (layout.pruned / "README.md").read_text()
    said = {one.about: one for one in check_folder(layout.pruned)}
    assert {one.kind for one in said.values()} == {"ok"}
    assert said["config"].text.endswith(", 36 columns of the residual stream, as plan.parquet keeps")


def test_no_masks_are_written_of_a_narrower_stream(measured, tmp_path):
    artifacts, target = measured / "artifacts", tmp_path / "masks.safetensors"
    with pytest.raises(LibpruneError, match=r"keeps 36 columns of the residual stream, .* masks .* cannot say"):
        export_masks(artifacts / "plan.parquet", artifacts / "model", target, False)
    assert not target.exists()


def test_widths_are_even_and_such_as_the_config_can_say():
    config = FAMILIES["llama"](0).config
    architecture = describe(FAMILIES["llama"](0))
    assert choose_widths(architecture, config, Width(widths=2, multiple=1), "auto") == [24, 18]
    assert choose_widths(architecture, config, Width(widths=9, multiple=1), "auto") == [24, 18], "heads divide them"
    assert choose_widths(architecture, config, Width(widths=(18, 12)), "auto") == [18, 12]
    assert choose_widths(architecture, config, Width(), 18) == [18]
    with pytest.raises(LibpruneError, match=r"no multiple of width.multiple = 7"):
        choose_widths(architecture, config, Width(multiple=7), "auto")
    with pytest.raises(LibpruneError, match=r"allocate.width = 25 cannot be written: .*number of attention heads"):
        choose_widths(architecture, config, Width(), 25)


def test_without_a_width_the_stage_writes_nothing_and_loads_no_torch(measured, tmp_path):
    tiny.write_params(tmp_path / "params.yaml", "model", "text")
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    (artifacts / "architecture.json").write_bytes((measured / "artifacts" / "architecture.json").read_bytes())
    assert run_without_torch("width", tmp_path) == ["allocate.width is null: the residual stream keeps its width"]
    table, _ = read_table(artifacts / "width.parquet", "width")
    assert np.size(table["width"]) == 0
    assert (artifacts / "width/nothing.json").read_text() == '{\n  "width": null\n}\n'
    with pytest.raises(ArtifactError, match=r"width was written with allocate\.width: null; set a width"):
        read_axes(artifacts / "width", {"model": "any"})


def test_two_processes_share_the_passes_out(measured, tmp_path, python):
    place = shutil.copytree(measured, tmp_path / "place")
    layouts = [Layout(folder / "artifacts") for folder in (measured, place)]
    layouts[1].widths.unlink()
    together(python, place, "run('width')\n")
    tables = [read_table(layout.widths, "width")[0] for layout in layouts]
    assert tables[1]["divergence"] == pytest.approx(tables[0]["divergence"], rel=1e-3)
    one, two = (read_axes(layout.width_axes, {}) for layout in layouts)
    assert one.order is not None and torch.equal(one.order, two.order)
    for kind in ("ratios", "grams", "held_out"):
        assert {*getattr(one, kind)} == {*getattr(two, kind)}
        for name, tensor in getattr(one, kind).items():
            torch.testing.assert_close(getattr(two, kind)[name], tensor, rtol=1e-4, atol=1e-5)
