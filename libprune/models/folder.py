"""Hugging Face model folders: reading and loading them, their fingerprint, and writing that of the dense model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    CHAT_TEMPLATE_DIR,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, ParamsError, SourceError, missing_key, naming
from libprune.engine.heads import head_of
from libprune.models.given import require_content
from libprune.models.memory import loading_on_disk
from libprune.models.sentences import copy_sentence_files
from libprune.pipeline.artifacts import read_json, require
from libprune.pipeline.atomic import writing_folder
from libprune.pipeline.digests import KnownDigests, text_digest
from libprune.pipeline.layout import Layout


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a model folder by name, read from its safetensors files one at a time.

    The file of the tensor that was asked for last stays open.

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
        self._opened: tuple[Path, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ArtifactError(missing_key(name, self._files, f"the weights in {self._folder}"))
        path = self._files[name]
        with naming(_UNREADABLE.format(path), ArtifactError):
            if self._opened is None or self._opened[0] != path:  # to open one is to read the names of all its tensors
                self._opened = path, safe_open(path, framework="pt")
            return self._opened[1].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)
"""The files by which a model that reads images prepares them; nothing in them depends on what is pruned."""
_OF_A_MODEL = {".json", ".safetensors", ".jinja", ".model", ".txt", ".py"}
"""Endings of the files by which a model and its tokenizer are loaded."""


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, as `safe_open` does.

    Raises:
        ArtifactError: if it cannot be read, with the reason; inside the context, too.
    """
    with naming(_UNREADABLE.format(path), ArtifactError):
        require_content(path)
        with safe_open(path, framework="pt") as file:
            yield file


_UNREADABLE = "{} cannot be read as safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: if it cannot be read, with the reason.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fingerprint(folder: Path, known: KnownDigests | None = None) -> str:
    """The digest of a model folder: its config, weights, tokenizer, and code if it has any.

    Args:
        folder: the folder; two with one fingerprint hold the same model.
        known: digests of files that were read before; without them every file is read.
    """
    there = _own_files(folder)
    files = {str(path.relative_to(folder)): path for path in there if path.suffix in _OF_A_MODEL and path.is_file()}
    digests = (known or KnownDigests()).of(files)
    return text_digest(digests)[:16]


def _own_files(folder: Path) -> list[Path]:
    """Everything in a model folder, in that of chat templates and in those of the modules of sentence-transformers."""
    return [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*"), *folder.glob("[0-9]_*/*")]


def own_model(layout: Layout, architecture: Architecture) -> Path:
    """The folder of the dense model, if it holds the model that is described.

    A file is read for this only if it has changed, by size and time, since this was last asked.

    Raises:
        ArtifactError: if it is missing, or holds another model.
    """
    folder = require(layout.model, "prepare")
    if architecture.head == "network":  # named by its weights in memory, not by files
        return folder
    found = fingerprint(folder, KnownDigests(layout.digests))
    if found != architecture.fingerprint:
        raise ArtifactError(
            f"{layout.model} holds the model {found}, but {layout.architecture} describes {architecture.fingerprint}: "
            "a file of the folder was changed, or comes from another run; run `dvc repro prepare`"
        )
    return folder


def load_model(
    folder: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
    scratch: Path | None = None,
) -> PreTrainedModel:
    """Load the model of a local folder on the CPU, in evaluation mode and in the given dtype.

    Args:
        folder: the model folder.
        dtype: dtype of the parameters.
        trust_remote_code: whether the folder's own modeling file may be run.
        config: a config in place of the folder's own.
        scratch: a folder for weights that are stored in another dtype; with it, all weights are mapped from disk, as
            `libprune.models.memory.on_disk`. None to keep them in memory.

    Raises:
        ArtifactError: if it cannot be loaded, with the reason.
    """
    architectures = read_json(folder / "config.json", "slice").get("architectures")
    where = nullcontext() if scratch is None else loading_on_disk(scratch)
    with naming(f"the model in {folder} cannot be loaded", ArtifactError), where:
        model: PreTrainedModel = head_of(architectures).loader.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return model.eval()


def require_own_files(folder: Path) -> None:
    """Stop at a link that leads out of a model folder: what lies there would become part of the result.

    Links into the hub's cache, of which its folders consist, and links to weights are followed.

    Raises:
        SourceError: naming the link and where it leads to.
    """
    root = folder.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in _own_files(folder):
        if path.is_symlink() and path.suffix != ".safetensors" and not any(map(path.resolve().is_relative_to, allowed)):
            raise SourceError(
                f"{path} is a link to {path.resolve()}, outside of the model's folder; put the file itself in its place"
            )


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
    limit = config.max_position_embeddings - architecture.unused_positions
    for what, length in lengths.items():
        if length > limit:
            raise ParamsError(
                f"{what} = {length}, but this {config.model_type} model has learned positions for {limit} tokens; "
                f"lower it to {limit} or less"
            )


def write_dense(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beside: Mapping[str, Path] = MappingProxyType({}),
) -> str:
    """Write the dense model as a plain folder that reloads bit-equal, and return its fingerprint.

    Args:
        target: the folder.
        model: with its weights.
        tokenizer: of the model.
        beside: further files that are copied as they are, by their path in the folder.

    Raises:
        ArtifactError: if a weight reads back differently.
    """
    with writing_folder(target) as folder:
        model.save_pretrained(folder, save_original_format=False)  # tensors by the names of the model's parameters
        tokenizer.save_pretrained(folder)
        copy_sentence_files(beside, folder)
        written = WeightFiles(folder)
        for name, parameter in model.named_parameters():
            if not torch.equal(written[name], parameter.detach()):
                raise ArtifactError(f"{name} of the dense model does not read back from {folder} as it was written")
        return fingerprint(folder)
