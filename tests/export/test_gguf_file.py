"""GGUF files, read back by the package gguf, and run by llama.cpp."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from libprune.engine.errors import ExportError
from libprune.engine.family import families
from libprune.export.formats import GgufFile
from libprune.export.gguf_file import (
    TYPES,
    cautions,
    llama3_factors,
    paired,
    stored_layers,
    stored_type,
    told_by,
    unfilled,
    write_gguf,
)
from libprune.export.source import Source
from libprune.results.record import Record
from tests.support.exported import distance, texts, write_pruned
from tests.support.models import FAMILIES, FFN, heads, tiny_model

DESCRIBED = [family for family in families().values() if family.gguf is not None]
UNIFORM = ("llama", "mistral", "gemma2")
CHANNELS = ("qwen2", "olmo2", "starcoder2", "gpt2")
"""Families whose heads llama.cpp wants all."""


def written(path: Path, source: Source, kind: str) -> gguf.GGUFReader:
    write_gguf(path, source, kind)
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes"])
def test_every_tensor_and_key_is_read_back(tmp_path, kind):
    _, source = write_pruned(tmp_path, "llama", kind)
    reader = written(tmp_path / "model.gguf", source, "f32")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    name = "llama" if kind == "uniform" else "deci"
    assert keys["general.architecture"] == name
    assert keys[f"{name}.block_count"] == len(source.layers)
    said = keys[f"{name}.feed_forward_length"], keys[f"{name}.attention.head_count"]
    layers = stored_layers(source)
    channels, queries = [layer.channels for layer in layers], [layer.heads for layer in layers]
    assert said == ((channels[0], queries[0]) if kind == "uniform" else (channels, queries))
    assert keys[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(source.config.rms_norm_eps)
    assert keys[f"{name}.rope.freq_base"] == source.config.rope_parameters["rope_theta"]
    assert keys[f"{name}.attention.key_length"] == source.head_dim
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    layer = max(index for index, one in enumerate(source.layers) if one.channels and one.heads)
    down = source.weights[f"model.layers.{layer}.mlp.down_proj.weight"]
    assert np.array_equal(stored[f"blk.{layer}.ffn_down.weight"].reshape(down.shape), down.numpy())
    added = [(index, "ffn") for index, one in enumerate(layers) if one.channels > source.layers[index].channels]
    added += [(index, "attn") for index, one in enumerate(layers) if one.heads > source.layers[index].heads]
    for index, part in added:
        maps = [name for name in stored if name.startswith(f"blk.{index}.{part}_") and "norm" not in name]
        assert maps and not any(stored[name].any() for name in maps)
    # A channel of zeros stands where only the MLP is gone, a head where the first layer has no attention.
    assert added == ([(1, "ffn"), (0, "attn")] if kind == "holes" else [])
    assert len(stored) == len(source.weights) + sum({"ffn": 4, "attn": 5}[part] for _, part in added)


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_stored_as_the_package_gguf_makes_it(tmp_path, kind):
    _, source = write_pruned(tmp_path, "llama", "uniform")
    reader = written(tmp_path / "model.gguf", source, kind)
    asked, file_type = TYPES[kind]
    assert reader.fields["general.file_type"].contents() == file_type
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    stored = gguf.dequantize(embedding.data, embedding.tensor_type).reshape(tuple(reversed(embedding.shape)))
    whole = source.weights["model.embed_tokens.weight"].float().numpy()
    assert np.abs(stored - whole).max() <= {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-3}[kind]
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds["output_norm.weight"] == gguf.GGMLQuantizationType.F32
    # 30 numbers fill no block of 32
    assert kinds["token_embd.weight"] == (gguf.GGMLQuantizationType.F16 if kind == "q8_0" else asked)
    assert stored_type("blk.0.ffn_up.weight", (4, 64), asked) == asked


@pytest.mark.parametrize("name", [*UNIFORM, *CHANNELS])
def test_llama_cpp_computes_the_pruned_model(tmp_path, name):
    _, source = write_pruned(tmp_path, name, "channels" if name in CHANNELS else "uniform")
    _runs(tmp_path, source, "f32")


@pytest.mark.parametrize("kind", ["per_layer", "holes", "shallow"])
def test_llama_cpp_computes_layers_of_their_own_widths(tmp_path, kind):
    _, source = write_pruned(tmp_path, "llama_mha", kind)
    _runs(tmp_path, source, "f32")


@pytest.mark.parametrize("kind", ["uniform", "per_layer"])
def test_llama_cpp_computes_fewer_query_heads_in_each_group(tmp_path, kind):
    """Queries are reordered by heads, keys by groups; in layers of their own numbers each by its own."""
    layers = [(3, 1), (1, 2), (2, 1), (3, 2)]
    _, source = write_pruned(tmp_path, "llama", kind, lambda layer: layers[layer] if kind == "per_layer" else (3, 1))
    found = [(layer.groups, layer.heads // layer.groups) for layer in source.layers]
    assert found == (layers if kind == "per_layer" else [(3, 1)] * 4)
    _runs(tmp_path, source, "f32")


def test_llama_cpp_computes_qwen3_with_norms_on_its_heads(tmp_path, monkeypatch):
    plain = tiny_model(Qwen3Config, **FFN, **heads(26, 3, 3, 4), tie_word_embeddings=True)
    monkeypatch.setitem(FAMILIES, "qwen3 without biases", plain)
    _, source = write_pruned(tmp_path, "qwen3 without biases", "uniform")
    _runs(tmp_path, source, "f32")


def test_llama_cpp_computes_rounded_weights(tmp_path):
    source, _ = write_pruned(tmp_path, "llama", "uniform")
    _runs(tmp_path, source, "bf16", limit=0.2)


def _runs(folder: Path, source: Source, kind: str, limit: float = 1e-2) -> None:
    form = GgufFile(kind, threads=1)
    form.write(folder / "model.gguf", source)
    ids = texts(length=4 if cautions(source) else 24)  # within the window, where llama.cpp knows none
    assert distance(form, folder / "model.gguf", source, ids) < limit


def test_a_window_that_llama_cpp_ignores_is_told(tmp_path):
    _, source = write_pruned(tmp_path, "mistral", "uniform")
    (caution,) = cautions(source)
    assert "llama.cpp attends to all of them" in caution
    assert "more than 5 tokens" in caution
    _, whole = write_pruned(tmp_path / "whole", "llama", "uniform")
    assert cautions(whole) == []


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("phi3", "uniform", "of which libprune writes no GGUF file.*convert_hf_to_gguf.py"),
        ("bert", "uniform", "of which libprune writes no GGUF file; take gguf out"),
        ("mistral3", "uniform", "of family 'mistral3' .*of which libprune writes no GGUF file.*convert_hf_to_gguf.py"),
        ("qwen3", "uniform", r"has model\.layers\.0\.self_attn\.o_proj\.bias, and llama\.cpp's"),
        ("qwen2", "uniform", "wants heads that are together as wide as the hidden state, 36; keep all attention"),
        ("qwen2", "per_layer", "has one width for all of them; set allocate.shape to uniform"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(tmp_path, name, kind, message):
    _, source = write_pruned(tmp_path, name, kind)
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "model.gguf", source, "f16")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("made", "cure"),
    [
        ({"files": {"config.json": {}}}, "keep all attention groups (allocate.min_groups), or take"),
        ({"files": {"config.json": {}}, "columns": {"before": 48, "after": 36}}, "(allocate.width: null), or take"),
        ({"plan": {"heads": {"attention": 3}, "shape": "uniform"}}, "all query heads (prepare.heads: groups, with"),
        ({}, "the hidden state, 36; or take gguf out of export.formats"),
    ],
)
def test_what_made_the_heads_too_narrow_is_named(tmp_path, made, cure):
    """The groups, the columns, the query heads; nothing of a dense model, which was given so."""
    _, source = write_pruned(tmp_path, "qwen2", "uniform")
    record = Record(source.folder, {"plan": {"shape": "uniform"}} | made)
    with pytest.raises(ExportError, match=re.escape(cure)):
        told_by(Source(record))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "always computes silu"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "of type 'dynamic'"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, key, value, message):
    _, source = write_pruned(tmp_path, "llama", "uniform")
    record = Record(source.folder, source.record.provenance)
    record.config[key] = value
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "model.gguf", Source(record), "f16")


@pytest.mark.parametrize("family", DESCRIBED, ids=lambda family: family.family)
def test_families_name_architectures_and_modules_that_exist(family):
    told = family.gguf
    names = set(gguf.MODEL_ARCH_NAMES.values())
    assert {told.architecture, told.per_layer or told.architecture} <= names
    modules = {path for part in family.parts.values() for path in part.modules}
    assert set(told.paired) <= modules
    keys = {*told.fixed, *told.keys.values(), *([told.window] if told.window else [])}
    assert keys <= family.config.known


def test_weights_beyond_the_range_of_float16_are_refused_for_it_and_written_in_bfloat16(tmp_path):
    _, source = write_pruned(tmp_path, "llama", "uniform")
    state = load_file(source.folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(state, source.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight of .*beyond the range of float16 \(1e\+05\)"):
        write_gguf(tmp_path / "model.gguf", source, "f16")
    assert written(tmp_path / "model.gguf", source, "bf16").tensors


def test_a_masked_language_model_has_no_gguf(tmp_path):
    _, source = write_pruned(tmp_path, "bert", "uniform")
    with pytest.raises(ExportError, match="BertForMaskedLM"):
        told_by(source)


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes"])
def test_rows_that_fill_no_blocks_are_told_where_a_matrix_stays_in_16_bits(tmp_path, kind):
    """By the lengths of the model's rows; all matrices that have them are written in float16 in place of Q8_0."""
    _, source = write_pruned(tmp_path, "llama_mha", kind)
    reader = written(tmp_path / "model.gguf", source, "q8_0")
    rounded = {int(tensor.shape[0]) for tensor in reader.tensors if tensor.tensor_type == GGMLQuantizationType.F16}
    rows = {values.shape[-1] for values in source.weights.values() if values.ndim == 2}
    lengths = sorted(length for length in rows if length % 32)
    assert set(lengths) <= rounded <= {*lengths, 1}  # a channel of zeros stands where only the MLP is gone
    (caution,) = unfilled(source)
    shown = " or ".join(map(str, lengths[:3])) + (" or others" if len(lengths) > 3 else "")
    assert caution.startswith(f"Rows of {shown} numbers fill no blocks of 32, ")
    form = GgufFile("q8_0", threads=1)
    assert caution in form.cautions(source)
    assert caution not in GgufFile("f16", threads=1).cautions(source)


def test_rows_that_fill_blocks_need_no_caution(tmp_path, monkeypatch):
    even = tiny_model(LlamaConfig, intermediate_size=64, **heads(64, 2, 2, 16))
    monkeypatch.setitem(FAMILIES, "even", even)
    source, _ = write_pruned(tmp_path, "even", "uniform")
    assert unfilled(source) == []


@given(heads=st.integers(1, 4), half=st.integers(1, 4), width=st.integers(1, 3))
def test_rows_that_rotate_together_become_neighbours(heads, half, width):
    rows = torch.arange(heads * 2 * half * width).reshape(-1, width)
    moved = paired(rows, heads)
    assert sorted(moved.flatten().tolist()) == rows.flatten().tolist()
    for head in range(heads):
        own = slice(head * 2 * half, (head + 1) * 2 * half)
        before, after = rows[own], moved[own]
        for index in range(half):
            assert torch.equal(after[2 * index], before[index])
            assert torch.equal(after[2 * index + 1], before[index + half])


@given(
    factor=st.floats(1.5, 32),
    low=st.floats(0.5, 2),
    above=st.floats(0.5, 4),
    whole=st.integers(32, 8192),
    half=st.integers(2, 32),
)
def test_factors_of_llama_3_are_those_of_transformers(factor, low, above, whole, half):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": low}
    rope |= {"high_freq_factor": low + above, "original_max_position_embeddings": whole}
    config = LlamaConfig(hidden_size=4 * half, num_attention_heads=2, head_dim=2 * half, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (np.arange(0, 2 * half, 2) / (2 * half))
    assert np.allclose(plain / llama3_factors(rope, 2 * half), scaled.numpy(), rtol=1e-5)
