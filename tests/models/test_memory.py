"""Models larger than the memory, and disks without room."""

from types import SimpleNamespace

import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.models import memory
from libprune.models.compute import sequence_losses
from libprune.models.sequences import Sequences
from tests.support.models import FAMILIES, tokens


def test_offloaded_weights_are_on_the_device_only_while_their_map_works():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    memory.offload_maps(model, architecture, torch.device("cpu"))
    memory.recompute_layers(model, architecture)
    maps = [model.get_submodule(entry.module) for entry in architecture.maps]
    seen = []
    for module in maps:
        module.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        model(ids)
    assert len(seen) == len(maps)
    assert {module.weight.device.type for module in maps} == {"meta"}
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: output.requires_grad_(True))
    model(ids).logits.sum().backward()
    assert len(seen) == 3 * len(maps)
    assert {module.weight.device.type for module in maps} == {"meta"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_recomputed_layers_give_the_same_gradients(family):
    gradients = []
    for recompute in (False, True):
        model = FAMILIES[family](0)
        if recompute:
            memory.recompute_layers(model, describe(model))
        sequence_losses(model, Sequences(tokens(2, 9))).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_half_of_the_free_memory_may_be_taken(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert memory.fits_in_memory(499)
    assert not memory.fits_in_memory(500)


def test_bytes_for_folders_of_one_disk_are_added_up_and_compared_with_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    needs = {tmp_path / "not" / "yet" / "there": 1_000_000, tmp_path: 1_000_000}
    memory.require_room(needs, "a stage", "take less")
    with pytest.raises(LibpruneError, match=r"a stage needs 2\.1 MB below .*, where 2\.0 MB are free; take less"):
        memory.require_room(needs | {tmp_path / "more": 100_000}, "a stage", "take less")
    assert list(tmp_path.iterdir()) == []


def test_sums_go_to_a_gpu_that_has_three_times_the_room(monkeypatch):
    assert not memory.fits_on(torch.device("cpu"), 0)
    free = SimpleNamespace(mem_get_info=lambda device: (3_000, 9_000))
    monkeypatch.setattr(torch, "get_device_module", lambda device: free)
    assert memory.fits_on(torch.device("cuda", 0), 999)
    assert not memory.fits_on(torch.device("cuda", 0), 1_000)
