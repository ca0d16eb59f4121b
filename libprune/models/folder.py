"""Hugging Face model folders: reading and loading them, their fingerprint, and writing that of the dense model."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, ParamsError, SourceError, missing_key, naming
from libprune.engine.heads import head_of
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.atomic import writing_folder


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a model folder by name, read from its safetensors files one at a time.

    Raises:
        ArtifactError: if the folder holds no safetensors file, or one that cannot be read; on access, if it holds no
            tensor of that name.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open_tensors(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
        if not self._files:
            raise ArtifactError(f"{folder} holds no .safetensors file; a model folder needs one")
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ArtifactError(missing_key(name, self._files, f"the weights in {self._folder}"))
        with open_tensors(self._files[name]) as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, as `safe_open` does.

    Raises:
        ArtifactError: if it cannot be read, with the reason; inside the context, too.
    """
    with naming(f"{path} cannot be read as safetensors", ArtifactError):
        require_content(path)
        with safe_open(path, framework="pt") as file:
            yield file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: if it cannot be read, with the reason.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


_POINTER = b"version https://git-lfs"


def require_content(path: Path) -> None:
    """Stop where a file is only the pointer to its content that Git LFS leaves in a clone without its files.

    Raises:
        SourceError: naming the file, and the command that fetches its content; or if it is none.
    """
    _require_file(path)
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise SourceError(
                f"{path} is not the file but its Git LFS pointer; run `git lfs pull` in its repository, or download it"
            )


def require_files(folder: Path) -> None:
    """Stop at what is in a folder and is neither file nor folder: reading a pipe or a device may never end.

    Raises:
        SourceError: naming it.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            _require_file(path)


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise SourceError(f"{path} is no file but a folder, a pipe or a device; remove it")


def fingerprint(folder: Path) -> str:
    """The digest of a model folder's config and weights; two folders with one fingerprint hold the same model."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        for chunk in _chunks(path):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk


def sha256(path: Path) -> str:
    """The SHA-256 digest of one file, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def load_model(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Load the model of a local folder on the CPU, in evaluation mode and in the given dtype.

    Args:
        folder: the model folder.
        dtype: dtype of the parameters.
        trust_remote_code: whether the folder's own modeling file may be run.
        config: a config in place of the folder's own.

    Raises:
        ArtifactError: if it cannot be loaded, with the reason.
    """
    architectures = read_json(folder / "config.json", "slice").get("architectures")
    with naming(f"the model in {folder} cannot be loaded", ArtifactError):
        model: PreTrainedModel = head_of(architectures).loader.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return model.eval()


def load_config(folder: Path) -> PreTrainedConfig:
    """Load the config of a local model folder.

    Raises:
        SourceError: if it is none, with the reason.
    """
    with naming(f"{folder / 'config.json'} cannot be read", SourceError):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def require_positions(config: PreTrainedConfig, architecture: Architecture, lengths: Mapping[str, int]) -> None:
    """Stop if a sequence would be longer than a model with learned positions can take; other models have no limit.

    Args:
        config: config of the dense model.
        lengths: tokens of the longest sequence, by the names of the params that ask for it.

    Raises:
        ParamsError: naming the params and the limit.
    """
    if "positions" not in architecture.sizes:
        return
    limit = config.max_position_embeddings
    for what, length in lengths.items():
        if length > limit:
            raise ParamsError(
                f"{what} = {length}, but this {config.model_type} model has learned positions for {limit} tokens; "
                f"lower it to {limit} or less"
            )


def write_dense(target: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the dense model as a plain folder that reloads bit-equal, and return its fingerprint.

    Raises:
        ArtifactError: if a weight reads back differently.
    """
    with writing_folder(target) as folder:
        model.save_pretrained(folder, save_original_format=False)  # tensors by the names of the model's parameters
        tokenizer.save_pretrained(folder)
        written = WeightFiles(folder)
        for name, parameter in model.named_parameters():
            if not torch.equal(written[name], parameter.detach()):
                raise ArtifactError(f"{name} of the dense model does not read back from {folder} as it was written")
        return fingerprint(folder)
