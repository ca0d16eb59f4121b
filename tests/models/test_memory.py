"""Models larger than the memory, and disks without room."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.surgery import masked
from libprune.models import memory
from libprune.models.compute import sequence_losses
from libprune.models.folder import load_model
from libprune.models.sequences import Sequences
from tests.support.models import FAMILIES, random_plan, tokens


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


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_offloaded_weights_are_masked_like_those_in_memory(family):
    model, ids = FAMILIES[family](0), tokens(2, 5)
    architecture = describe(model)
    plan = random_plan(architecture, "uniform")
    with torch.no_grad():
        with masked(model, architecture, plan):
            expected = model(ids).logits
        memory.offload_maps(model, architecture, torch.device("cpu"))
        with masked(model, architecture, plan):
            assert torch.equal(model(ids).logits, expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4)])
def test_a_tensor_on_disk_is_the_tensor_and_leaves_no_file(dtype, shape, tmp_path):
    tensor = torch.randint(0, 2, shape).to(dtype)
    kept = memory.on_disk(tensor.expand(2, *shape).mT if len(shape) == 2 else tensor, tmp_path / "new")
    expected = tensor.expand(2, *shape).mT if len(shape) == 2 else tensor
    assert torch.equal(kept, expected)
    assert (kept.dtype, kept.shape) == (expected.dtype, expected.shape)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "new"])
    assert (kept in memory._Mapped()) == bool(tensor.numel())
    assert tensor.clone() not in memory._Mapped()


def test_the_list_of_mappings_is_read_once_for_all_tensors_of_a_file(tmp_path, monkeypatch):
    tensors = {str(number): torch.full((2000,), float(number)) for number in range(9)}
    save_file(tensors, tmp_path / "weights.safetensors")
    mapped, asked, read_text = memory._Mapped(), [], memory.Path.read_text
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        read = [file.get_tensor(name) for name in tensors]
    monkeypatch.setattr(memory.Path, "read_text", lambda path: asked.append(path) or read_text(path))
    assert all(tensor in mapped for tensor in read)
    assert len(asked) == 1
    assert not any(tensor in mapped for tensor in tensors.values())


def test_writing_to_weights_on_disk_leaves_the_files_as_they_were(tmp_path):
    FAMILIES["llama"](0).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    model = load_model(tmp_path / "model", torch.float32, scratch=tmp_path / "scratch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    again = load_model(tmp_path / "model", torch.float32)
    assert any(parameter.any() for parameter in again.parameters())


@pytest.mark.parametrize("name", ["llama_mha", "mixtral", "gpt_oss", "bert_classifier"])
def test_every_weight_is_mapped_whatever_transformers_has_to_convert(name, tmp_path):
    """Another type, experts that are published one by one, and a head of its own."""
    mapped = memory._Mapped()
    FAMILIES[name](0).save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        expected = load_model(tmp_path / "model", dtype)
        model = load_model(tmp_path / "model", dtype, scratch=tmp_path / "scratch")
        found, tensors = dict(model.named_parameters()), dict(expected.named_parameters())
        assert found.keys() == tensors.keys(), "what is tied is tied"
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        assert all(parameter in mapped for parameter in found.values())
        assert list((tmp_path / "scratch").iterdir() if (tmp_path / "scratch").exists() else []) == []


def test_transformers_loads_as_before_afterwards(tmp_path):
    put = memory.core_model_loading.set_param_for_module
    with memory.loading_on_disk(tmp_path):
        assert memory.core_model_loading.set_param_for_module is not put
        assert memory.os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert memory.core_model_loading.set_param_for_module is put
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in memory.os.environ
    assert memory.modeling_gguf_pytorch_utils.np is np


def test_dequantised_tensors_of_a_gguf_file_lie_on_disk(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    array.flags.writeable = False
    with memory.loading_on_disk(tmp_path):
        copy = memory.modeling_gguf_pytorch_utils.np.copy(array)
        assert memory.modeling_gguf_pytorch_utils.np.pi == np.pi
    assert torch.from_numpy(copy) in memory._Mapped()
    assert (copy == array).all()


GROUPS = {
    "first": ("7:memory:/a/b\n3:cpu:/\n", "memory", "limit_in_bytes", "usage_in_bytes", "total_"),
    "second": ("0::/a/b\n", "", "max", "current", ""),
}


@pytest.mark.parametrize("version", GROUPS)
def test_the_tightest_control_group_limits_the_free_memory(version, tmp_path):
    names, hierarchy, limit, used, prefix = GROUPS[version]
    (tmp_path / "cgroup").write_text(names)
    for folder, most, taken in (("a", "max" if version == "second" else 1 << 62, 900), ("a/b", 1000, 700)):
        home = tmp_path / "mounted" / hierarchy / folder
        home.mkdir(parents=True)
        (home / f"memory.{limit}").write_text(f"{most}\n")
        (home / f"memory.{used}").write_text(f"{taken}\n")
        (home / "memory.stat").write_text(f"anon 9\n{prefix}inactive_file 200\n{prefix}active_file 50\n")
    found = list(memory._left_in_groups(tmp_path / "cgroup", tmp_path / "mounted"))
    assert min(found) == 1000 - 700 + 250
    assert list(memory._left_in_groups(tmp_path / "missing", tmp_path)) == []


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
    kept = {"memory_reserved": lambda device: 2_500, "memory_allocated": lambda device: 1_500}
    free = SimpleNamespace(mem_get_info=lambda device: (2_000, 9_000), **kept)
    monkeypatch.setattr(torch, "get_device_module", lambda device: free)
    assert memory.fits_on(torch.device("cuda", 0), 999)
    assert not memory.fits_on(torch.device("cuda", 0), 1_000)
