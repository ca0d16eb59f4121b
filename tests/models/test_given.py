"""What is given for a model and is none."""

import json

import pytest

from libprune.engine.errors import SourceError
from libprune.models.given import OWN_TYPE, require_content, require_model, require_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def test_a_folder_with_config_and_weights_passes(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    require_model("m", tmp_path)
    require_safetensors("m", tmp_path)
    require_content(tmp_path / "config.json")


def test_a_gguf_file_is_told_by_its_first_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03")
    require_model("m", path)
    for content in (b"", b"GGU", b"not one"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"prepare\.model = 'm' is a file, but no GGUF file"):
            require_model("m", path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(SourceError, match=rf"{name} is not the file but its Git LFS pointer"):
        require_model("m", tmp_path)
    with pytest.raises(SourceError, match="run `git lfs pull`"):
        require_content(tmp_path / name)


def test_an_adapter_and_an_empty_folder_are_no_models(tmp_path):
    with pytest.raises(SourceError, match=r"is a folder without a config\.json"):
        require_model("m", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"is a LoRA adapter.*\.save_pretrained\(\.\.\.\)$"):
        require_model("m", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as some trainers write it beside the adapter
    with pytest.raises(SourceError, match=r"is a LoRA adapter.*\.save_pretrained\(\.\.\.\)$"):
        require_model("m", tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match=r"or remove adapter_config\.json to take the model beside it$"):
        require_model("m", tmp_path)


def test_a_pruned_model_whose_layers_differ_in_width_is_told(tmp_path):
    """It is known by its config, as `libprune.results.folder` writes it; other types of the same beginning pass."""
    config = {"model_type": OWN_TYPE + "llama", "per_layer_config": {"0": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SourceError, match=r"prepare\.model = 'm' was pruned with allocate\.shape: per_layer, .* name the"
    ):
        require_model("m", tmp_path)
    for other in ({"model_type": "pruned_by_others"}, {"model_type": "llama", "per_layer_config": {}}, [config], "{"):
        (tmp_path / "config.json").write_text(other if isinstance(other, str) else json.dumps(other))
        require_model("m", tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "notes.txt"])
def test_weights_that_may_run_code_are_no_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"holds no \.safetensors file") as caught:
        require_safetensors("m", tmp_path)
    assert (f"{name}, a pickle" in str(caught.value)) == (name != "notes.txt")
