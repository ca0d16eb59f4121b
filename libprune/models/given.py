"""What is given for a model where it lies here: refused by name if it is something else. No weight is read."""

import json
from pathlib import Path
from typing import Any

from libprune.engine.errors import SourceError

_POINTER = b"version https://git-lfs"
_GGUF = b"GGUF"
OWN_TYPE = "pruned_"
"""What `model_type` begins with in a folder with a modeling file, so that no stock code takes the model for its own."""


def require_content(path: Path) -> None:
    """Stop where a file is only the pointer to its content that Git LFS leaves in a clone without its files.

    Raises:
        SourceError: naming the file, and the command that fetches its content; or if it is none.
    """
    require_files(path)
    if is_pointer(path):
        raise SourceError(
            f"{path} is not the file but its Git LFS pointer; run `git lfs pull` in its repository, or download it"
        )


def is_pointer(path: Path) -> bool:
    """Whether a file is only the pointer to its content that Git LFS leaves in a clone without its files."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def require_files(path: Path) -> None:
    """Stop at what is neither file nor folder, or holds such: reading a pipe or a device may never end.

    Raises:
        SourceError: naming it.
    """
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        if one.exists() and not one.is_file() and not one.is_dir():
            raise SourceError(f"{one} is no file but a pipe or a device; remove it")


def require_model(model: str, path: Path) -> None:
    """Stop by name at what is often given for a model: adapters, other files and folders, and pointers of Git LFS.

    Args:
        model: as in `prepare.model`.
        path: where it lies.
    """
    require_files(path)
    if (path / "adapter_config.json").is_file():
        also = (
            ", or remove adapter_config.json to take the model beside it"
            if any(path.glob("model*.safetensors"))
            else ""
        )
        raise SourceError(
            f"prepare.model = {model!r} is a LoRA adapter, not a model; merge it into its base model first: "
            f"AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...){also}"
        )
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.is_file() and file.suffix in {".gguf", ".safetensors", ".json", ".model", ".bin"}:
            require_content(file)
    if path.is_file():
        with path.open("rb") as content:
            if content.read(len(_GGUF)) != _GGUF:
                raise SourceError(
                    f"prepare.model = {model!r} is a file, but no GGUF file; name a folder or a GGUF file"
                )
    elif not (path / "config.json").is_file():
        raise SourceError(f"prepare.model = {model!r} is a folder without a config.json, so that it holds no model")
    elif _has_own_widths(path / "config.json"):
        raise SourceError(
            f"prepare.model = {model!r} was pruned with allocate.shape: per_layer, and a model whose layers differ in "
            "width cannot be taken; name the model that it came from, or what allocate.shape: uniform makes of it"
        )


def _has_own_widths(path: Path) -> bool:
    """Whether a config is that of a pruned folder whose layers have widths of their own."""
    try:
        said = json.loads(path.read_text())
    except ValueError:  # what reads the config says so
        return False
    return isinstance(said, dict) and str(said.get("model_type")).startswith(OWN_TYPE) and "per_layer_config" in said


DEQUANTISED = ("fp8", "mxfp4")
"""Formats in which models are trained or published, with no unquantized form beside them. transformers dequantises
them where it loads them."""


def require_dequantised(model: str, method: Any) -> None:
    """Stop at a quantized model, unless its format is one of `DEQUANTISED`.

    Args:
        model: as in `prepare.model`.
        method: the name of the format in the model's config.
    """
    if method not in DEQUANTISED:
        raise SourceError(
            f"prepare.model = {model!r} is quantized ({method}); prune the unquantized model and quantize the result"
        )


def require_safetensors(model: str, path: Path) -> None:
    """Stop at a folder without safetensors files; those that pickle reads may run code, and are not read."""
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        what = f" but {pickles[0]}, a pickle, which may run code when it is read" if pickles else ""
        raise SourceError(
            f"prepare.model = {model!r} holds no .safetensors file{what}; write it again by save_pretrained"
        )
