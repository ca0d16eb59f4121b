"""Loading the dense model from a package, a file, a folder or the hub, and finding the sources of models and texts."""

import importlib.util
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError, naming
from libprune.engine.heads import CAUSAL_LM, head_of
from libprune.models.folder import require_content
from libprune.pipeline.sections import Prepare

_PACKAGE = "package://"
_FILES = {".gguf", ".txt", ".json", ".jsonl", ".csv", ".parquet"}


def resolve(source: str) -> Path | None:
    """The local path of a source, or None for a hub id.

    `package://NAME/path` is a file inside an installed package, found without importing it.

    Raises:
        SourceError: if the package or the path does not exist.
    """
    if source.startswith(_PACKAGE):
        return _package_file(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or path.suffix in _FILES:
        raise SourceError(f"{source} does not exist (seen from {Path.cwd()})")
    return None


def _package_file(source: str) -> Path:
    name, _, inside = source.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{source}: no installed package is named {name!r}; install it with pip")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.is_file())[:5] if path.parent.is_dir() else []
        raise SourceError(f"{source}: package {name!r} has no such file; in that folder: {', '.join(beside) or 'none'}")
    return path


def load_dense(params: Prepare) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense model, on the CPU, and its tokenizer.

    A GGUF file is dequantised to float32 unless another dtype is asked for. Its quantization marks are removed, so that
    the model can be saved again.

    Raises:
        SourceError: if the model cannot be found or read, lacks weights, or is quantized.
    """
    name, where = _place(params)
    dtype: Any = params.dtype if params.dtype == "auto" else getattr(torch, params.dtype)
    if "gguf_file" in where:
        head, dtype = CAUSAL_LM, torch.float32 if dtype == "auto" else dtype
    else:
        head = head_of(load_dense_config(params).architectures)
        if isinstance(name, Path):
            _require_safetensors(params, name)
    with naming(f"the weights of prepare.model = {params.model!r} cannot be loaded"):
        model, loading = head.loader.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **where
        )
    _require_shapes(params, loading["mismatched_keys"])
    _require_weights(params, model, sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"]))
    _require_numbers(params, model)
    with naming(f"the tokenizer of prepare.model = {params.model!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    if "gguf_file" in where:
        _forget_quantization(model)
    return model.eval(), tokenizer


def _require_shapes(params: Prepare, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Stop if tensors of the files have other shapes than the config says, which transformers then fills at random."""
    for name, stored, expected in sorted(mismatched):
        raise SourceError(
            f"prepare.model = {params.model!r}: {name} has shape {list(stored)} in the files, but {list(expected)} by "
            "its config.json; one of the two is of another model"
        )


_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of names that DataParallel and torch.compile leave, when their wrapper is saved and not the model in it."""


def _require_weights(params: Prepare, model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> None:
    """Stop if transformers has filled parameters with random numbers, because they are missing in the files."""
    wrapper = next((p for p in _WRAPPERS for name in unexpected if name.startswith(p)), None)
    if missing and wrapper is not None:
        raise SourceError(
            f"prepare.model = {params.model!r}: the names of its weights begin with {wrapper!r}, as {unexpected[0]!r}; "
            "a wrapped model was saved. Take the prefix away, or save the model inside the wrapper"
        )
    if missing:
        raise SourceError(
            f"prepare.model = {params.model!r} has no weights for {len(missing)} parameters of a "
            f"{type(model).__name__}, the first {missing[0]!r}; name the class that they were saved from under "
            "architectures in its config.json"
        )


def _require_numbers(params: Prepare, model: PreTrainedModel) -> None:
    """Stop if a weight is not finite, or all matrices are zero."""
    largest = 0.0
    for name, parameter in model.named_parameters():
        reach = max(abs(float(end)) for end in torch.aminmax(parameter.detach()))
        if not isfinite(reach):
            broken = int((~torch.isfinite(parameter)).sum())
            raise SourceError(
                f"prepare.model = {params.model!r}: {broken:,} of {parameter.numel():,} values of {name} are not finite"
            )
        largest = max(largest, reach if parameter.dim() > 1 else 0.0)
    if not largest:
        raise SourceError(f"prepare.model = {params.model!r}: all matrices of its weights are zero")


def _require_model(params: Prepare, path: Path) -> None:
    """Stop by name at what is often given for a model: adapters, and pointers of Git LFS."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise SourceError(
            f"prepare.model = {params.model!r} is a LoRA adapter, not a model; merge it into its base model first: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.is_file() and file.suffix in {".gguf", ".safetensors", ".json", ".model", ".bin"}:
            require_content(file)


def _require_safetensors(params: Prepare, path: Path) -> None:
    """Stop at a folder without safetensors files; those that pickle reads may run code, and are not read."""
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        what = f" but {pickles[0]}, a pickle, which may run code when it is read" if pickles else ""
        raise SourceError(
            f"prepare.model = {params.model!r} holds no .safetensors file{what}; write it again by save_pretrained"
        )


def _place(params: Prepare) -> tuple[str | Path, dict[str, Any]]:
    """The name or path of the model for `from_pretrained`, and the other arguments that it needs."""
    path = resolve(params.model)
    if path is not None:
        _require_model(params, path)
    where: dict[str, Any] = {"revision": params.revision, "trust_remote_code": params.trust_remote_code}
    if path is None or path.is_dir():
        return path or params.model, where
    return path.parent, where | {"gguf_file": path.name}


def load_dense_config(params: Prepare) -> PreTrainedConfig:
    """Load the config of the dense model without its weights; of a GGUF file only the metadata are read.

    Raises:
        SourceError: if the config cannot be found or read, or says that the model is quantized: transformers would look
            for the quantizer's package, or dequantise without being asked.
    """
    name, where = _place(params)
    with naming(f"the config of prepare.model = {params.model!r} cannot be loaded"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise SourceError(
            f"prepare.model = {params.model!r} is quantized ({method}); prune the unquantized model and quantize "
            "the result"
        )
    return config


def dense_dtype(params: Prepare, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that the dense model is stored in: of the params, else of the config; float32 for GGUF files."""
    if params.dtype != "auto":
        asked: torch.dtype = getattr(torch, params.dtype)
        return asked
    return torch.float32 if "gguf_file" in _place(params)[1] else config.dtype or torch.float32


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the GGUF marks of a dequantised model, with which `save_pretrained` would refuse it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
