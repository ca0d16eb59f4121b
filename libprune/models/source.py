"""Loading the dense model from a package, a file, a folder or the hub."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from libprune.engine.errors import SourceError, naming
from libprune.engine.heads import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, experts_of, head_of
from libprune.engine.stock_config import keys_of
from libprune.models.folder import PROCESSOR_FILES, require_own_files
from libprune.models.given import require_dequantised, require_model, require_safetensors
from libprune.models.memory import loading_on_disk
from libprune.models.sentences import sentence_files
from libprune.models.tokens import frame_of
from libprune.pipeline.sections import Prepare
from libprune.pipeline.sources import resolve
from libprune.pipeline.terminal import masked, say


def _read_fast(reader: GGUFReader, *arguments: Any, **options: Any) -> Any:
    """Read a value of a GGUF file through a plain array, which takes a third of the time of a mapped one."""
    if isinstance(reader.data, np.memmap):
        reader.data = reader.data.view(np.ndarray)
    return _read(reader, *arguments, **options)


_read = GGUFReader._get
GGUFReader._get = _read_fast


def _open_once(reader: GGUFReader, path: Any, mode: str = "r") -> None:
    """Open a GGUF file, whose fields are read once in a process: transformers and this module open it several times."""
    status = Path(path).stat()
    key = str(path), mode, status.st_mtime_ns, status.st_size
    if mode != "r" or key not in _opened:
        _open(reader, path, mode)
        _opened.clear()
        _opened[key] = dict(vars(reader))
    vars(reader).update(_opened[key])


_opened: dict[tuple[str, str, int, int], dict[str, Any]] = {}
_open = GGUFReader.__init__
GGUFReader.__init__ = _open_once
gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)  # transformers asks for it module by module


def load_dense(params: Prepare, scratch: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense model, on the CPU, and its tokenizer.

    A GGUF file is dequantised to float32 unless another dtype is asked for, and a checkpoint in fp8 or
    mxfp4 to the type that its config names. The quantization marks are removed, so that the model can be saved
    again.

    Args:
        params: name the model.
        scratch: as in `libprune.models.folder.load_model`.

    Raises:
        SourceError: if the model cannot be found or read, is quantized, or its weights are not those of its config.
    """
    name, where = _place(params)
    if isinstance(name, Path) and name.is_dir():
        require_own_files(name)
    dtype: Any = params.dtype if params.dtype == "auto" else getattr(torch, params.dtype)
    if "gguf_file" in where:
        head, dtype = CAUSAL_LM, torch.float32 if dtype == "auto" else dtype
    else:
        config, method = _read_config(params)
        head = head_of(config.architectures)
        if isinstance(name, Path):
            require_safetensors(params.model, name)
        if method:
            config.quantization_config["dequantize"] = True
            where["config"] = config
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below
    place = nullcontext() if scratch is None else loading_on_disk(scratch)
    failed = f"the weights of prepare.model = {masked(params.model)!r} cannot be loaded"
    with _passed_over() as unused, naming(failed), place:
        model, loading = head.loader.from_pretrained(name, use_safetensors=True, **how, **where)
    _follow_weights(model, name, where)
    _require_weights(params, model, loading)
    if unused := sorted(name for name in unused if not _OF_OTHER_HEADS.search(name)):
        say(
            f"{masked(params.model)} holds {len(unused)} tensors that a {type(model).__name__} does not use, the first "
            f"{unused[0]!r}; they are left out of every result"
        )
    with naming(f"the tokenizer of prepare.model = {masked(params.model)!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    _forget_quantization(model)
    if "gguf_file" in where:
        follow_gguf(tokenizer, Path(name) / where["gguf_file"])
    elif method:
        written = str(model.dtype).removeprefix("torch.")
        say(f"the model is stored in {method}; it is dequantised, and what is made of it is written in {written}")
    return model.eval(), tokenizer


@contextmanager
def _passed_over() -> Iterator[Collection[str]]:
    """Inside, gather the tensors that a model class lists as not its own, of which transformers says nothing.

    Such are the layers of published checkpoints that predict several tokens ahead.
    """
    names: set[str] = set()
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def gather(model: PreTrainedModel, info: Any) -> None:
        before = set(info.unexpected_keys)
        adjust(model, info)
        names.update(before - set(info.unexpected_keys))

    PreTrainedModel._adjust_missing_and_unexpected_keys = gather
    try:
        yield names
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust


def processor_files(params: Prepare) -> dict[str, Path]:
    """The files of a dense model by which it prepares images, by their names; none of a model that reads text alone.

    Raises:
        SourceError: if one of them is on the hub and cannot be loaded.
    """
    name, where = _place(params)
    if "gguf_file" in where or head_of(load_dense_config(params).architectures) is not IMAGE_TEXT_TO_TEXT:
        return {}
    if isinstance(name, Path):
        return {file: name / file for file in PROCESSOR_FILES if (name / file).is_file()}
    with naming(f"the processor of prepare.model = {masked(params.model)!r} cannot be loaded"):
        found = {
            file: cached_file(name, file, revision=params.revision, _raise_exceptions_for_missing_entries=False)
            for file in PROCESSOR_FILES
        }
    return {file: Path(path) for file, path in found.items() if path is not None}


_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
"""What the names of tensors begin with, if the wrapper of a model was saved in its place."""
_OF_OTHER_HEADS = re.compile(r"(^|\.)pooler\.|^cls\.seq_relationship\.|\.(inv_freq|position_ids|masked_bias)$")
"""Tensors of published checkpoints that belong to heads of other kinds, or that the code of a model works out."""


def _require_weights(params: Prepare, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Stop unless the files hold the weights that the config asks for, all of them and no others.

    transformers fills what is missing with random numbers, and leaves out what it knows no place for.

    Args:
        params: name the model.
        model: as it was loaded.
        loading: what `from_pretrained` says of names.
    """
    missing = sorted(loading["missing_keys"])
    unexpected = sorted(name for name in loading["unexpected_keys"] if not _OF_OTHER_HEADS.search(name))
    fault = (
        _wrapped(unexpected)
        or _differing(loading["mismatched_keys"])
        or _missing(model, missing)
        or _unexpected(model, unexpected)
        or untied(model)
        or _worthless(model)
    )
    if fault:
        raise SourceError(f"prepare.model = {params.model!r} {fault}")


def _follow_weights(model: PreTrainedModel, name: str | Path, where: Mapping[str, Any]) -> None:
    """Let the config say that the head is not the embedding, where config.json leaves it open and weights have both.

    Newer versions of transformers take for granted what older ones did not.

    Args:
        model: as it was loaded.
        name: its name or path.
        where: the other arguments that it was loaded by.
    """
    if "gguf_file" in where or not untied(model):
        return
    stated, _ = PreTrainedConfig.get_config_dict(name, **where)
    if _TIED not in keys_of(stated):
        setattr(model.config, _TIED, False)


_TIED = "tie_word_embeddings"


def _wrapped(unexpected: list[str]) -> str:
    for prefix, wrapper in _WRAPPERS.items():
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            return (
                f"holds tensors whose names begin with {prefix!r}, which {wrapper} adds; take it off the "
                f"{len(unexpected)} names, or save the model inside the wrapper"
            )
    return ""


def _differing(mismatched: Collection[tuple[str, Any, Any]]) -> str:
    if not mismatched:
        return ""
    name, stored, asked = min(mismatched)
    return (
        f"holds {len(mismatched)} tensors of other shapes than its config.json asks for, the first {name!r}: it is "
        f"{list(stored)}, expected {list(asked)}"
    )


def _missing(model: PreTrainedModel, missing: list[str]) -> str:
    if not missing:
        return ""
    lacks = f"has no weights for {len(missing)} parameters of a {type(model).__name__}, the first {missing[0]!r}"
    first = min(_layer(name) for name in missing)
    last_layers = {name for name in model.state_dict() if _layer(name) >= first}
    if first >= 0 and last_layers == set(missing):
        return f"{lacks}; {_counted(model)}"
    return f"{lacks}; name the class that they were saved from under architectures in its config.json"


def _unexpected(model: PreTrainedModel, unexpected: list[str]) -> str:
    if not unexpected:
        return ""
    kind, number = type(model).__name__, len(unexpected)
    holds = f"holds {number} tensors that a {kind} of its config.json has no place for, the first {unexpected[0]!r}"
    known = max((_layer(name) for name, _ in model.named_parameters()), default=-1)
    if all(_layer(name) > known for name in unexpected):
        return f"{holds}; {_counted(model)}"
    return f"{holds}; remove them, or name the class that they were saved from under architectures in its config.json"


def _layer(name: str) -> int:
    """The number in the name of a parameter, which is that of its layer; -1 if there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _counted(model: PreTrainedModel) -> str:
    return (
        f"its config.json says {model.config.get_text_config().num_hidden_layers} layers, make the number fit the files"
    )


def untied(model: PreTrainedModel) -> str:
    """What is wrong with a loaded model that has a head of its own, though its config says that it is the embedding.

    Programs differ in which of the two they take. Empty if nothing is wrong.
    """
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(name) is not model.get_parameter(source):
            return (
                f"holds {name!r} with other values than {source!r}, but its config.json says tie_word_embeddings: "
                "true, by which the two are one; set it to false, or remove the tensor"
            )
    return ""


def _worthless(model: PreTrainedModel) -> str:
    """What is wrong with values that no training leaves behind; empty if nothing is.

    Only what is added to the embeddings of tokens may be all 0: RoBERTa was published so, since it knows no two texts.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    added = {id(weight) for weight in embeddings} - {id(model.get_input_embeddings().weight)}
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            broken = int((~torch.isfinite(parameter)).sum())
            return f"holds {name!r}, in which {broken:,} of {parameter.numel():,} values are not finite"
        if parameter.ndim > 1 and id(parameter) not in added and not parameter.any():
            return f"holds {name!r}, in which all {parameter.numel():,} values are zero"
    return ""


def _place(params: Prepare) -> tuple[str | Path, dict[str, Any]]:
    """The name or path of the model for `from_pretrained`, and the other arguments that it needs."""
    path = resolve(params.model)
    if path is not None:
        require_model(params.model, path)
    where: dict[str, Any] = {"revision": params.revision, "trust_remote_code": params.trust_remote_code}
    if path is None:
        return params.model, where
    where |= {"local_files_only": True}
    return (path, where) if path.is_dir() else (path.parent, where | {"gguf_file": path.name})


def find_sentence_files(params: Prepare) -> dict[str, Path]:
    """The files of sentence-transformers beside the dense model, as `libprune.models.sentences.sentence_files`."""
    name, where = _place(params)
    return sentence_files(name, **{key: where[key] for key in ("revision", "local_files_only") if key in where})


def load_dense_config(params: Prepare) -> PreTrainedConfig:
    """Load the config of the dense model without its weights; of a GGUF file only the metadata are read.

    The config of a model in fp8 or mxfp4 is that of the dequantised one.

    Raises:
        SourceError: if the config cannot be found or read, or says that the model is quantized in another format:
            transformers would look for the quantizer's package, or dequantise without being asked.
    """
    config, method = _read_config(params)
    if method:
        del config.quantization_config
    return config


def stored_format(params: Prepare) -> str:
    """The format, fp8 or mxfp4, that the dense model is stored in; "" for plain weights and GGUF files.

    Raises:
        SourceError: as `load_dense_config`; of a GGUF file only if it does not exist.
    """
    return "" if "gguf_file" in _place(params)[1] else _read_config(params)[1]


def _read_config(params: Prepare) -> tuple[PreTrainedConfig, str]:
    """The config as it is stored, and the format that it names, if it is one that is dequantised."""
    name, where = _place(params)
    with naming(f"the config of prepare.model = {params.model!r} cannot be loaded"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    if "gguf_file" in where and not experts_of(config.to_dict()):
        _refuse_experts(params.model, Path(name) / where["gguf_file"])
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return config, ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    require_dequantised(params.model, method)
    return config, str(method)


def _refuse_experts(model: str, path: Path) -> None:
    """Stop at a GGUF file of a mixture of experts whose architecture transformers reads as a dense model.

    Raises:
        SourceError: naming the number of experts.
    """
    with naming(f"prepare.model = {masked(model)!r} cannot be read as GGUF"):
        fields = GGUFReader(path).fields
        kind = fields.get("general.architecture")
        field = None if kind is None else fields.get(f"{kind.contents()}.expert_count")
        number = 0 if field is None else int(field.contents())
    if number > 1:
        raise SourceError(
            f"prepare.model = {masked(model)!r} is a GGUF file of a mixture of {number} experts, which transformers "
            "reads as a dense model; give its Hugging Face folder"
        )


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
    """Remove the marks of a dequantised model, with which `save_pretrained` would refuse it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
