"""Models from where users have them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from libprune.engine.errors import SourceError
from libprune.models.folder import write_dense
from libprune.models.source import follow_gguf, load_dense
from libprune.models.tokens import Frame, frame_of
from libprune.pipeline.sections import Prepare
from tests.support.tiny import write_model


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


@pytest.mark.parametrize(
    ("kind", "said", "begins", "ends"),
    [
        ("gpt2", {}, False, False),
        ("gpt2", {"add_bos_token": True}, True, False),
        ("llama", {}, True, False),
        ("llama", {"add_bos_token": False, "add_eos_token": True}, False, True),
        ("llama", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_the_tokenizer_of_a_gguf_file_does_what_the_metadata_say(tmp_path, kind, said, begins, ends, before):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model(kind)
    for key, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, add_bos_token=before, **names)
    follow_gguf(tokenizer, tmp_path / "m.gguf")
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert frame_of(one) == Frame((1,) * begins, (2,) * ends)
