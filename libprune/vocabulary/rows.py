"""The rows of a model that belong to tokens: which tensors hold them, and a model without some of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.errors import FamilyError, SourceError
from libprune.engine.family import families

_NAMES_TOKENS = re.compile(r"(^|_)tokens?_(id|ids|index)$|(^|_)suppress_tokens$|^(bad|force)_words_ids$")
"""Keys of configs that hold token ids: one, a list, or a list of lists."""
_UNCLEAR = ("forced_decoder_ids", "sequence_bias", "watermarking_config")
"""Keys of configs that hold token ids beside other numbers."""


def token_axes(architecture: Architecture) -> tuple[str, ...]:
    """The axes of a model whose indices are token ids.

    Raises:
        FamilyError: if there is none, they differ in size, or a tensor has one of them together with another axis.
    """
    axes = [axis for axis in families()[architecture.family].tokens if axis in architecture.sizes]
    sizes = {axis: architecture.sizes[axis] for axis in axes}
    if len(set(sizes.values())) != 1:
        raise FamilyError(
            f"prepare.vocabulary: a model of family {architecture.family!r} has the token axes {sizes or 'none'}, "
            "which must be as long as each other; set it to null"
        )
    for parameter in (*architecture.parameters, *architecture.buffers):
        for dim in parameter.dims:
            if set(axes) & dim.names and str(dim) not in axes:
                raise FamilyError(
                    f"prepare.vocabulary: {parameter.name} is described as [{', '.join(map(str, parameter.dims))}], in "
                    "which rows of tokens do not stand alone; set it to null"
                )
    return tuple(axes)


def named_ids(model: PreTrainedModel) -> set[int]:
    """The token ids that the configs of a model name.

    Raises:
        SourceError: for a key that holds token ids beside other numbers.
    """
    return {index for config in _configs(model) for index in _ids(config.to_dict())}


def _configs(model: PreTrainedModel) -> list[Any]:
    return [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]


def _ids(value: Any, named: bool = False) -> Iterator[int]:
    """All token ids inside of the content of a config; `named`: whether a key above says that there are some."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            if key in _UNCLEAR and inside is not None:
                raise SourceError(
                    f"prepare.vocabulary: the config of the model has {key}, whose token ids would have to change; "
                    "take it out, or set prepare.vocabulary to null"
                )
            yield from _ids(inside, bool(_NAMES_TOKENS.search(str(key))))
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _ids(inside, named)
    elif named and isinstance(value, int):
        yield value


def _renamed(value: Any, new: Mapping[int, int], sizes: Mapping[str, tuple[int, int]], key: str = "") -> Any:
    """The content of a config with new token ids, and new sizes by key where the old ones stand."""
    if isinstance(value, Mapping):
        return {name: _renamed(inside, new, sizes, str(name)) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(inside, new, sizes, key) for inside in value]
    if isinstance(value, int) and _NAMES_TOKENS.search(key):
        return new.get(value, value)
    if key in sizes and value == sizes[key][0]:
        return sizes[key][1]
    return value


def trim_rows(model: PreTrainedModel, architecture: Architecture, kept: Sequence[int], new: Mapping[int, int]) -> None:
    """Remove the rows of all other tokens from a model, and let its configs say so; it is then to be saved.

    Args:
        model: is changed; tied tensors stay tied.
        architecture: its description.
        kept: the ids of the rows that stay, ascending.
        new: the new ids of tokens by the old ones.

    Raises:
        FamilyError: if tokens have no rows of their own.
    """
    axes = token_axes(architecture)
    rows = torch.tensor(kept)
    for parameter in (*architecture.parameters, *architecture.buffers):
        for dim, expr in enumerate(parameter.dims):
            if str(expr) in axes:
                _take(model, parameter.name, dim, rows)
    before = architecture.sizes[axes[0]]
    said = families()[architecture.family].config.expressions
    sizes = {key: (before, len(kept)) for key, exprs in said.items() if any(str(expr) in axes for expr in exprs)}
    model.config = type(model.config).from_dict(_renamed(model.config.to_dict(), new, sizes))
    if getattr(model, "generation_config", None) is not None:
        told = model.generation_config.to_dict()
        model.generation_config = type(model.generation_config).from_dict(_renamed(told, new, {}))


def _take(model: nn.Module, name: str, dim: int, rows: torch.Tensor) -> None:
    """Leave these rows of a tensor; a tied one has one storage under several names."""
    owner, _, own = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), own)
    tensor.data = tensor.data.index_select(dim, rows.to(tensor.device))
