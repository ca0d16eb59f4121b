"""How a model reads its residual stream: which norm stands before each map, and whether the stream can be narrower."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import RESIDUAL, Architecture, Parameter
from libprune.engine.describe import stored_tensors, without_weights
from libprune.engine.errors import LibpruneError, NotExpressibleError
from libprune.engine.family import families
from libprune.engine.heads import CAUSAL_LM
from libprune.engine.stock_config import new_config
from libprune.engine.surgery import hooked, takes_mean


@dataclass(frozen=True)
class Norm:
    """A norm over the residual stream.

    Attributes:
        module: its path.
        centred: whether it takes the mean away, as LayerNorm does.
        shift: what it adds to its weight to make its gain: 0, or 1.
        biased: whether it adds a bias.
    """

    module: str
    centred: bool
    shift: int
    biased: bool

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Stream:
    """What reads a model's residual stream.

    Attributes:
        norms: the norms by their modules, in the model's order.
        readers: names of the weights that read the stream, with the module of the norm in front of each.
        tied: the module of the norm before an output head that shares the embedding's weight; None if it has its own.
    """

    norms: Mapping[str, Norm]
    readers: Mapping[str, str]
    tied: str | None


def require_narrowable(architecture: Architecture, config: PreTrainedConfig, width: int) -> None:
    """Stop at a model whose residual stream cannot have another width, or not this one.

    Raises:
        LibpruneError: saying why; of the model, of the width, or of what its config can say.
    """
    whole = architecture.sizes.get(RESIDUAL, 0)
    if not 1 <= width < whole:
        raise LibpruneError(
            f"allocate.width = {width}, but the residual stream of this model has {whole} columns; choose fewer or null"
        )
    require_described(architecture)
    narrow = architecture.narrowed(width)
    try:
        new = new_config(families()[architecture.family], config, dict(narrow.sizes), tuple(range(narrow.layers)))
    except NotExpressibleError as error:
        raise NotExpressibleError(f"allocate.width = {width} cannot be written: {error}; set it to null") from error
    built = stored_tensors(without_weights(new))
    for parameter in architecture.parameters:
        shape = tuple(dim.size(narrow.sizes) for dim in parameter.dims)
        if (found := tuple(built[parameter.name].shape)) != shape:
            raise NotExpressibleError(
                f"allocate.width = {width} cannot be written: {type(new).__name__} would give {parameter.name} the "
                f"shape {list(found)}, where {list(shape)} is kept, because this size follows from the width; set it "
                "to null"
            )


def require_described(architecture: Architecture) -> None:
    """Stop at a model whose residual stream keeps its width, whatever its config could say.

    Raises:
        LibpruneError: saying why.
    """
    if why := _stays(architecture):
        raise LibpruneError(
            f"allocate.width is set, but the residual stream of a {architecture.family} model cannot be narrower: "
            f"{why}; set it to null"
        )


def _stays(architecture: Architecture) -> str:
    """Why the residual stream keeps its width, in words that follow a colon; empty if it can be narrower."""
    if not architecture.layered:
        return "a network of your own has none"
    if architecture.tower:
        return "image features enter it, whose modules stay whole"
    if architecture.head != CAUSAL_LM.name:
        return f"this is only described for models that predict the next token, and its head is {architecture.head}"
    return families()[architecture.family].stream_stays or ""


def read_stream(model: PreTrainedModel, architecture: Architecture) -> Stream:
    """Find what reads the residual stream, by running the model on a few tokens.

    Raises:
        LibpruneError: naming a weight that reads the stream without a described norm in front of it, one that carries
            the stream in a way that is not known, or a norm that is none.
    """
    width = architecture.sizes[RESIDUAL]
    norms = {name: _norm(model.get_submodule(name), name, width) for name in architecture.stream_norms}
    given: dict[int, tuple[str, Tensor]] = {}
    taken: dict[str, str] = {}

    def give(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given[output.untyped_storage().data_ptr()] = name, output  # kept, so that its place stays its own

    def take(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if x is not None and x.is_floating_point() and x.shape[-1] == width:
            taken[name] = given.get(x.untyped_storage().data_ptr(), ("", x))[0]

    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    owners = {p.name: _owner(model, p) for p in architecture.parameters if len(p.dims) > 1 and _carries(p, width)}
    with hooked(model) as handles, torch.no_grad():
        for name in norms:
            handles.append(model.get_submodule(name).register_forward_hook(partial(give, name)))
        for name, owner in owners.items():
            handles.append(owner.register_forward_pre_hook(partial(take, name)))
        if tied:
            handles.append(head.register_forward_pre_hook(partial(take, _HEAD)))
        model(input_ids=torch.arange(2, device=model.device)[None], use_cache=False)
    writers = [entry for entry in architecture.maps if str(entry.output) == RESIDUAL]
    written = {name for entry in writers for name in (entry.weight, entry.bias)}
    if both := sorted(written & {e.weight for e in architecture.maps if str(e.input) == RESIDUAL}):
        raise LibpruneError(f"allocate.width is set, but {both[0]} both reads and writes the residual stream")
    readers = {name: norm for name, norm in taken.items() if name not in written}
    for name, norm in readers.items():
        if not norm:
            raise LibpruneError(
                f"allocate.width is set, but {'the output head' if name == _HEAD else name} reads the residual stream "
                "without a described norm in front of it, which would take its statistics over fewer columns; set it "
                "to null"
            )
    return Stream(norms, {name: norm for name, norm in readers.items() if name != _HEAD}, readers.get(_HEAD))


_HEAD = "output head"


def _owner(model: nn.Module, parameter: Parameter) -> nn.Module:
    return model.get_submodule(parameter.name.rpartition(".")[0])


def _carries(parameter: Parameter, width: int) -> bool:
    """Whether a tensor has the residual stream along one of its dimensions.

    Raises:
        LibpruneError: if it has more than one, or along with other axes.
    """
    carrying = [dim for dim in parameter.dims if RESIDUAL in dim.names]
    if len(carrying) > 1 or any(str(dim) != RESIDUAL for dim in carrying):
        dims = ", ".join(map(str, parameter.dims))
        raise LibpruneError(
            f"allocate.width is set, but {parameter.name} carries the residual stream as [{dims}], which cannot be "
            "narrowed so far; set it to null"
        )
    return bool(carrying)


@torch.no_grad()
def _norm(module: nn.Module, name: str, width: int) -> Norm:
    """What kind of norm a module is, by its outputs.

    Raises:
        LibpruneError: if it is no norm with a gain.
    """
    weight = module.get_parameter("weight").float()
    x = torch.linspace(-1, 2, width, device=weight.device)
    centred = takes_mean(module, width)
    unit = unit_states(x, centred)
    bias = getattr(module, "bias", None)
    given = module(x.to(module.get_parameter("weight").dtype)[None])[0].float() - (0 if bias is None else bias.float())
    for shift in (0, 1):
        expected = (weight + shift) * unit
        if torch.allclose(given, expected, atol=0.02 * float(expected.abs().max()), rtol=0):
            return Norm(name, centred, shift, bias is not None)
    raise LibpruneError(
        f"allocate.width is set, but {name} is no norm over the residual stream that multiplies by its weight; set it "
        "to null"
    )


def unit_states(x: Float[Tensor, "*batch width"], centred: bool) -> Float[Tensor, "*batch width"]:
    """States divided by the root of their mean square, less their mean where the norm takes that away; float32."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * (x.square().mean(-1, keepdim=True) + _LEAST).rsqrt()


_LEAST = 1e-12
"""Added to the mean square, as norms do."""

Take = Callable[[Norm, Tensor, Tensor], None]
"""A function called with a norm, its input and its output."""


def watch(model: nn.Module, stream: Stream, take: Take) -> list[Any]:
    """Call a function for every pass through a norm; returns the handles of the hooks."""
    norms = stream.norms.values()
    return [model.get_submodule(norm.module).register_forward_hook(partial(_give, take, norm)) for norm in norms]


def _give(take: Take, norm: Norm, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    take(norm, args[0].detach(), output.detach())
