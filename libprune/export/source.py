"""The model that is exported, by what its folder says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from libprune.engine.errors import ExportError
from libprune.engine.family import Family, family_of
from libprune.engine.heads import HeadName, head_of
from libprune.models.folder import WeightFiles
from libprune.results.record import Record

_IN_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?P<module>.+)\.(?:weight|bias)$")


@dataclass(frozen=True)
class Layer:
    """What is left of one layer.

    Attributes:
        heads: query heads; 0 where the attention is gone.
        groups: key and value heads; 0 where the attention is gone.
        channels: channels of the MLP; 0 where it is gone.
    """

    heads: int
    groups: int
    channels: int


@dataclass(frozen=True)
class Place:
    """Where a parameter of a layer belongs.

    Attributes:
        module: path of its module inside the layer.
        transposed: whether the weight is stored as ``[input, output]``.
    """

    module: str
    transposed: bool


@dataclass(frozen=True)
class Source:
    """A model folder, dense or pruned, with everything that other formats want to know of it.

    Attributes:
        record: the folder and how it was made.
    """

    record: Record

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.record.folder

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, under a stock config."""
        return not self.record.remote

    @property
    def config(self) -> PreTrainedConfig:
        """The config, without what only the folder's own code reads."""
        return self.record.stock_config

    @cached_property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.config.model_type)

    @property
    def head(self) -> HeadName:
        """The head of the model."""
        return head_of(self.record.config["architectures"]).name

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The tensors by their names in the folder, read one at a time."""
        return WeightFiles(self.folder)

    @property
    def origin(self) -> Mapping[str, str]:
        """What the dense model is called and under which licence it is published, as far as that is known."""
        return self.record.provenance.get("origin") or {}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What is left of every layer, from the input to the output."""
        keys = {str(exprs[0]): key for key, exprs in self.family.config.expressions.items()}
        attention, mlp = (self.family.parts[part].axis for part in ("attention", "mlp"))
        groups, channels = keys[attention], keys[mlp]
        heads = keys.get(f"{attention} q", groups)
        own: Mapping[str, Mapping[str, Any]] = self.record.config.get("per_layer_config") or {}
        stock = self.family.sized(self.config.to_dict())
        layers = []
        for index in range(stock[self.family.config.layers]):
            said = {**stock, **own.get(str(index), {})}
            gone = said.get("skip", [])
            has = "attention" not in gone
            layers.append(
                Layer(
                    heads=said[heads] if has else 0,
                    groups=said[groups] if has else 0,
                    channels=0 if "mlp" in gone else said[channels],
                )
            )
        return tuple(layers)

    @cached_property
    def head_dim(self) -> int:
        """Numbers that one head computes for a token."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @cached_property
    def rope(self) -> Mapping[str, Any] | None:
        """The settings of the rotary positions, alike in all layers; None for other kinds of positions.

        Raises:
            ExportError: if they differ between layers.
        """
        rope = getattr(self.config, "rope_parameters", None)
        if rope and "rope_theta" not in rope:
            raise ExportError(f"{self.folder} has rotary positions that differ between layers; no format here has them")
        return rope or None

    def place(self, name: str) -> Place | None:
        """Where a parameter belongs; None for one outside the layers."""
        inside = _IN_LAYER.search(name)
        if inside is None:
            return None
        return Place(inside["module"], inside["module"] in self._transposed)

    @cached_property
    def _transposed(self) -> frozenset[str]:
        """The modules of a layer whose weight is stored as ``[input, output]``, by their path inside the layer."""
        first = self.record.stock_model.get_submodule(self.family.layers)[0]
        return frozenset(path for path, module in first.named_modules() if isinstance(module, Conv1D))
