"""Writing a pruned model as a GGUF file, which llama.cpp and what builds on it read.

The names of tensors and of metadata are those of the package gguf. What llama.cpp computes otherwise than transformers
stands in the family files, under `gguf`: docs/serving.md says which programs these files were tried in.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from libprune.engine.errors import ExportError
from libprune.engine.family import Gguf
from libprune.engine.heads import writes
from libprune.export.source import Layer, Source
from libprune.export.vocabulary import write_vocabulary

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""The types that matrices can be stored in, with what the package gguf calls the matrix's and the file's type."""
_SHOWN = 3


def write_gguf(path: Path, source: Source, kind: str) -> None:
    """Write the model of a folder as a GGUF file.

    Args:
        path: the file.
        source: the model.
        kind: the type that matrices are stored in, one of `TYPES`; vectors are stored in float32.

    Raises:
        ExportError: if llama.cpp has no architecture that computes what the model does, or not its tokenizer.
    """
    told = told_by(source)
    name = told.architecture if source.uniform else told.per_layer
    assert name is not None
    quantization, file_type = TYPES[kind]
    writer = GGUFWriter(path, name)
    try:
        _write_origin(writer, source)
        _write_sizes(writer, source, told)
        writer.add_file_type(file_type)
        write_vocabulary(writer, source.folder, source.config.vocab_size)
        for tensor, values in _tensors(source, told, name):
            stored = stored_type(tensor, values.shape, quantization)
            shape = gguf.quant_shape_to_byte_shape(values.shape, stored)
            writer.add_tensor_info(tensor, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, values in _tensors(source, told, name):  # once more, so that one tensor at a time is in memory
            stored = stored_type(tensor, values.shape, quantization)
            _require_range(source, tensor, values, stored)
            writer.write_tensor_data(gguf.quantize(values, stored))
    finally:
        writer.close()


def told_by(source: Source) -> Gguf:
    """What the family file says of GGUF, if the model can be written so.

    Raises:
        ExportError: saying what llama.cpp lacks.
    """
    family, config = source.family, source.config
    told = family.gguf
    if told is None or source.head != "causal_lm":
        raise ExportError(
            f"{source.folder} is of family {family.family!r} ({config.architectures[0]}), of which libprune writes no "
            "GGUF file; take gguf out of export.formats"
            + (", or use convert_hf_to_gguf.py of llama.cpp" if writes(source.head) else "")
        )
    for key, allowed in told.fixed.items():
        if getattr(config, key, allowed[0]) not in allowed:
            raise ExportError(
                f"{source.folder} has {key} = {getattr(config, key)!r}; llama.cpp's {told.architecture} always "
                f"computes {' or '.join(map(str, allowed))}. Take gguf out of export.formats"
            )
    if not source.uniform and told.per_layer is None:
        raise ExportError(
            f"the layers of {source.folder} differ in width, and llama.cpp's architecture {told.architecture!r} has "
            "one width for all of them; set allocate.shape to uniform, or take gguf out of export.formats"
        )
    for name in source.weights:
        place = source.place(name)
        if name.endswith(".bias") and place is not None and place.module in told.unbiased:
            raise ExportError(
                f"{source.folder} has {name}, and llama.cpp's architecture {told.architecture!r} has no such bias. "
                "Take gguf out of export.formats"
            )
    if told.square and source.layers[0].heads * source.head_dim != config.hidden_size:
        raise ExportError(
            f"{source.folder} has {source.layers[0].heads} heads of {source.head_dim}, and llama.cpp's architecture "
            f"{told.architecture!r} wants heads that are together as wide as the hidden state, {config.hidden_size}; "
            f"{_kept(source)}or take gguf out of export.formats"
        )
    return told


def _kept(source: Source) -> str:
    """What a pruned model would have to keep, so that its heads are together as wide as the hidden state."""
    made = source.record.provenance
    if "columns" in made:
        return "keep all columns of the residual stream (allocate.width: null), "
    if source.record.heads == "queries":
        return "keep all query heads (prepare.heads: groups, with allocate.min_groups), "
    return "keep all attention groups (allocate.min_groups), " if source.record.files else ""


def cautions(source: Source) -> list[str]:
    """What llama.cpp will do otherwise than the model, in sentences; nothing of it shows on short texts."""
    told, window = told_by(source), None
    if told.window is not None:
        window = getattr(source.config, told.window, None)
    if window is None or window >= source.config.max_position_embeddings:
        return []
    return [
        f"The model attends to the last {window:,} tokens in some layers; llama.cpp attends to all of them, so that "
        f"texts of more than {window:,} tokens come out otherwise."
    ]


def unfilled(source: Source) -> list[str]:
    """Which rows are no multiple of a block of quantised types, so that they stay in 16 bits, in a sentence."""
    block, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    lengths = {source.config.hidden_size}
    lengths |= {length for layer in source.layers for length in (layer.channels, layer.heads * source.head_dim)}
    if not (odd := sorted(length for length in lengths if length % block)):
        return []
    shown = " or ".join(f"{length:,}" for length in odd[:_SHOWN]) + (" or others" if len(odd) > _SHOWN else "")
    return [
        f"Rows of {shown} numbers fill no blocks of {block}, so that matrices with such rows stay in 16 bits in Q8_0, "
        "Q4_K_M and other quantised types; allocate.width, allocate.channel_multiple and export.pad_channels choose "
        "the lengths of rows."
    ]


def stored_type(name: str, shape: tuple[int, ...], asked: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that a tensor is stored in when a file of a type is asked for.

    Vectors and positions stay in float32. Rows that do not fill the blocks of a type are stored in float16 instead, as
    convert_hf_to_gguf.py of llama.cpp does.
    """
    block, _ = gguf.GGML_QUANT_SIZES[asked]
    if len(shape) < 2 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    return asked if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _require_range(source: Source, name: str, values: NDArray[np.float32], kind: GGMLQuantizationType) -> None:
    if kind == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ExportError(
            f"{name} of {source.folder} has weights beyond the range of float16 ({np.abs(values).max():.3g}); set "
            "export.gguf_types to [bf16]"
        )


def _write_origin(writer: GGUFWriter, source: Source) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    origin = source.origin
    writer.add_name(f"{origin.get('name') or source.config.model_type} pruned by libprune")
    if licence := origin.get("license"):
        writer.add_license(licence)
    if base := origin.get("base_model"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def _write_sizes(writer: GGUFWriter, source: Source, told: Gguf) -> None:
    config, layers = source.config, stored_layers(source)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(_one([layer.channels for layer in layers], source))
    writer.add_head_count(_one([layer.heads for layer in layers], source))
    writer.add_head_count_kv(_one([layer.groups for layer in layers], source))
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    for key in ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"):
        if (epsilon := getattr(config, key, None)) is not None:
            (writer.add_layer_norm_rms_eps if key == "rms_norm_eps" else writer.add_layer_norm_eps)(epsilon)
            break
    _write_rope(writer, source)
    for key, name in told.keys.items():
        if (value := getattr(config, name)) is not None:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{writer.arch}.{key}", value)


def _one(values: list[int], source: Source) -> int | list[int]:
    """One number for all layers, as architectures with equal layers read it, or one a layer."""
    return values[0] if source.uniform else values


def stored_layers(source: Source) -> tuple[Layer, ...]:
    """The layers as the file says them: a part of zeros stands where llama.cpp cannot do without one.

    Its architecture `deci` drops the attention of a layer without channels, and takes the size of a head from the first
    layer.
    """
    layers = [replace(layer, channels=max(layer.channels, min(layer.heads, 1))) for layer in source.layers]
    if not layers[0].heads:
        layers[0] = replace(layers[0], heads=1, groups=1)
    return tuple(layers)


def _write_rope(writer: GGUFWriter, source: Source) -> None:
    rope = source.rope
    if rope is None:
        return
    writer.add_rope_dimension_count(int(source.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in {"default", "llama3"}:
        raise ExportError(
            f"{source.folder} has rotary positions of type {kind!r}, which libprune does not write into GGUF files; "
            "use convert_hf_to_gguf.py of llama.cpp, or take gguf out of export.formats"
        )


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """By how much each rotary frequency of Llama 3.1 is divided; ``[head_dim / 2]``.

    The same formula as `_compute_llama3_parameters` of transformers: frequencies with a long wavelength are divided by
    `factor`, those with a short one stay, and between them the two are mixed.
    """
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, whole = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((whole / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _tensors(source: Source, told: Gguf, architecture: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """All tensors by the names of llama.cpp, one at a time, in float32."""
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, len(source.layers))
    if source.rope is not None and source.rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_factors(source.rope, source.head_dim)
    for name in source.weights:
        if source.config.tie_word_embeddings and name.startswith("lm_head."):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"llama.cpp's architecture {architecture!r} has no tensor for {name} of {source.folder}")
        yield target, _stored(source, told, name).numpy()
    for index, (layer, stored) in enumerate(zip(source.layers, stored_layers(source), strict=True)):
        if stored.channels > layer.channels:
            yield from _zeros(index, "ffn", {"gate": 1, "up": 1, "down": -1}, source.config.hidden_size)
        if stored.heads > layer.heads:
            size = source.head_dim
            yield from _zeros(
                index, "attn", {"q": size, "k": size, "v": size, "output": -size}, source.config.hidden_size
            )


def _zeros(layer: int, part: str, sizes: Mapping[str, int], width: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The tensors of a part that adds nothing; the size of a map that leads back to the hidden state is negative."""
    yield f"blk.{layer}.{part}_norm.weight", np.ones(width, dtype=np.float32)
    for name, size in sizes.items():
        shape = (size, width) if size > 0 else (width, -size)
        yield f"blk.{layer}.{part}_{name}.weight", np.zeros(shape, dtype=np.float32)


def _stored(source: Source, told: Gguf, name: str) -> Tensor:
    """A parameter in float32, as llama.cpp wants it."""
    values = source.weights[name].float()
    place = source.place(name)
    if place is not None and place.module in told.paired:
        values = paired(values, values.shape[0] // source.head_dim)
    if place is not None and place.transposed and values.ndim == 2:
        values = values.T.contiguous()
    if told.shifted and name.endswith("norm.weight"):
        values = values + 1
    return values


def paired(values: Tensor, heads: int) -> Tensor:
    """Rows of heads, reordered so that the two that rotate together are neighbours.

    Args:
        values: ``[heads * head_dim, ...]``; row i of a head rotates with row i + head_dim / 2.
        heads: number of heads.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)
