"""Family files: which axes the modules of an architecture are made of.

A family file is all that anyone writes for a new architecture. `docs/notation.md` explains it;
statistics, scores, costs, masks, slices and the pruned config are derived from it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from libprune.engine.architecture import NORMS_STAY, NUMBERED, OWN_FAMILIES, Units
from libprune.engine.axes import Entry, Expr, LinearMap, parse_entry, parse_expr
from libprune.engine.errors import FamilyError, ParamsError, cause, nearest
from libprune.engine.heads import EXPERTS, HeadName, experts_of
from libprune.engine.yaml_file import problems, read_shipped, read_yaml

FOLDER = Path(__file__).parents[1] / "families"


def _readable(parse: Callable[[str], object]) -> AfterValidator:
    def read(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(read)


ExprText = Annotated[str, _readable(parse_expr)]
"""An expression of the notation, as it is written."""
EntryText = Annotated[str, _readable(parse_entry)]
"""A map, a vector or a tensor of the notation, as it is written."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, ignored_types=(cached_property,)
    )


class Router(_Strict):
    """How a mixture chooses the experts of a token."""

    module: str
    """The submodule of the layer that computes a logit for each expert, by one linear map."""
    top_k: str
    """The config key of the number of experts that a token goes through."""
    groups: str | None = None
    """The config key of the number of groups that the experts lie in, each of equal size. A group is judged by the two
    best experts in it."""
    from_groups: str | None = None
    """The config key of the number of groups that a token's experts are taken from."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that it reads."""
        return tuple(key for key in (self.top_k, self.groups, self.from_groups) if key)

    def least(self, config: Any) -> int:
        """The fewest experts with which the router works."""
        top_k, groups = getattr(config, self.top_k), self.groups_in(config)
        if self.groups is None:
            return int(top_k)
        chosen = getattr(config, self.from_groups) if self.from_groups else None
        return max(2, -(-top_k // (chosen or groups))) * groups

    def groups_in(self, config: Any) -> int:
        """The number of groups that a config says; 1 without groups."""
        return int(getattr(config, self.groups) or 1) if self.groups else 1


class Sharing(_Strict):
    """Layers without units of their own, which use those of an earlier layer."""

    lack: str
    """The submodule of the layer that these layers lack."""
    among: str
    """The config key that lists a kind for each layer. The earlier layer is the last one of the same kind that has
    units of its own."""

    def owners(self, having: Sequence[bool], kinds: Sequence[str]) -> tuple[int, ...] | None:
        """For each layer the one whose units it uses; None if all layers have units of their own.

        Args:
            having: whether each layer has units of its own.
            kinds: what kind it is of.

        Raises:
            FamilyError: for a layer before which there is none to share with.
        """
        if all(having):
            return None
        owners, last = [], dict[str, int]()
        for layer, kind in enumerate(kinds):
            if having[layer]:
                last[kind] = layer
            if kind not in last:
                raise FamilyError(f"layer {layer} lacks {self.lack}, and no layer of kind {kind!r} before it has it")
            owners.append(last[kind])
        return tuple(owners)


class Part(_Strict):
    """A part of a layer, attention or MLP, whose output is added to the residual stream."""

    axis: str
    """The axis whose indices are the units that can be removed."""
    units: Units | None = None
    """What the units are; by default groups in a part called attention, experts where there is a router, else channels.
    """
    where: str | None = None
    """A submodule or tensor of the layer; only layers that have it have the part. None: all layers."""
    sharing: Sharing | None = None
    """Which layers use units of an earlier layer: all layers have the part, but these have no units of their own."""
    groups: str | None = None
    """The config key of a number of groups of neighbouring units that must all keep the same number."""
    norm: str | None = None
    """An RMS norm over all units, or over those of each group, in front of the map that takes them in. Once units are
    gone it takes its mean over those that remain. Any other norm over units couples them."""
    router: Router | None = None
    """How the experts of a token are chosen, where the units are experts."""
    within: str | None = None
    """The axis of the channels inside of each expert, which are the units instead if the user asks for channels. A part
    with the axis of an earlier part, such as that of shared experts, then belongs to that part."""
    module: str
    """The submodule of the layer that computes the part, or all of it up to the modules that do not lie in it: a norm
    around it, a map behind it."""
    modules: dict[str, EntryText]
    """Path inside the layer of a module, or of a tensor that is no module's weight or bias, to its map, vector or
    tensor. All of them go when the part goes."""
    optional: list[str] = Field(default_factory=list)
    """Those of the modules that some models of the family lack."""
    attributes: dict[str, ExprText] = Field(default_factory=dict)
    """Path of an attribute that the code works out from the dense width, to the expression that it must equal."""

    @cached_property
    def parsed(self) -> dict[str, Entry]:
        """The modules with their descriptions read."""
        return {path: parse_entry(text) for path, text in self.modules.items()}

    @cached_property
    def consumed(self) -> frozenset[str]:
        """The axes that maps of the part take in."""
        maps = (entry for entry in self.parsed.values() if not isinstance(entry, Expr))
        inputs = (
            entry.input.names if isinstance(entry, LinearMap) else entry.names
            for entry in maps
            if isinstance(entry, LinearMap) or isinstance(entry.each, LinearMap)
        )
        return frozenset[str]().union(*inputs)


class ConfigKeys(_Strict):
    """How the Hugging Face config of the family says the sizes."""

    layers: str
    """The key that holds the number of layers."""
    sizes: dict[str, ExprText | list[ExprText]]
    """Key to the expression(s) whose size it holds. A key with two expressions needs both equal."""
    per_layer_lists: list[str] = Field(default_factory=list)
    """Keys that hold one entry a layer; the entries of a deleted layer go with it."""
    layer_numbers: list[str] = Field(default_factory=list)
    """Keys that hold a list of layers, by number from 0."""
    leading_layers: list[str] = Field(default_factory=list)
    """Keys that hold how many of the first layers are of another kind than those behind them."""
    fixed: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys of which only the listed values are understood."""
    positions_after: str | None = None
    """Key of a token's id behind whose number the positions begin; null if they begin at 0."""
    written: dict[str, Any] = Field(default_factory=dict)
    """Keys to the value that every result has in their place, such as a number of layers that libprune does not load.
    """
    also: dict[str, str] = Field(default_factory=dict)
    """Key to the name under which other programs read it, where transformers writes one name only."""
    biases: dict[str, str] = Field(default_factory=dict)
    """Part to the key that gives all its maps a bias when it is true, where the model has none."""
    inert: list[str] = Field(default_factory=list)
    """Keys that no prunable size depends on."""

    @cached_property
    def expressions(self) -> dict[str, tuple[Expr, ...]]:
        """The sizes with their expressions read, always as tuples."""
        return {
            key: tuple(parse_expr(text) for text in ([texts] if isinstance(texts, str) else texts))
            for key, texts in self.sizes.items()
        }

    def unsaid(self, axis: str) -> str | None:
        """The key, in words, that holds the size of the axis and another one, so that it cannot follow a change."""
        for key, exprs in self.expressions.items():
            if len(exprs) > 1 and any(axis in e.names for e in exprs):
                return f"its {key} is both {' and '.join(map(str, exprs))}"
        return None

    @property
    def known(self) -> frozenset[str]:
        """Every key that the family file speaks of."""
        return frozenset(
            {self.layers, *self.sizes, *self.fixed, *self.written, *self.biases.values(), *self.inert}
            | {*self.per_layer_lists, *self.layer_numbers, *self.leading_layers}
        )


class Gguf(_Strict):
    """How llama.cpp names and stores a model of the family in a GGUF file."""

    architecture: str
    """The architecture in llama.cpp whose layers are all alike."""
    per_layer: str | None = None
    """The architecture in llama.cpp whose layers may differ in width, if there is one that computes the same."""
    paired: list[str] = Field(default_factory=list)
    """Modules of a layer whose output llama.cpp rotates in pairs of neighbours, where transformers rotates the first
    half of a head with the second."""
    square: bool = False
    """Whether llama.cpp wants query heads that together are as wide as the hidden state."""
    unbiased: list[str] = Field(default_factory=list)
    """Modules of a layer that have no bias in llama.cpp."""
    shifted: bool = False
    """Whether the norms multiply by 1 + weight; llama.cpp stores the sum."""
    fixed: dict[str, list[Any]] = Field(default_factory=dict)
    """Config keys that llama.cpp does not read, to the values that its code stands for."""
    window: str | None = None
    """The config key of a sliding window that llama.cpp does not read, so that it attends to all tokens."""
    keys: dict[str, str] = Field(default_factory=dict)
    """Metadata key without the architecture, to the config key that holds its value; for what other families lack."""


class Tower(_Strict):
    """The language model inside a model that reads images too: a known family, by reference, under another prefix."""

    family: str
    """The family that describes the language model; its file lies beside this one, or ships with libprune."""
    model_types: list[str]
    """The `model_type` values that the nested config of such a language model may have."""
    prefix: str
    """Path of the language model, in place of what the paths of the family begin with (`model`)."""
    config: str
    """The key of the config under which that of the language model lies."""
    untouched: list[str]
    """Paths of the modules that stay whole, whatever they hold: the vision part, and what joins the two."""
    inert: list[str]
    """Keys, beside the nested config or in it, that no prunable size depends on."""
    sizes: dict[str, ExprText | list[ExprText]] = Field(default_factory=dict)
    """Config keys that hold something else than in the family: their expression(s), or none."""
    layers_stay: bool = False
    """Whether something is added behind layers by their number, so that none can be deleted."""


class Family(_Strict):
    """The description of one architecture family."""

    family: str
    model_types: list[str]
    """The `model_type` values of Hugging Face configs that this file describes."""
    layers: str
    """Path of the list of layers."""
    parts: dict[str, Part]
    stream: dict[str, ExprText] = Field(default_factory=dict)
    """Path of a norm inside the layer to its vector, where it works on the residual stream itself and not for one part;
    it stays whatever goes, so that no layer can be deleted."""
    stream_stays: str | None = None
    """Why the residual stream cannot be narrower, in words that follow a colon; null where it can."""
    shared: dict[str, EntryText] = Field(default_factory=dict)
    """Path inside the layer to the description of what belongs to no single part, such as a norm that several parts
    read; it goes with the last of them, with the layer."""
    outside: dict[str, EntryText]
    """Module path to map or vector, for what lies outside the layers."""
    heads: dict[HeadName, dict[str, EntryText]] = {"causal_lm": {}}
    """The heads that models of the family have, each with the modules outside the layers that only it has."""
    cache: ExprText | None = None
    """What the KV cache holds per token and layer; none in models that read all tokens at once."""
    state: ExprText | None = None
    """What the cache holds per sequence and layer, however long the sequence is: the states of recurrent parts and of
    the convolutions in front of them; none in models without such parts."""
    config: ConfigKeys
    gguf: Gguf | None = None
    """How llama.cpp stores models of the family; null where libprune writes no GGUF file of it."""
    tower: Tower | None = None
    """Where the family lies inside a larger model; null where it is the whole model."""
    tokens: list[str] = ["vocab"]
    """The axes whose indices are token ids: rows of tokens that no text needs can go from all of them."""

    def sized(self, config: Any) -> Any:
        """The part of a config, or of the content of a config.json, that holds the sizes: of a tower the nested one."""
        if self.tower is None:
            return config
        return config[self.tower.config] if isinstance(config, Mapping) else getattr(config, self.tower.config)

    @property
    def why_layers_stay(self) -> str | None:
        """Why no layer can be deleted, in words that follow a colon; None where layers can."""
        if self.tower is not None and self.tower.layers_stay:
            return NUMBERED
        return NORMS_STAY if self.stream else None

    def untouched(self, parameter: str) -> bool:
        """Whether a parameter belongs to the modules that stay whole, whatever they hold."""
        return self.tower is not None and parameter.startswith(tuple(f"{path}." for path in self.tower.untouched))

    def headless(self, prefix: str) -> "Family":
        """The family of models without a head: paths lack the prefix that they have inside a model with one.

        Args:
            prefix: transformers' name of the model without its head inside of one with it, `base_model_prefix`.
        """
        outside = {path.removeprefix(f"{prefix}."): text for path, text in self.outside.items()}
        return self.model_copy(update={"layers": self.layers.removeprefix(f"{prefix}."), "outside": outside})

    @field_validator("parts")
    @classmethod
    def _parts_readable(cls, parts: dict[str, Part]) -> dict[str, Part]:
        for part in parts.values():
            if part.sharing and part.where:
                raise ValueError("a part with sharing is in all layers, so it cannot have where as well")
            for axis in filter(None, (part.axis, part.within)):
                if axis not in part.consumed:
                    raise ValueError(f"no map of the part takes axis {axis!r} as its input")
            entry = part.parsed.get(part.norm or "")
            if part.norm and not (isinstance(entry, Expr) and part.axis in entry.names):
                raise ValueError(f"norm {part.norm!r} is no vector of the part that has axis {part.axis!r}")
        return parts


class _Reference(_Strict):
    """The file of a tower: all that it does not say is that of the family that it names."""

    family: str
    model_types: list[str]
    tower: Tower

    def resolved(self, of: Family) -> Family:
        """The family that the tower names, under the prefix of the tower.

        Raises:
            ValueError: if models of that family do not predict the next token.
        """
        if "causal_lm" not in of.heads:
            raise ValueError(f"tower.family {of.family!r} describes no models that predict the next token")
        root = of.layers.partition(".")[0]

        def moved(entries: Mapping[str, str]) -> dict[str, str]:
            return {self._path(root, path): text for path, text in entries.items()}

        return Family(
            family=self.family,
            model_types=self.model_types,
            layers=self._path(root, of.layers),
            parts=of.parts,
            stream=of.stream,
            stream_stays=of.stream_stays,
            shared=of.shared,
            outside=moved(of.outside),
            heads={"image_text_to_text": moved(of.heads["causal_lm"])},
            cache=of.cache,
            config=of.config.model_copy(update={"sizes": self._sizes(of)}),
            tower=self.tower,
            tokens=of.tokens,
        )

    def _sizes(self, of: Family) -> dict[str, str | list[str]]:
        return {key: texts for key, texts in {**of.config.sizes, **self.tower.sizes}.items() if texts}

    def _path(self, root: str, path: str) -> str:
        first, _, rest = path.partition(".")
        return f"{self.tower.prefix}.{rest}" if first == root else path


@cache
def shipped() -> Mapping[str, Family]:
    """All families that ship with libprune, by name."""
    return {family.family: family for family in map(load_family, sorted(FOLDER.glob("*.yaml")))}


def families() -> Mapping[str, Family]:
    """All families that are known, by name: those that ship with libprune, and the user's own.

    Raises:
        FamilyError: if an artifact holds a family that this version does not read.
    """
    own = {name: _own(json.dumps(content)) for name, content in OWN_FAMILIES.items()}
    return {**own, **shipped()}


@cache
def _own(content: str) -> Family:
    try:
        return Family.model_validate_json(content)
    except ValueError as error:
        raise FamilyError(f"the family that an artifact holds cannot be read: {cause(error)}") from error


def load_family(path: Path) -> Family:
    """Read one family file.

    Raises:
        FamilyError: if the file is not valid, with the place.
    """
    try:
        data = _read(path)
        if "tower" not in data:
            return Family.model_validate(data)
        reference = _Reference.model_validate(data)
        named = _read(_file_of(reference.tower.family, path))
        if "tower" in named:
            raise FamilyError(f"tower.family {reference.tower.family!r} is one of a tower itself; name that of its own")
        return reference.resolved(Family.model_validate(named))
    except ValidationError as error:
        raise FamilyError(f"family file {path}: {problems(error, Family)}") from error
    except ParamsError as error:
        other = "" if str(error).startswith(str(path)) else f"{path}: "  # of the family that a tower names
        raise FamilyError(f"family file {other}{error}") from error
    except ValueError as error:  # of what a tower names
        raise FamilyError(f"family file {path}: {cause(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    return read_shipped(path) if path.parent == FOLDER else read_yaml(path)


def _file_of(family: str, tower: Path) -> Path:
    """The file of the family that a tower names, which lies beside its own file or ships with libprune."""
    beside = tower.with_name(f"{family}.yaml")
    return beside if beside.exists() else FOLDER / beside.name


def described_by(model_type: str) -> Family | None:
    """The family that describes a `model_type`; None if there is none."""
    return next((family for family in families().values() if model_type in family.model_types), None)


def family_of(model_type: str, config: Mapping[str, Any] = MappingProxyType({})) -> Family:
    """The family that describes a `model_type`.

    Args:
        config: what the config of the model says, by which a message says what kind of model it is.

    Raises:
        FamilyError: for an unknown one, with the known ones and what to do.
    """
    known = {name: family for family in families().values() for name in family.model_types}
    if model_type in known:
        return known[model_type]
    kind = kind_of(config)
    if kind is not None:
        raise FamilyError(f"no family file describes model_type {model_type!r}: {kind}")
    like = nearest(model_type, known) or "."
    raise FamilyError(
        f"no family file describes model_type {model_type!r}; known: {', '.join(sorted(known))}{like} To add it, "
        "write a family file (docs/add-a-family.md), and name it in prepare.families"
    )


_OTHER_TOWERS = {"vision_config": "images", "audio_config": "sound", "video_config": "videos"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, in `layer_types` of a config, that differ in nothing but what their attention sees."""


def mixtures() -> list[str]:
    """The `model_type` values of the known families of mixtures of experts."""
    having = (family for family in families().values() if family.config.known & EXPERTS)
    return sorted(name for family in having for name in family.model_types)


def of_experts(number: int) -> str:
    """What a message says of a mixture of experts whose family is not known."""
    known = ", ".join(mixtures())
    return f"it is a mixture of {number} experts; the mixtures that are known are {known or 'none so far'}"


def kind_of(config: Mapping[str, Any]) -> str | None:
    """What sets a model apart from a decoder of like, dense layers, by its config; None if nothing does."""
    parts = [f"{name} ({what})" for name, what in _OTHER_TOWERS.items() if config.get(name)]
    if parts:
        text = config.get("text_config")
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        described = described_by(str(inner))
        part = f"; its text part is of type {inner!r}, " + (
            f"which family {described.family!r} describes, but only as a model of its own" if described else "unknown"
        )
        return f"it is a model of more than text, with {' and '.join(parts)}{part if inner else ''}"
    if number := experts_of(config):
        return of_experts(number)
    listed = config.get("layer_types")
    kinds = sorted(set(listed) - _ATTENTION) if isinstance(listed, list | tuple) else []
    return f"it has layers of other kinds than attention ({', '.join(kinds)})" if kinds else None
