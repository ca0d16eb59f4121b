"""Models from where users have them, and how sources are found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libprune.engine.errors import SourceError
from libprune.models.folder import write_dense
from libprune.models.source import load_dense, resolve
from libprune.pipeline.sections import Prepare
from tests.support.tiny import write_model

# Where things are


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package that must not be imported: its module raises."""
    folder = tmp_path / "site" / "forbidden_to_import"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "text.txt").write_text("a\nb")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_file_inside_a_package_is_found_without_importing_it(package):
    assert resolve("package://forbidden_to_import/data/text.txt") == package / "data" / "text.txt"


def test_a_missing_package_is_named_with_what_to_do():
    for source in ("package://no_such_package/file", "package:///file", "package://../etc/passwd"):
        with pytest.raises(SourceError, match=r"no installed package is named '.*'; install it with pip"):
            resolve(source)


def test_a_missing_file_of_a_package_is_named_with_what_lies_beside_it(package):
    with pytest.raises(SourceError, match=r"'forbidden_to_import' has no such file; in that folder: text\.txt$"):
        resolve("package://forbidden_to_import/data/txet.txt")
    with pytest.raises(SourceError, match=r"no such file; in that folder: none$"):
        resolve("package://forbidden_to_import/nowhere/text.txt")


def test_a_local_path_is_taken_as_it_is_and_must_exist(tmp_path, monkeypatch):
    (tmp_path / "here.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert resolve("here.txt") == Path("here.txt")
    assert resolve(str(tmp_path)) == tmp_path
    for missing in ("./there", "/no/where", "a/b/c", "there.gguf", "there.jsonl", "~/no/such/file"):
        with pytest.raises(SourceError, match=r"does not exist \(seen from "):
            resolve(missing)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "wikitext"])
def test_a_hub_id_is_left_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None


# Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer as a Hugging Face folder."""
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_damaged_weight_file_is_named(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"damaged' cannot be loaded: .*"):
        load_dense(Prepare(model=str(damaged)))


def test_a_local_folder_is_loaded_and_written_as_a_plain_one(folder, tmp_path):
    model, tokenizer = load_dense(Prepare(model=str(folder)))
    assert not model.training
    fingerprint = write_dense(tmp_path / "model", model, tokenizer)
    again, _ = load_dense(Prepare(model=str(tmp_path / "model")))
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)
    assert write_dense(tmp_path / "again", again, tokenizer) == fingerprint


def test_the_dtype_of_the_source_is_kept_unless_another_is_asked_for(folder):
    assert load_dense(Prepare(model=str(folder)))[0].dtype == torch.float32
    assert load_dense(Prepare(model=str(folder), dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"prepare\.model = '.*' cannot be loaded: "):
        load_dense(Prepare(model=str(tmp_path)))
    (tmp_path / "model.gguf").write_text("not one")
    with pytest.raises(SourceError, match=r"model\.gguf' cannot be loaded: "):
        load_dense(Prepare(model=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "unheard-of"])
def test_a_quantized_model_is_refused_with_its_method(folder, tmp_path, method):
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=rf"is quantized \({method}\); prune the unquantized model"):
        load_dense(Prepare(model=str(tmp_path)))


def changed(folder: Path, target: Path, **tensors: torch.Tensor) -> str:
    """A copy of the folder with other tensors in its weights; its name."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return str(target)


NORM = "model__norm__weight"


def test_a_tensor_of_another_shape_is_named_with_both(folder, tmp_path):
    name = changed(folder, tmp_path / "a", **{NORM: torch.ones(7)})
    with pytest.raises(
        SourceError, match=r"model\.norm\.weight has shape \[7\] in the files, but \[48\] by its config"
    ):
        load_dense(Prepare(model=name))


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 48), (float("inf"), 48)])
def test_weights_that_are_not_finite_are_named(folder, tmp_path, value, count):
    name = changed(folder, tmp_path / "a", **{NORM: torch.full((48,), value)})
    with pytest.raises(SourceError, match=rf"{count} of 48 values of model\.norm\.weight are not finite"):
        load_dense(Prepare(model=name))


def test_weights_that_are_all_zero_are_refused(folder, tmp_path):
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    with pytest.raises(SourceError, match="all matrices of its weights are zero"):
        load_dense(Prepare(model=changed(folder, tmp_path / "a", **zeros)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_named(folder, tmp_path, prefix):
    target = Path(shutil.copytree(folder, tmp_path / "a"))
    path = target / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SourceError, match=f"begin with '{prefix}', as .*a wrapped model was saved"):
        load_dense(Prepare(model=str(target)))


def test_an_adapter_a_pointer_and_a_pickle_are_named_for_what_they_are(folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="is a LoRA adapter, not a model; merge it into its base model first"):
        load_dense(Prepare(model=str(tmp_path / "lora")))
    target = Path(shutil.copytree(folder, tmp_path / "pointer"))
    (target / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SourceError, match=r"model\.safetensors is not the file but its Git LFS pointer"):
        load_dense(Prepare(model=str(target)))
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    (target / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"no \.safetensors file but pytorch_model\.bin, a pickle"):
        load_dense(Prepare(model=str(target)))
