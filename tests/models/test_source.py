"""Models from where users have them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from libprune.engine.describe import describe
from libprune.engine.errors import SourceError
from libprune.models.folder import load_model, write_dense
from libprune.models.source import follow_gguf, load_dense, load_dense_config, processor_files, stored_format
from libprune.models.tokens import Frame, frame_of
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare
from libprune.statistics.dense import prepare_layout
from tests.support.models import FAMILIES, TOWERS, Dense, heads, prune, random_plan
from tests.support.tiny import VOCABULARY, write_encoder, write_model, write_tokenizer


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
    with pytest.raises(SourceError, match=r"prepare\.model = '.*' is a folder without a config\.json"):
        load_dense(Prepare(model=str(tmp_path)))
    (tmp_path / "model.gguf").write_text("not one")
    with pytest.raises(SourceError, match=r"model\.gguf' is a file, but no GGUF file"):
        load_dense(Prepare(model=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fbgemm_fp8", "unheard-of"])
def test_a_quantized_model_is_refused_with_its_method(folder, tmp_path, method):
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=rf"is quantized \({method}\); prune the unquantized model"):
        load_dense(Prepare(model=str(tmp_path)))


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""What the 16 codes of four bits mean: a sign, two bits of exponent and one of mantissa."""


def stored_again(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    """Put other tensors in the place of those of a folder, and say in its config how they are quantized."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.fixture
def gpt_oss(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GPT-OSS with its experts in MXFP4, laid out as published, and what the blocks of them mean."""
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": len(VOCABULARY)}
    config = GptOssConfig(**sizes, **heads(64, 2, 2, 8), num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16")
    model = GptOssForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    stored, meant = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
        meant[name] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).mT
    stored_again(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return tmp_path, meant


def test_mxfp4_is_dequantised_as_it_is_loaded_and_the_result_has_no_mark_of_it(gpt_oss, tmp_path_factory, capsys):
    folder, meant = gpt_oss
    params = Prepare(model=str(folder))
    layout = Layout(tmp_path_factory.mktemp("artifacts"))
    prepare_layout(layout, params)
    assert (
        "is stored in mxfp4; it is dequantised, and what is made of it is written in bfloat16"
        in capsys.readouterr().out
    )
    model = load_model(layout.model, torch.bfloat16)
    assert stored_format(params) == "mxfp4"
    for name, expected in meant.items():
        assert torch.equal(model.get_parameter(name).float(), expected)
    architecture = describe(model)
    pruned = tmp_path_factory.mktemp("pruned")
    dense = Dense(layout.model, model, architecture)
    result = prune(dense, random_plan(architecture, "uniform"), False, pruned)
    for written in (layout.model, pruned):
        assert "quantization_config" not in json.loads((written / "config.json").read_text())
        assert {tensor.dtype for tensor in load_file(written / "model.safetensors").values()} == {torch.bfloat16}
    assert result.model.config.num_local_experts < 4


def test_fp8_is_dequantised_as_it_is_loaded(tmp_path):
    FAMILIES["deepseek_v3"](0).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    stored, meant = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("proj.weight")]:
        scale = torch.rand(1, 1) / 64
        quantized = (stored[name] / scale).to(torch.float8_e4m3fn)
        stored |= {name: quantized, f"{name}_scale_inv": scale}
        meant[name] = quantized.float() * scale
    about = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    stored_again(tmp_path, stored, about)
    model, _ = load_dense(Prepare(model=str(tmp_path)))
    assert not hasattr(model.config, "quantization_config")
    plain, experts = model.get_parameter("model.layers.2.self_attn.o_proj.weight"), model.model.layers[2].mlp.experts
    assert torch.equal(plain, meant["model.layers.2.self_attn.o_proj.weight"])
    assert torch.equal(experts.down_proj[3], meant["model.layers.2.mlp.experts.3.down_proj.weight"])
    assert torch.equal(experts.gate_up_proj[3][16:], meant["model.layers.2.mlp.experts.3.up_proj.weight"])


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


# Weights that are not those of the config


Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def edited(tmp_path: Path, edit: Edit, family: str = "llama") -> str:
    """The error of loading a model of a family whose weights and config were changed."""
    write_model(tmp_path)
    FAMILIES[family](0).save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    edit(weights, config)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        load_dense(Prepare(model=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert f"prepare.model = {str(tmp_path)!r} " in str(caught.value)
    return str(caught.value)


def layers(change: int) -> Edit:
    def edit(weights: dict, config: dict) -> None:
        key = next((name for name in ("num_hidden_layers", "n_layers", "n_layer") if name in config), "")
        number = (config[key] if key else len(config["layers_block_type"])) + change
        config |= {key: number} if key else {}
        for name in ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type"):  # one entry a layer
            if config.get(name):
                config[name] = (config[name] * 2)[:number]

    return edit


@pytest.mark.parametrize("family", FAMILIES)
def test_more_or_fewer_layers_in_the_files_than_in_the_config_are_refused(tmp_path, family):
    number = FAMILIES[family](0).config.num_hidden_layers
    said = edited(tmp_path, layers(-1), family)
    if family == "gemma4_text":  # an embedding outside the layers has columns for each of them
        assert "holds 2 tensors of other shapes than its config.json asks for" in said
        return
    assert re.search(rf"no place for, the first '.*\.{number - 1}\..*'; its config.json says {number - 1} layers", said)
    said = edited(tmp_path, layers(1), family)
    assert re.search(rf"no weights for .* the first '.*\.{number}\..*'; its config.json says {number + 1} layers", said)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_says_tied_while_the_file_holds_another_head_is_refused(tmp_path, family):
    model = FAMILIES[family](0)
    if not model._tied_weights_keys:
        pytest.skip("a classifier's head is no embedding")
    head, embedding = next(iter(model._tied_weights_keys.items()))

    def edit(weights: dict, config: dict) -> None:
        config["tie_word_embeddings"] = True
        weights[head] = model.get_parameter(embedding).detach() + 1

    assert "tie_word_embeddings: true, by which the two are one" in edited(tmp_path, edit, family)


def test_where_the_config_leaves_it_open_the_weights_say_that_the_head_is_its_own(tmp_path):
    """Newer versions of transformers take the key for true that a published config does not hold."""
    TOWERS["mistral3"](0).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    config["text_config"].pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    model, _ = load_dense(Prepare(model=str(tmp_path)))
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_the_files_of_a_processor_are_those_of_a_model_that_reads_images(folder, tmp_path):
    shutil.copyfile(folder / "config.json", folder / "preprocessor_config.json")
    assert processor_files(Prepare(model=str(folder))) == {}
    (folder / "preprocessor_config.json").unlink()
    TOWERS["llava"](0).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlavaForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "chat_template.json", "notes.json"):
        (tmp_path / name).write_text("{}")
    found = processor_files(Prepare(model=str(tmp_path)))
    assert found == {name: tmp_path / name for name in ("preprocessor_config.json", "chat_template.json")}


def renamed(prefix: str) -> Edit:
    def edit(weights: dict, config: dict) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    return edit


def filled(name: str, value: float, entries: int | None = None) -> Edit:
    def edit(weights: dict, config: dict) -> None:
        weights[name].view(-1)[:entries] = value

    return edit


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed("module."), r"begin with 'module\.', which DataParallel adds"),
        (renamed("_orig_mod."), r"begin with '_orig_mod\.', which torch\.compile adds"),
        (filled(UP, torch.nan, 3), rf"'{UP}', in which 3 of [\d,]+ values are not finite"),
        (filled(UP, -torch.inf, 1), rf"'{UP}', in which 1 of [\d,]+ values are not finite"),
        (filled(UP, 0.0), rf"'{UP}', in which all [\d,]+ values are zero"),
        (lambda weights, config: weights.pop(UP), rf"no weights for 1 parameters of a LlamaForCausalLM.*'{UP}'"),
        (lambda weights, config: weights.update(other=torch.ones(2)), "holds 1 tensors .* no place for.*'other'"),
        (
            lambda weights, config: weights.update({UP: weights[UP][:-1].clone()}),
            rf"holds 1 tensors of other shapes.*'{UP}': it is \[\d+, \d+\], expected",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(tmp_path, edit, message):
    assert re.search(message, edited(tmp_path, edit))


def test_tensors_of_other_heads_in_published_checkpoints_are_left_out(tmp_path):
    write_model(tmp_path)
    FAMILIES["bert"](0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    others = ("bert.pooler.dense.weight", "cls.seq_relationship.bias", "bert.embeddings.position_ids")
    save_file(weights | {name: torch.ones(2) for name in others}, tmp_path / "model.safetensors")
    load_dense(Prepare(model=str(tmp_path)))


def test_only_what_is_added_to_the_embeddings_of_tokens_may_be_all_zero(tmp_path):
    """As the embeddings of RoBERTa's only type of text are in what was published."""
    write_encoder(tmp_path, FAMILIES["roberta"])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    types, words = (f"embeddings.{kind}_embeddings.weight" for kind in ("token_type", "word"))
    save_file(weights | {types: torch.zeros_like(weights[types])}, file)
    model, _ = load_dense(Prepare(model=str(tmp_path)))
    assert not model.get_parameter(types).any()
    save_file(weights | {words: torch.zeros_like(weights[words])}, file)
    with pytest.raises(SourceError, match=f"'{words}', in which all [0-9,]+ values are zero"):
        load_dense(Prepare(model=str(tmp_path)))


def test_layers_that_predict_several_tokens_are_left_out_and_told(tmp_path, capsys):
    write_model(tmp_path)
    FAMILIES["qwen3_next"](0).save_pretrained(tmp_path)
    load_dense(Prepare(model=str(tmp_path)))
    assert "does not use" not in capsys.readouterr().out
    weights = load_file(tmp_path / "model.safetensors")
    others = {name: torch.ones(2) for name in ("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight")}
    save_file(weights | others, tmp_path / "model.safetensors")
    load_dense(Prepare(model=str(tmp_path)))
    told = f"{tmp_path} holds 2 tensors that a Qwen3NextForCausalLM does not use, the first 'mtp.fc.weight'; they are"
    assert told in capsys.readouterr().out


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


def test_the_fields_of_a_gguf_file_are_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    read, build = [], GGUFReader._build_fields

    def count(reader, *given):
        read.append(1)
        return build(reader, *given)

    monkeypatch.setattr(GGUFReader, "_build_fields", count)
    for name in ("one", "another"):
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_name(name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        for _ in range(3):
            assert GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == name
    assert len(read) == 2


def test_a_gguf_file_of_experts_is_not_taken_for_a_dense_model(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "expert_count": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"m\.gguf' is a GGUF file of a mixture of 8 experts"):
        load_dense_config(Prepare(model=str(tmp_path / "m.gguf")))
