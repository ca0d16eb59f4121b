"""The shards of the collecting stages: one safetensors file a layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from libprune.engine.errors import ArtifactError, missing_key
from libprune.pipeline.artifacts import damage, decode_meta, encode_meta, require

GRAM, HELD_OUT = ".input_gram", ".input_held_out"
"""Endings of the names of a map's Gram matrix and of its held-out inputs, behind the module's path."""
BINS = 128
"""Number of bins of a histogram of activations x: halves of the octaves of |x| from 2^-20 to 2^12, negative values
behind positive ones."""


def shard_path(folder: Path, layer: int) -> Path:
    """The file that holds the tensors of one layer."""
    return folder / f"layer-{layer:03d}.safetensors"


def write_shard(folder: Path, layer: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the tensors of one layer and the metadata of the artifact."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, shard_path(folder, layer), metadata=encode_meta(meta))


def read_tensor(folder: Path, layer: int, name: str, stage: str) -> Tensor:
    """One tensor of a layer's shard.

    Raises:
        ArtifactError: if the shard is missing or damaged, or holds no such tensor.
    """
    path = require(shard_path(folder, layer), stage)
    with damage(path, stage), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if name not in names:
            raise ArtifactError(missing_key(name, names, str(path)))
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_meta(folder: Path, stage: str) -> dict[str, Any]:
    """The metadata of a stage's shards, read from the first.

    Raises:
        ArtifactError: if the shard is missing, damaged, or was not written by libprune.
    """
    path = require(shard_path(folder, 0), stage)
    with damage(path, stage), safe_open(path, framework="pt") as file:
        return decode_meta(path, file.metadata(), stage)
