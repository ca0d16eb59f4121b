"""A model as libprune sees it: named axes, their sizes, and every parameter in terms of them.

`libprune.engine.describe` derives an `Architecture` from a model and its family file; from here on no
model is needed: costs, score tables and plans are computed from the description alone, and
`artifacts/architecture.json` holds all of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.axes import Expr, parse_expr
from libprune.engine.heads import HeadName

Block = tuple[int, str]
"""A layer, from 0, and the name of one of its parts."""


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: the axes of each of its dimensions, in storage order."""

    name: str
    dims: tuple[Expr, ...]
    layer: int | None
    part: str | None


@dataclass(frozen=True)
class Map:
    """One linear map of a layer.

    Attributes:
        part: the part that it belongs to; of a network the axes that it reads, for the reader.
        input: the axes of what one row of the map takes; of a convolution a patch, the kernel running fastest.
        transposed: whether its weight is stored ``[input, output]``.
        kernel: positions of the input for each one that the module takes; above 1 for convolutions.
        rows: of a network how many rows of the map one sample makes.
    """

    module: str
    layer: int
    part: str
    input: Expr
    output: Expr
    transposed: bool
    kernel: int = 1
    rows: int = 1

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name that its bias has, if there is one."""
        return f"{self.module}.bias"


@dataclass(frozen=True)
class PartShape:
    """A prunable part of every layer.

    Attributes:
        axis: whose indices are its units.
        module: computes the part.
        expressible: the unit counts that the stock config can say; None: any.
        coupled: norms whose statistics run over the units, so that only all of them can go together.
    """

    axis: str
    module: str
    expressible: tuple[int, ...] | None
    coupled: tuple[str, ...] = ()

    def says(self, count: int) -> bool:
        """Whether the stock config can say this many units in every layer."""
        return self.expressible is None or count in self.expressible


@dataclass(frozen=True)
class Architecture:
    """The solved description of one model.

    Attributes:
        family: name of the family file.
        sizes: axis name to size.
        layers: number of layers.
        layers_path: module path of the list of layers.
        parts: part name (``attention``, ``mlp``) to its shape.
        parameters: every parameter of the model once (a tied one under its first name).
        maps: the linear maps of all layers.
        cache: what the KV cache holds per token and layer; None where there is none.
        head: what the model is for, a name of `libprune.engine.heads.HEADS`, or `network`.
        head_macs: multiply-accumulates a token of the linear maps behind the layers; 0 where they run once a sequence.
        fingerprint: digest of the dense model's weights and config; names the model in artifacts.
        buffers: what a network stores beside its parameters, such as running statistics.
    """

    family: str
    sizes: Mapping[str, int]
    layers: int
    layers_path: str
    parts: Mapping[str, PartShape]
    parameters: tuple[Parameter, ...]
    maps: tuple[Map, ...]
    cache: Expr | None
    head: HeadName
    head_macs: int
    fingerprint: str = ""
    buffers: tuple[Parameter, ...] = ()

    def units(self, part: str) -> int:
        """Number of units of a part in one layer."""
        return self.sizes[self.parts[part].axis]

    @property
    def is_network(self) -> bool:
        """Whether this is a network of the user's own: one layer, whose maps and parameters carry the axes of several
        parts and belong to all of them.
        """
        return self.head == "network"

    @property
    def layers_stay(self) -> bool:
        """Whether no layer can be deleted: without its parts it still changes the residual stream, by its norms."""
        return any(p.layer is not None and p.part is None for p in self.parameters)

    def blocks(self) -> Iterator[Block]:
        """Every (layer, part), layer by layer."""
        return ((layer, part) for layer in range(self.layers) for part in self.parts)

    @cached_property
    def _maps_of(self) -> dict[Block, tuple[Map, ...]]:
        table: dict[Block, list[Map]] = {block: [] for block in self.blocks()}
        for entry in self.maps:
            names = entry.input.names | entry.output.names
            for part in self._carried(names) if self.is_network else (entry.part,):
                table[entry.layer, part].append(entry)
        return {block: tuple(entries) for block, entries in table.items()}

    @cached_property
    def _parameters_of(self) -> dict[Block, tuple[Parameter, ...]]:
        table: dict[Block, list[Parameter]] = {block: [] for block in self.blocks()}
        for entry in self.parameters:
            if self.is_network:
                names: frozenset[str] = frozenset().union(*(expr.names for expr in entry.dims))
                for part in self._carried(names):
                    table[0, part].append(entry)
            elif entry.layer is not None and entry.part is not None:
                table[entry.layer, entry.part].append(entry)
        return {block: tuple(entries) for block, entries in table.items()}

    def _carried(self, names: frozenset[str]) -> Iterator[str]:
        """The parts whose axes are among the names."""
        return (part for part, shape in self.parts.items() if shape.axis in names)

    def maps_of(self, layer: int, part: str) -> tuple[Map, ...]:
        """The linear maps of a block."""
        return self._maps_of[layer, part]

    def parameters_of(self, layer: int, part: str) -> tuple[Parameter, ...]:
        """The parameters of a block, norms included."""
        return self._parameters_of[layer, part]

    def consumers(self, layer: int, part: str) -> tuple[Map, ...]:
        """The maps whose *input* carries the part's axis; masking that input is what removal means."""
        axis = self.parts[part].axis
        return tuple(entry for entry in self.maps_of(layer, part) if axis in entry.input.names)

    def carriers(self, layer: int, part: str) -> Iterator[tuple[Parameter, int, NDArray[np.int64]]]:
        """Every (parameter, dimension, unit of each position) of a block that carries the part's axis.

        Without the norms that couple the units: what those hold belongs to the part as a whole.
        """
        axis = self.parts[part].axis
        coupled = {f"{self.layers_path}.{layer}.{module}" for module in self.parts[part].coupled}
        for parameter in self.parameters_of(layer, part):
            if parameter.name.rpartition(".")[0] in coupled:
                continue
            for dim, expr in enumerate(parameter.dims):
                if axis in expr.names:
                    yield parameter, dim, expr.units(axis, self.sizes)

    def numel(self, parameter: Parameter, sizes: Mapping[str, int] | None = None) -> int:
        """Number of elements of a parameter, for other axis sizes if they are given."""
        return prod(dim.size(sizes or self.sizes) for dim in parameter.dims)

    @property
    def decoder_parameters(self) -> int:
        """Parameters inside the layers."""
        return sum(self.numel(p) for p in self.parameters if p.layer is not None)

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(self.numel(p) for p in self.parameters)

    def to_json(self) -> str:
        """The description as JSON, readable by `from_json`."""
        return json.dumps(
            {
                "family": self.family,
                "head": self.head,
                "head_macs": self.head_macs,
                "fingerprint": self.fingerprint,
                "sizes": dict(self.sizes),
                "layers": self.layers,
                "layers_path": self.layers_path,
                "cache": None if self.cache is None else str(self.cache),
                "parts": {
                    name: {"axis": p.axis, "module": p.module, "expressible": p.expressible, "coupled": p.coupled}
                    for name, p in self.parts.items()
                },
                "parameters": [
                    {"name": p.name, "dims": [str(d) for d in p.dims], "layer": p.layer, "part": p.part}
                    for p in self.parameters
                ],
                "maps": [
                    {
                        "module": m.module,
                        "layer": m.layer,
                        "part": m.part,
                        "input": str(m.input),
                        "output": str(m.output),
                        "transposed": m.transposed,
                        "kernel": m.kernel,
                        "rows": m.rows,
                    }
                    for m in self.maps
                ],
                "buffers": [{"name": b.name, "dims": [str(d) for d in b.dims]} for b in self.buffers],
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Architecture":
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        return Architecture(
            family=data["family"],
            head=data["head"],
            head_macs=data["head_macs"],
            fingerprint=data["fingerprint"],
            sizes=data["sizes"],
            layers=data["layers"],
            layers_path=data["layers_path"],
            cache=None if data["cache"] is None else parse_expr(data["cache"]),
            parts={
                name: PartShape(p["axis"], p["module"], _counts(p["expressible"]), tuple(p["coupled"]))
                for name, p in data["parts"].items()
            },
            parameters=tuple(
                Parameter(p["name"], tuple(parse_expr(d) for d in p["dims"]), p["layer"], p["part"])
                for p in data["parameters"]
            ),
            maps=tuple(
                Map(**(m | {"input": parse_expr(m["input"]), "output": parse_expr(m["output"])})) for m in data["maps"]
            ),
            buffers=tuple(Parameter(b["name"], tuple(map(parse_expr, b["dims"])), 0, None) for b in data["buffers"]),
        )


def _counts(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
