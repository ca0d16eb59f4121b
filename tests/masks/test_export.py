"""Plans as masks: in a file, and what they refuse."""

import pytest
import torch
from safetensors.torch import load_file

from libprune import masks
from libprune.engine.plan import Plan
from libprune.masks.export import plan_masks
from tests.support.masked_models import plan_file, remasked, run
from tests.support.models import FAMILIES, Dense, random_plan, write_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Dense:
    return write_dense(FAMILIES["mistral"](0), tmp_path_factory.mktemp("dense") / "model")


def test_exported_masks_and_weights_are_a_state_dict_of_pruned_modules(dense, tmp_path):
    plan = random_plan(dense.architecture, "uniform")
    source = plan_file(dense, plan, tmp_path)
    done = run("export", source, tmp_path / "masks.safetensors", "--model", dense.folder, "--orig")
    assert done.exit_code == 0, done.output
    model = FAMILIES["mistral"](1)
    masks.apply(model, plan)
    tensors = load_file(tmp_path / "masks.safetensors")
    for name, mask in plan_masks(dense.architecture, plan):
        assert torch.equal(tensors.get(f"{name}_mask"), mask)
    loaded = model.load_state_dict(tensors, strict=False)
    assert not loaded.unexpected_keys
    expected = remasked(dense, plan).state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if name.endswith(("_orig", "_mask")))


def test_a_plan_of_another_model_or_of_no_change_is_not_exported(dense, tmp_path):
    other = write_dense(FAMILIES["mistral"](1), tmp_path / "model").folder
    source, out = plan_file(dense, Plan.dense(dense.architecture), tmp_path), tmp_path / "masks.safetensors"
    assert "belongs to model" in run("export", source, out).output
    assert "keeps every unit" in run("export", source, out, "--model", dense.folder).output
    assert "name the dense model's folder" in run("export", source, out, "--model", tmp_path / "none").output
    assert "name a pruned folder or a plan" in run("export", other / "config.json", out, "--model", other).output
    assert not out.exists()
