"""Model folders: their tensors, their fingerprint, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, ParamsError
from libprune.models import folder as folders
from libprune.models.folder import (
    WeightFiles,
    fingerprint,
    load_config,
    load_model,
    require_positions,
    write_dense,
)
from libprune.pipeline.digests import sha256
from tests.support.models import FAMILIES
from tests.support.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_tensors_of_several_files_are_read_by_name(tmp_path):
    tensors = {name: torch.randn(2, 3) for name in "abc"}
    save_file({"a": tensors["a"], "c": tensors["c"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    weights = WeightFiles(tmp_path)
    assert sorted(weights) == sorted(tensors)
    assert len(weights) == 3
    assert "b" in weights
    assert "d" not in weights
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], tensor)
    with pytest.raises(ArtifactError, match="aa"):
        weights["aa"]


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no \.safetensors file"):
        WeightFiles(tmp_path)


def test_a_fingerprint_is_that_of_config_and_weights_alone(folder, copy):
    name = fingerprint(folder)
    (copy / "README.md").write_text("other")
    assert fingerprint(copy) == name
    weights = {key: tensor.clone() for key, tensor in WeightFiles(copy).items()}
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    changed = fingerprint(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert len({name, changed, fingerprint(copy)}) == 3


def test_the_digest_of_a_file_is_its_sha256_whatever_its_size(tmp_path):
    for content in (b"", b"text", bytes(5 << 20)):
        (tmp_path / "file").write_bytes(content)
        assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_model_is_loaded_for_evaluation_in_the_dtype_asked_for(folder):
    model = load_model(folder, torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_another_config_takes_the_place_of_the_folders_own(folder):
    config = load_config(folder)
    config.rms_norm_eps = 0.5
    assert load_model(folder, torch.float32, config=config).config.rms_norm_eps == 0.5
    assert load_model(folder, torch.float32).config.rms_norm_eps != 0.5


def test_learned_positions_limit_the_length_of_sequences():
    model = FAMILIES["gpt2"](0)
    architecture = describe(model)
    require_positions(model.config, architecture, {"tokenize.calibration_length": 50})
    with pytest.raises(ParamsError, match=r"tokenize\.evaluation_length = 51, but this gpt2 model .* lower it to 50"):
        require_positions(model.config, architecture, {"tokenize.evaluation_length": 51})
    rotary = FAMILIES["llama"](0)
    require_positions(rotary.config, describe(rotary), {"tokenize.evaluation_length": 10**9})


def test_a_weight_that_does_not_read_back_is_an_error_and_leaves_no_folder(folder, tmp_path, monkeypatch):
    model, tokenizer = load_model(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    getitem = WeightFiles.__getitem__
    monkeypatch.setattr(folders.WeightFiles, "__getitem__", lambda self, name: getitem(self, name) + 1)
    with pytest.raises(ArtifactError, match="of the dense model does not read back from "):
        write_dense(tmp_path / "model", model, tokenizer)
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    assert write_dense(tmp_path / "model", model, tokenizer) == fingerprint(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
