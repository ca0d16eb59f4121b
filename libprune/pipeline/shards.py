"""The shards of the collecting stages: one safetensors file a layer."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from libprune.engine.errors import ArtifactError, missing_key
from libprune.pipeline.artifacts import damage, decode_meta, encode_meta, require, same_origin
from libprune.pipeline.digests import require_digest, text_digest

GRAM, HELD_OUT, ROUTED = ".input_gram", ".input_held_out", ".routed"
"""Endings of the names of a map's Gram matrix, of its held-out inputs, and of how the experts of a mixture are used,
behind the module's path."""
BINS = 128
"""Number of bins of a histogram of activations x: halves of the octaves of |x| from 2^-20 to 2^12, negative values
behind positive ones."""


def shard_path(folder: Path, layer: int) -> Path:
    """The file that holds the tensors of one layer."""
    return folder / f"layer-{layer:03d}.safetensors"


def write_shard(folder: Path, layer: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the tensors of one layer and the metadata of the artifact."""
    save_tensors(shard_path(folder, layer), tensors, meta)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors with metadata and the digests of both."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = text_digest(meta)
    seal = {"": about, **{name: _digest(name, tensor, about) for name, tensor in contiguous.items()}}
    save_file(contiguous, path, metadata=encode_meta(meta, seal))


def _digest(name: str, tensor: Tensor, about: str) -> str:
    """The digest of a tensor with its name, type and shape, and of the digest of the metadata."""
    digest = hashlib.sha256(f"{about} {name} {tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensor(folder: Path, layer: int, name: str, stage: str) -> Tensor:
    """One tensor of a layer's shard.

    Raises:
        ArtifactError: if the shard is missing or damaged, holds no such tensor, or is not of one artifact with the
            first one.
    """
    path = require(shard_path(folder, layer), stage)
    tensor, meta = load_tensor(path, name, stage)
    same_origin(path, meta, read_meta(folder, stage))
    return tensor


def load_tensor(path: Path, name: str, stage: str) -> tuple[Tensor, dict[str, Any]]:
    """One tensor of a file of `save_tensors`, and the metadata.

    Raises:
        ArtifactError: if the file is damaged, or holds no such tensor.
    """
    with damage(path, stage), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if name not in names:
            raise ArtifactError(missing_key(name, names, str(path)))
        tensor: Tensor = file.get_tensor(name)
        meta, seal = decode_meta(path, file.metadata(), stage)
        if seal is not None:
            require_digest(path, seal.get(name, ""), _digest(name, tensor, text_digest(meta)))
    return tensor, meta


def read_meta(folder: Path, stage: str) -> dict[str, Any]:
    """The metadata of a stage's shards, read from the first.

    Raises:
        ArtifactError: if the shard is missing, damaged, or was not written by libprune.
    """
    path = require(shard_path(folder, 0), stage)
    with damage(path, stage), safe_open(path, framework="pt") as file:
        meta, seal = decode_meta(path, file.metadata(), stage)
        if seal is not None:
            require_digest(path, seal.get("", ""), text_digest(meta))
    return meta
