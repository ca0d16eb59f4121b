"""From a plan to a pruned folder: repaired, written, recorded and proved."""

import json
from types import SimpleNamespace

import pytest
import torch

from libprune.engine import cost
from libprune.engine.describe import with_biases
from libprune.models.folder import load_config, load_model
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.sections import Compute, Slice
from libprune.results import prune as pruning
from libprune.results.prune import prune
from libprune.results.record import PROVENANCE
from tests.support.sliced import write_collected


@pytest.mark.parametrize(("name", "kind"), [("llama_mha", "uniform"), ("llama_mha", "holes")])
def test_biases_are_added_where_the_config_can_say_them(tmp_path, quick_proof, name, kind):
    """The proof in `prune` compares the reloaded folder with the masked dense model under the new biases."""
    layout, plan = write_collected(tmp_path, name, kind)
    folder = tmp_path / "pruned"
    folder.mkdir()
    proof, fits = prune(layout, folder, Compute(), Slice(repair="bias", rescale="none"))
    assert proof["logit_difference"] < 1e-4 * proof["logit_scale"]
    pruned = load_model(folder, torch.float32, trust_remote_code=kind == "holes")
    config = pruned.config.to_dict()
    assert config["attention_bias"] is config["mlp_bias"] is True
    for fit in fits:
        index = plan.layers.index(fit.consumer.layer)
        found = pruned.get_submodule(fit.consumer.module.replace(f".{fit.consumer.layer}.", f".{index}."))
        torch.testing.assert_close(found.bias, fit.bias)
        assert found.bias.abs().max() > 0
    assert pruned.model.layers[0].mlp.gate_proj.bias.abs().max() == 0
    biased, _ = with_biases(
        read_architecture(layout),
        load_config(layout.model),
        json.loads((folder / PROVENANCE).read_text())["biases_added"],
    )
    assert cost.size(biased, plan).total == sum(parameter.numel() for parameter in pruned.parameters())


class RepairedError(Exception):
    pass


@pytest.mark.parametrize(
    ("device", "repair", "place"),
    [("cpu", "sequential", "disk"), ("cuda", "sequential", "auto"), ("cuda", "local", "disk")],
)
def test_a_proof_from_disk_leaves_a_gpu_its_weights_that_change(tmp_path, monkeypatch, device, repair, place):
    """Where the host has too little memory for the proof, and the GPU enough for the model."""

    def repaired(layout, architecture, plan, compute, params):
        raise RepairedError(compute.offload)

    monkeypatch.setattr(pruning, "settle", lambda compute, *_: compute.model_copy(update={"offload": "disk"}))
    monkeypatch.setattr(pruning, "resolve_device", lambda name: SimpleNamespace(type=name))
    monkeypatch.setattr(f"libprune.repair.repairs.{repair}_fits", repaired)
    layout, _ = write_collected(tmp_path, "llama", "uniform")
    with pytest.raises(RepairedError, match=place):
        prune(layout, tmp_path / "pruned", Compute(device=device), Slice(repair=repair))
