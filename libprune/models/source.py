"""Loading the dense model from a package, a file, a folder or the hub."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError, first_line
from libprune.engine.heads import CAUSAL_LM, head_of
from libprune.models.tokens import frame_of
from libprune.pipeline.sections import Prepare
from libprune.pipeline.sources import resolve
from libprune.pipeline.terminal import masked


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
    try:
        model, loading = head.loader.from_pretrained(name, dtype=dtype, output_loading_info=True, **where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(
            f"prepare.model = {masked(params.model)!r} cannot be loaded: {masked(first_line(error))}"
        ) from error
    _require_weights(params, model, sorted(loading["missing_keys"]))
    if "gguf_file" in where:
        _forget_quantization(model)
        follow_gguf(tokenizer, Path(name) / where["gguf_file"])
    return model.eval(), tokenizer


def _require_weights(params: Prepare, model: PreTrainedModel, missing: list[str]) -> None:
    """Stop if transformers has filled parameters with random numbers, because they are missing in the files."""
    if missing:
        raise SourceError(
            f"prepare.model = {params.model!r} has no weights for {len(missing)} parameters of a "
            f"{type(model).__name__}, the first {missing[0]!r}; name the class that they were saved from under "
            "architectures in its config.json"
        )


def _place(params: Prepare) -> tuple[str | Path, dict[str, Any]]:
    """The name or path of the model for `from_pretrained`, and the other arguments that it needs."""
    path = resolve(params.model)
    where: dict[str, Any] = {"revision": params.revision, "trust_remote_code": params.trust_remote_code}
    if path is None:
        return params.model, where
    where |= {"local_files_only": True}
    return (path, where) if path.is_dir() else (path.parent, where | {"gguf_file": path.name})


def load_dense_config(params: Prepare) -> PreTrainedConfig:
    """Load the config of the dense model without its weights; of a GGUF file only the metadata are read.

    Raises:
        SourceError: if the config cannot be found or read, or says that the model is quantized: transformers would look
            for the quantizer's package, or dequantise without being asked.
    """
    name, where = _place(params)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    except Exception as error:  # the config classes raise types of their own
        raise SourceError(
            f"prepare.model = {masked(params.model)!r} cannot be loaded: {masked(first_line(error))}"
        ) from error
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


def follow_gguf(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Let a tokenizer put around a text what the metadata of its GGUF file say, which transformers does not read.

    Where they say nothing, llama.cpp puts the first token before a text if the tokenizer is one of SentencePiece.
    """
    fields = GGUFReader(path).fields

    def said(key: str, usual: bool) -> bool:
        field = fields.get(f"tokenizer.ggml.{key}")
        return usual if field is None else bool(field.contents())

    kind = fields.get("tokenizer.ggml.model")
    begins = said("add_bos_token", kind is not None and kind.contents() == "llama")
    for name, token, asked in (
        ("add_bos_token", tokenizer.bos_token_id, begins),
        ("add_eos_token", tokenizer.eos_token_id, said("add_eos_token", False)),
    ):
        frame = frame_of(tokenizer)
        if asked != (token in (frame.before if name == "add_bos_token" else frame.after)):
            setattr(tokenizer, name, asked)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the GGUF marks of a dequantised model, with which `save_pretrained` would refuse it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
