"""An inspection agrees with the model's weights and with the real allocation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from libprune.allocation.allocate import allocate
from libprune.cli.inspection import RATIOS, _division, divisions_of, inspect_model, params_for, uniform_shapes
from libprune.cli.inspection_output import as_data
from libprune.cli.main import app
from libprune.engine import cost
from libprune.engine.describe import describe
from libprune.engine.errors import ParamsError, SourceError
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Allocate
from tests.support import tiny
from tests.support.models import FAMILIES
from tests.support.published import CONFIGS, write_config
from tests.support.shapes import Shape


def test_uniform_shapes_are_those_of_the_allocate_stage(tmp_path):
    """Scores by `random` do not compare between parts, so that the stage takes the same division."""
    limits = {"min_channels": 4, "channel_multiple": 4}
    changes = {
        "gradients": {"sequences": 6},
        "score": {"criterion": "random", "scaling": "rank"},
        "allocate": {"method": "uniform"} | limits,
    }
    tiny.write_project(tmp_path, ["prepare", "tokenize", "gradients", "sensitivity", "score"], **changes)
    architecture = read_architecture(Layout(tmp_path / "artifacts"))
    for number, shape in enumerate(uniform_shapes(architecture, Allocate(**limits), torch.float32)):
        tiny.change_params(tmp_path, "allocate", ratio=RATIOS[number])
        tiny.run_stages(tmp_path, ["allocate"])
        plan, meta = read_plan(Layout(tmp_path / "artifacts"), architecture)
        size = cost.size(architecture, plan)
        assert shape.loads == meta["shape"]
        assert {part: plan.kept(0, part) for part in architecture.parts} == shape.kept
        assert (size.decoder, size.total, 4 * size.cache) == (shape.decoder, shape.total, shape.cache)
        assert 4 * size.state == shape.state
        assert shape.weights == 4 * size.total
        assert shape.kept["mlp"] % 4 == 0
        assert shape.tensor_parallel == meta["tensor_parallel"]


def test_each_share_has_the_multiple_that_auto_comes_to():
    shape = Shape(layers=2, ffn=4096)
    architecture = shape.architecture()
    for found in uniform_shapes(architecture, Allocate(), torch.float32):
        params = Allocate(ratio=found.ratio, split="proportional")
        plan = allocate(architecture, shape.table(np.ones(len(shape.unit_costs()))), params)
        assert {part: plan.kept(0, part) for part in architecture.parts} == found.kept
        assert found.kept["mlp"] % 32 == 0


def test_a_share_that_the_floors_forbid_is_shown_as_refused(tmp_path):
    shapes = uniform_shapes(Shape(kv=4, ffn=12).architecture(), Allocate(min_groups=3, min_channels=9), torch.float32)
    assert [bool(shape.refused) for shape in shapes] == [False, False, True, True]
    assert "min_channels" in shapes[-1].refused


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_next"])
def test_a_model_is_described_from_its_config_as_from_its_weights(tmp_path, name):
    model = FAMILIES[name](0)
    model.config.save_pretrained(tmp_path)
    inspection = inspect_model(params_for(str(tmp_path), None, False, None))
    assert inspection.architecture == describe(model)
    assert inspection.shapes[0].total == sum(parameter.numel() for parameter in model.parameters())
    data = json.loads(json.dumps(as_data(inspection)))
    by_part = sum(part["parameters"] for part in data["parts"].values())
    assert by_part + data["outside"] == data["total_parameters"] == inspection.shapes[0].total
    assert [stage["stage"] for stage in data["stages"]][-1] == "report"


def test_the_params_file_decides_what_is_collected_and_may_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(write_config(tmp_path / "model", CONFIGS["SmolLM2-135M"]))
    tiny.write_params(tmp_path / "params.yaml", "another", "text", gradients={"sequences": 5})
    params = params_for(model, "main", True, None)
    assert (params.prepare.model, params.prepare.revision, params.prepare.trust_remote_code) == (model, "main", True)
    assert params.gradients.sequences == 5
    tiny.write_params(tmp_path / "other.yaml", "another", "text", gradients={"sequences": 6})
    assert params_for(model, None, False, tmp_path / "other.yaml").gradients.sequences == 6
    with pytest.raises(ParamsError, match=r"missing\.yaml does not exist"):
        params_for(model, None, False, tmp_path / "missing.yaml")
    (tmp_path / "params.yaml").unlink()
    assert (
        params_for(model, None, False, None).gradients.sequences == Params.model_fields["gradients"].default.sequences
    )


def test_a_model_that_is_not_there_or_not_dense_is_refused_in_one_line(tmp_path):
    quantized = CONFIGS["SmolLM2-135M"] | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(SourceError, match="is quantized"):
        inspect_model(params_for(str(write_config(tmp_path / "q", quantized)), None, False, None))
    (tmp_path / "no.gguf").write_bytes(b"nothing that is a model")
    write_config(tmp_path / "odd", CONFIGS["SmolLM2-135M"] | {"num_attention_heads": 7})
    write_config(tmp_path / "other", {"model_type": "t5"})
    for place in ("no", "no.gguf", "odd", "other"):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / place)])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


# Where the scores divide the budget between the parts


def test_the_asked_ratio_has_a_shape_too():
    architecture = Shape(layers=2, ffn=4096).architecture()
    ratios = [shape.ratio for shape in uniform_shapes(architecture, Allocate(ratio=0.25), torch.float32)]
    assert ratios == sorted({*RATIOS, 0.25})


def test_without_scores_the_ends_are_shown_and_with_them_the_shape_that_allocate_gives(tmp_path):
    """The criterion compares between parts, so that the division follows from its scores."""
    changes = {"gradients": {"sequences": 6}, "score": {"criterion": "unit_fisher"}, "allocate": {"method": "uniform"}}
    tiny.write_project(tmp_path, ["prepare", "tokenize"], **changes)
    layout = Layout(tmp_path / "artifacts")
    params = params_for(str(tmp_path / "model"), None, False, tmp_path / "params.yaml")
    before = inspect_model(params, layout)
    assert before.division == "at the ends between which the scores will choose"
    ends = {shape.spared: shape for shape in before.shapes if shape.ratio == 0.2}
    assert ends.keys() == {"attention", "mlp"}
    assert ends["attention"].kept["attention"] > ends["mlp"].kept["attention"]
    assert ends["attention"].kept["mlp"] < ends["mlp"].kept["mlp"]

    tiny.run_stages(tmp_path, ["gradients", "hessian", "activations", "ablation", "score", "sensitivity", "allocate"])
    after = inspect_model(params, layout)
    assert after.division == "divided between the parts by the scores of the last run"
    (shape,) = (shape for shape in after.shapes if shape.ratio == 0.2)
    architecture = read_architecture(layout)
    plan, _ = read_plan(layout, architecture)
    assert shape.kept == {part: plan.kept(0, part) for part in architecture.parts}
    for part, kept in shape.kept.items():
        least, most = sorted(end.kept[part] for end in ends.values())
        assert least <= kept <= most

    other = inspect_model(params_for(str(tmp_path / "model"), None, False, None), Layout(tmp_path / "gone"))
    assert other.division == before.division, "of another run nothing is known"


def test_a_method_that_gives_each_layer_its_own_widths_is_said_to():
    params = Params.model_validate(
        {"prepare": {"model": "m"}, "tokenize": {"text": "t"}, "allocate": {"method": "global"}}
    )
    assert "allocate.method: global gives each layer widths of its own" in _division(None, params.allocate)
    assert divisions_of(Shape().architecture(), params, Layout(Path("gone"))) is not None
    apart = params.model_copy(update={"allocate": params.allocate.model_copy(update={"split": "proportional"})})
    assert divisions_of(Shape().architecture(), apart, Layout(Path("gone"))) is None
