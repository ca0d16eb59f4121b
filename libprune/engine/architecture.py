"""A model as libprune sees it: named axes, their sizes, and every parameter in terms of them.

`libprune.engine.describe` derives an `Architecture` from a model and its family file; from here on no
model is needed: costs, score tables and plans are computed from the description alone, and
`artifacts/architecture.json` holds all of it.
"""

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from libprune.engine.axes import Expr, parse_expr
from libprune.engine.heads import HeadName, Pooling

NORMS_STAY = "its norms work on the residual stream itself"
NUMBERED = "image features are added behind layers by their number"
SHARING = "some of its layers use the units of others"
"""Why no layer can be deleted, in words that follow a colon."""
RESIDUAL = "model"
"""The axis of the residual stream, which all layers share."""
WHOLE = "whole_"
"""What the names of axes begin with that belong to tensors which stay whole; their size follows."""
Block = tuple[int, str]
"""A layer, from 0, and the name of one of its parts."""
Units = Literal["groups", "heads", "channels", "experts"]
"""What the units of a part are: attention groups and heads of other parts, query heads, channels, or whole experts of a
mixture."""
Heads = Literal["groups", "queries"]
"""Units of an attention: key-value heads with their query heads, or the query heads inside of such groups."""
Experts = Literal["whole", "channels"]
"""Units of a mixture: whole experts, or channels inside of them, the same in all experts of a layer."""
STAND_IN = ".stacked_"
"""What stands before the name of a stacked tensor in the name of the module that stands in for it."""
OWN_FAMILIES: dict[str, Mapping[str, Any]] = {}
"""The families of the user's own that this process has read, from a file or an artifact: by name what the file says."""


def know_family(content: Mapping[str, Any] | None) -> None:
    """Add a family of the user's own to those that are known; of two with one name the last counts. None adds none."""
    if content is not None:
        OWN_FAMILIES[content["family"]] = content


WITH_LAYER = "layer"
"""In place of a part: what several parts of a layer read, so that it goes with the last of them."""


@dataclass(frozen=True)
class Parameter:
    """One stored tensor.

    Attributes:
        dims: the axes of each of its dimensions, in storage order.
        layer: the layer that it lies in; None outside the layers.
        part: the part that it goes with, or `WITH_LAYER`; None if it goes with none, or loses only the units that it
            carries.
    """

    name: str
    dims: tuple[Expr, ...]
    layer: int | None
    part: str | None

    @property
    def whole(self) -> bool:
        """Whether it belongs to modules beside the language model that stay whole."""
        return any(name.startswith(WHOLE) for dim in self.dims for name in dim.names)


@dataclass(frozen=True)
class Map:
    """One linear map of a layer.

    Attributes:
        part: the part that it belongs to; in a network the axes that it reads, for the reader of the JSON.
        input: the axes of one row of its input; for a convolution a patch, the kernel running fastest.
        transposed: whether its weight is stored ``[input, output]``.
        kernel: positions of the input for each feature that the module takes; above 1 for convolutions.
        rows: how many rows of the map one sample of a network makes; 1 in language models, which are counted by token.
        stack: the axis of the copies of a stack, such as the experts; None for a single map. `input` or `output` then
            carries it too: they are those of all copies side by side.
        active: how many copies of a stack a token goes through.
    """

    module: str
    layer: int
    part: str
    input: Expr
    output: Expr
    transposed: bool
    kernel: int = 1
    rows: int = 1
    stack: str | None = None
    active: int = 1

    @property
    def weight(self) -> str:
        """Name of the weight. The module of a stack stands in for a tensor, see `libprune.engine.stacks`."""
        return self.module.replace(STAND_IN, ".") if self.stack else f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name that its bias has, if there is one."""
        return f"{self.weight}_bias" if self.stack else f"{self.module}.bias"

    def copies(self, sizes: Mapping[str, int]) -> int:
        """How many maps the stack has; 1 for a single map."""
        return sizes[self.stack] if self.stack else 1

    def each_input(self, sizes: Mapping[str, int]) -> int:
        """The width of the input of one copy."""
        return self.input.size(sizes) // (self.copies(sizes) if self.stack in self.input.names else 1)


@dataclass(frozen=True)
class PartShape:
    """A prunable part of every layer, or of the layers of one kind.

    Attributes:
        axis: whose indices are its units.
        module: computes the part.
        expressible: the unit counts that the stock config can say; None: any.
        coupled: modules by which only all units can go together: norms whose statistics run over them, and what all
            layers share.
        norm: the RMS norm in front of the consumer, whose mean runs over the units that remain; "" without one.
        units: what the units are.
        layers: the layers that have the part; None: all.
        groups: units lie in so many groups of neighbours, which all keep the same number.
        outer: the axis of the groups, where they have rows of their own, such as keys and values. A group all of whose
            units go takes these rows with it, and only the groups that stay keep the same number. "" without one.
        inner: the axis of the units of one group, where the groups have an axis.
        pairs: the numbers of groups and units that the stock config can say, where the groups have an axis; None: any.
        least: the fewest units that stay in each layer, unless the whole layer goes; 0 where the part can go alone.
        router: the module of the layer that chooses among the units by its logits; "" where all units are used.
        owners: for each layer of the model the layer whose units it uses, itself or an earlier one; None: always
            itself. The part of such a layer belongs to the block of that earlier one.
    """

    axis: str
    module: str
    expressible: tuple[int, ...] | None
    coupled: tuple[str, ...] = ()
    norm: str = ""
    units: Units = "channels"
    layers: tuple[int, ...] | None = None
    groups: int = 1
    least: int = 0
    router: str = ""
    owners: tuple[int, ...] | None = None
    outer: str = ""
    inner: str = ""
    pairs: tuple[tuple[int, int], ...] | None = None

    def says(self, count: int, groups: int | None = None) -> bool:
        """Whether the stock config can say this many units in every layer.

        Args:
            groups: how many groups they lie in, where these have an axis; None: any number of them.
        """
        if self.pairs is not None and groups is not None:
            return (groups, count) in self.pairs
        return self.expressible is None or count in self.expressible

    @property
    def norms(self) -> tuple[str, ...]:
        """The modules that compute with all units of a model of the dense shape, whatever masks say of some of them."""
        return (*self.coupled, *filter(None, [self.norm]))

    @property
    def axes(self) -> frozenset[str]:
        """The axes that shrink with the part: that of its units, and that of their groups if there is one."""
        return frozenset({self.axis, self.outer} - {""})

    def groups_left(self, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which groups keep a unit, ``[groups]``."""
        return np.logical_or.reduce(keep.reshape(self.groups, -1), axis=1)

    def left_after(self, units: int, steps: Iterable[Sequence[int]]) -> list[tuple[int, int | None]]:
        """How many units are left of so many after each of several removals, the dense part first, and in how many
        groups; None where the groups have no axis.
        """
        counts: list[tuple[int, int | None]] = [(units, self.groups if self.outer else None)]
        in_group = np.full(self.groups, units // self.groups)
        for removed in steps:
            if self.outer:
                np.subtract.at(in_group, np.array(removed) // (units // self.groups), 1)
            groups = int(np.count_nonzero(in_group)) if self.outer else None
            counts.append((counts[-1][0] - len(removed), groups))
        return counts

    def sizes(self, units: int, groups: int) -> dict[str, int]:
        """The sizes of the axes of a part of which so many units are left, in so many groups."""
        return {self.axis: units} | ({self.outer: groups, self.inner: units // max(1, groups)} if self.outer else {})


_Entry = TypeVar("_Entry", Parameter, Map)


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """What went with rows of the vocabulary before a model was described.

    Attributes:
        tokens: how many tokens the tokenizer had.
        rows: how many rows the model had for tokens.
        parameters: how many parameters went.
        macs: how many multiply-accumulates a token went with rows of the head.
    """

    tokens: int
    rows: int
    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
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
        head_macs: multiply-accumulates a token of the linear maps that stay whole: those outside the layers, and those
            that go only with a whole layer; 0 where they run once a sequence.
        fingerprint: digest of the dense model's weights and config; names the model in artifacts.
        state: what the cache holds per sequence and layer, however long it is; None where there is none.
        buffers: what a model stores beside its parameters, such as running statistics or biases on a choice of experts.
        tower: whether this is the language model inside a larger one, whose layers can only be written all alike.
        numbered: whether something is added behind layers by their number, so that none can be deleted.
        own_family: the content of the family file if it is the user's own; None if libprune ships it.
        pooling: how a model without a head makes the embedding of a text; None of other models.
        unused_positions: learned positions before that of the first token.
        trimmed: what went with rows of the vocabulary before; None where all tokens stay.
    """

    family: str
    head: HeadName
    head_macs: int
    fingerprint: str = ""
    sizes: Mapping[str, int]
    layers: int
    layers_path: str
    cache: Expr | None
    parts: Mapping[str, PartShape]
    parameters: tuple[Parameter, ...]
    maps: tuple[Map, ...]
    buffers: tuple[Parameter, ...] = ()
    state: Expr | None = None
    tower: bool = False
    numbered: bool = False
    own_family: Mapping[str, Any] | None = None
    pooling: Pooling | None = None
    unused_positions: int = 0
    trimmed: Trimmed | None = None

    def units(self, part: str) -> int:
        """Number of units of a part in one layer."""
        return self.sizes[self.parts[part].axis]

    @property
    def layered(self) -> bool:
        """Whether layers repeat along a residual stream, where their parts meet.

        A network of the user's own is described as one layer without a path. Its parts are axes that share weights.
        """
        return self.layers_path != ""

    def grouped(self, part: str) -> bool:
        """Whether the units of a part are heads or experts, which floors and multiples of channels do not concern."""
        return self.parts[part].units != "channels"

    def multiple(self, part: str) -> int:
        """The multiple in which units of a part are kept, for programs that run the result.

        PyTorch multiplies the experts of a mixture by kernels that take rows of whole 16 bytes: 8 channels of 2 bytes.
        """
        axis = self.parts[part].axis
        inside = any(entry.stack not in {None, axis} and axis in entry.input.names for entry in self.maps)
        return 8 if inside else 1

    @property
    def heads(self) -> Heads:
        """Which units of the attention are described."""
        return "queries" if any(shape.outer for shape in self.parts.values()) else "groups"

    @property
    def experts(self) -> Experts | None:
        """Which units of a mixture of experts are described; None for a dense model."""
        if not any(entry.stack for entry in self.maps):
            return None
        return "channels" if any(self.multiple(part) > 1 for part in self.parts) else "whole"

    def parts_of(self, layer: int) -> list[str]:
        """The parts of a layer that have units of their own."""
        return [part for part, shape in self.parts.items() if shape.layers is None or layer in shape.layers]

    def owner(self, layer: int, part: str) -> int:
        """The layer whose units a part of a layer uses."""
        owners = self.parts[part].owners if part in self.parts else None
        return layer if owners is None else owners[layer]

    def uses(self, layer: int) -> list[Block]:
        """The blocks whose units a layer uses: its own, and those of earlier layers that it shares."""
        own, shared = self.parts_of(layer), [part for part, shape in self.parts.items() if shape.owners is not None]
        return [(self.owner(layer, part), part) for part in self.parts if part in (*own, *shared)]

    def users(self, layer: int, part: str) -> list[int]:
        """The layers that use the units of a block, its own first."""
        owners = self.parts[part].owners
        return [layer] if owners is None else [other for other, owner in enumerate(owners) if owner == layer]

    def read(self, part: str) -> list[int]:
        """The layers whose units other layers use too."""
        return [layer for layer in self.with_part(part) if len(self.users(layer, part)) > 1]

    def home(self, entry: Parameter | Map) -> Block:
        """The block that a map or parameter of a layer goes with."""
        assert entry.layer is not None
        part = entry.part or ""
        return self.owner(entry.layer, part), part

    @property
    def shares(self) -> bool:
        """Whether layers use the units of others."""
        return any(shape.owners is not None for shape in self.parts.values())

    def with_part(self, part: str) -> tuple[int, ...]:
        """The layers that have a part with units of their own."""
        layers = self.parts[part].layers
        return tuple(range(self.layers)) if layers is None else layers

    @property
    def alike(self) -> bool:
        """Whether the layers can only be written all alike, under a stock config."""
        return self.tower or self.shares

    @property
    def layers_stay(self) -> str:
        """Why no layer can be deleted, in words that follow a colon; empty if layers can."""
        if not self.layered:
            return ""
        if self.numbered:
            return NUMBERED
        if self.shares:
            return SHARING
        if any(p.layer is not None and p.part is None for p in self.parameters):
            return NORMS_STAY
        first, second = (self._inside(layer) for layer in (0, 1))
        return "its first layer lacks a norm of the others, none of which can take its place" if first < second else ""

    def _inside(self, layer: int) -> set[str]:
        """The names of the parameters of a layer, from there on."""
        prefix = f"{self.layers_path}.{layer}."
        return {p.name.removeprefix(prefix) for p in self.parameters if p.layer == layer}

    def blocks(self) -> Iterator[Block]:
        """Every (layer, part), layer by layer."""
        return ((layer, part) for layer in range(self.layers) for part in self.parts_of(layer))

    @cached_property
    def _maps_of(self) -> dict[Block, tuple[Map, ...]]:
        return self._by_block((entry, (entry.input, entry.output)) for entry in self.maps)

    @cached_property
    def _parameters_of(self) -> dict[Block, tuple[Parameter, ...]]:
        return self._by_block((entry, entry.dims) for entry in self.parameters)

    def _by_block(self, entries: Iterable[tuple[_Entry, tuple[Expr, ...]]]) -> dict[Block, tuple[_Entry, ...]]:
        """By block the entries that belong to the part, such as its norms, and those whose dimensions have its axis."""
        table: dict[Block, list[_Entry]] = {block: [] for block in self.blocks()}
        for entry, dims in entries:
            names = frozenset[str]().union(*(expr.names for expr in dims))
            if entry.layer is None:
                continue
            for owner, part in self.uses(entry.layer):
                if entry.part == part or self.parts[part].axis in names:
                    table[owner, part].append(entry)
        return {block: tuple(members) for block, members in table.items()}

    def maps_of(self, layer: int, part: str) -> tuple[Map, ...]:
        """The linear maps of a block, those of later layers that use its units included."""
        return self._maps_of[layer, part]

    def parameters_of(self, layer: int, part: str) -> tuple[Parameter, ...]:
        """The parameters of a block, norms included."""
        return self._parameters_of[layer, part]

    def matrices_of(self, layer: int, part: str) -> tuple[Parameter, ...]:
        """The parameters of a block that a token is multiplied by without a map: routers, depthwise convolutions."""
        weights = self._weights
        return tuple(p for p in self.parameters_of(layer, part) if len(p.dims) > 1 and p.name not in weights)

    @cached_property
    def mapped(self) -> frozenset[str]:
        """The weights and biases of maps that see all tokens of a sequence, by name; not those of stacks."""
        return frozenset(name for entry in self.maps if not entry.stack for name in (entry.weight, entry.bias))

    @cached_property
    def _weights(self) -> frozenset[str]:
        return frozenset(entry.weight for entry in self.maps) | frozenset(entry.bias for entry in self.maps)

    def consumers(self, layer: int, part: str) -> tuple[Map, ...]:
        """The maps whose *input* carries the part's axis; masking that input is what removal means.

        Those of later layers that use the units of the block are among them, behind its own.
        """
        axis = self.parts[part].axis
        return tuple(entry for entry in self.maps_of(layer, part) if axis in entry.input.names)

    def consumers_in(self, layer: int) -> list[Map]:
        """The consumers that lie in a layer, whosever units they take in."""
        found = (entry for block in self.uses(layer) for entry in self.consumers(*block))
        return [entry for entry in found if entry.layer == layer]

    def carriers(self, layer: int, part: str) -> Iterator[tuple[Parameter, int, NDArray[np.int64]]]:
        """Every (parameter, dimension, unit of each position) of a block that carries the part's axis.

        Without the modules that couple the units: what those hold belongs to the part as a whole.
        """
        axis = self.parts[part].axis
        coupled = {f"{self.layers_path}.{layer}.{module}" for module in self.parts[part].coupled}
        for parameter in self.parameters_of(layer, part):
            if coupled & {parameter.name, parameter.name.rpartition(".")[0]}:
                continue
            for dim, expr in enumerate(parameter.dims):
                if axis in expr.names:
                    yield parameter, dim, expr.units(axis, self.sizes)

    @cached_property
    def stream_norms(self) -> tuple[str, ...]:
        """The modules whose parameters are vectors over the residual stream: its norms, in the model's order."""
        vectors = [p for p in self.parameters if p.name.endswith(".weight") and list(map(str, p.dims)) == [RESIDUAL]]
        return tuple(p.name.removesuffix(".weight") for p in vectors)

    def narrowed(self, width: int | None) -> "Architecture":
        """The description of the model whose residual stream has another width; None leaves it as it is.

        The maps outside the layers that a token goes through, such as the output head, have the stream on one side.
        """
        if width is None:
            return self
        head_macs = self.head_macs * width // self.sizes[RESIDUAL]
        return replace(self, sizes={**self.sizes, RESIDUAL: width}, head_macs=head_macs)

    @cached_property
    def priced(self) -> dict[Hashable, Any]:
        """The prices that were counted before, by what they were counted in; allocation asks for them many times."""
        return {}

    def numel(self, parameter: Parameter, sizes: Mapping[str, int] | None = None) -> int:
        """Number of elements of a parameter, for other axis sizes if they are given."""
        return prod(dim.size(sizes or self.sizes) for dim in parameter.dims)

    @cached_property
    def decoder_parameters(self) -> int:
        """Parameters inside the layers."""
        return sum(self.numel(p) for p in self.parameters if p.layer is not None)

    @cached_property
    def total_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(self.numel(p) for p in self.parameters)

    @property
    def given_parameters(self) -> int:
        """All parameters of the model as it was given, with those that went with rows of the vocabulary."""
        return self.total_parameters + (self.trimmed.parameters if self.trimmed else 0)

    def to_json(self) -> str:
        """The description as JSON, readable by `from_json`."""
        return json.dumps(self, indent=1, default=_plain)

    @staticmethod
    def from_json(text: str) -> "Architecture":
        """Read what `to_json` wrote.

        Raises:
            KeyError: if a field is missing.
            TypeError: if there is a field of another version.
        """
        data: dict[str, Any] = json.loads(text)
        data |= {
            **{kept: None if data[kept] is None else parse_expr(data[kept]) for kept in ("cache", "state")},
            "parts": {name: PartShape(**_with_tuples(part)) for name, part in data["parts"].items()},
            "parameters": _stored(data["parameters"]),
            "maps": tuple(Map(**m | {side: parse_expr(m[side]) for side in ("input", "output")}) for m in data["maps"]),
            "buffers": _stored(data["buffers"]),
            "trimmed": Trimmed(**data["trimmed"]) if data["trimmed"] else None,
        }
        return Architecture(**data)


def _plain(value: Any) -> Any:
    """An expression as its text, another record as a mapping in the order of its fields."""
    if isinstance(value, Expr):
        return str(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _stored(tensors: Sequence[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    return tuple(Parameter(**{**one, "dims": tuple(map(parse_expr, one["dims"]))}) for one in tensors)


def _with_tuples(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) for key, value in part.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
