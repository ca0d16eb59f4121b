"""Channels of zeros, up to a multiple that the blocks of quantised types and the devices of a server want."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from libprune.engine.architecture import Architecture, Parameter
from libprune.engine.describe import stored_tensors, without_weights
from libprune.engine.errors import ExportError
from libprune.export.source import Source
from libprune.models.folder import load_model
from libprune.results.folder import save_weights
from libprune.results.record import PLAN, Record, copy_files

_OF_THE_PRUNED = {PLAN, "repair.parquet", "config.json"}
"""Files of a pruned folder that would not be true of the padded one."""
PART = "mlp"
"""The part whose units are channels."""


def wider(channels: int, multiple: int) -> int:
    """The next multiple of a number of channels; a part that is gone stays gone."""
    return -(-channels // multiple) * multiple


def write_padded(source: Source, multiple: int, folder: Path) -> Source:
    """Write a model with channels of zeros, which computes the same, as a Hugging Face folder.

    Args:
        source: the model.
        multiple: the channels of every MLP come to a multiple of this.
        folder: an existing, empty folder; it has no record, since nothing of the padding was pruned.

    Returns:
        The padded model.

    Raises:
        ExportError: if channels of zeros would change what a norm computes.
    """
    record = source.record
    architecture = record.architecture
    if architecture.parts[PART].coupled:
        raise ExportError(
            f"a norm of family {architecture.family!r} takes its statistics over all channels, so that channels of "
            "zeros would change the result; set export.pad_channels to 1"
        )
    widths = [(layer.channels, wider(layer.channels, multiple)) for layer in source.layers]
    model = load_model(source.folder, record.dtype, trust_remote_code=record.remote)
    owned = {parameter.name: parameter for parameter in architecture.parameters if parameter.layer is not None}
    state = {}
    for name, values in stored_tensors(model).items():
        parameter = owned.get(name)
        old, new = (0, 0) if parameter is None or parameter.layer is None else widths[parameter.layer]
        state[name] = values.detach()
        if parameter is not None and old != new:
            state[name] = padded(values.detach(), architecture, parameter, old, new)
    config = _config(source, [new for _, new in widths])
    stock = None if record.remote else without_weights(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    copy_files(record, folder, _OF_THE_PRUNED)
    save_weights(folder, stock, state)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Source(Record(folder, record.provenance))


def padded(values: Tensor, architecture: Architecture, parameter: Parameter, old: int, new: int) -> Tensor:
    """A parameter with zeros in the rows and columns of new channels, behind those that are there.

    Args:
        values: the parameter, of ``old`` channels.
        architecture: of a model with the parameter; the number of its channels is of no matter.
        parameter: says which dimensions have channels.
        old: channels before.
        new: channels afterwards.
    """
    axis = architecture.parts[PART].axis
    for dim, expr in enumerate(parameter.dims):
        if axis in expr.names:
            units = torch.from_numpy(expr.units(axis, {**architecture.sizes, axis: new}))
            shape = [*values.shape[:dim], len(units), *values.shape[dim + 1 :]]
            values = values.new_zeros(shape).index_copy(dim, torch.nonzero(units < old).flatten(), values)
    return values


def _config(source: Source, channels: list[int]) -> dict[str, Any]:
    """The content of config.json with other numbers of channels."""
    record, axis = source.record, source.family.parts[PART].axis
    keys = {key: exprs[0] for key, exprs in source.family.config.expressions.items() if axis in exprs[0].names}
    sizes = source.record.architecture.sizes

    def said(count: int) -> Mapping[str, int]:
        return {key: expr.size({**sizes, axis: count}) for key, expr in keys.items()}

    config = copy.deepcopy(record.config)
    if source.uniform:
        source.family.sized(config).update(said(channels[0]))
        return config
    own = config["per_layer_config"]
    filled = {str(index): said(count) for index, count in enumerate(channels) if count}
    return {**config, "per_layer_config": {index: {**own[index], **filled.get(index, {})} for index in own}}
