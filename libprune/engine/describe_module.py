"""From a torch module and its family file to an `Architecture`. A closed world: whatever the file does not speak of
stops here, by name.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from libprune.engine.architecture import Architecture, Map, Parameter, PartShape
from libprune.engine.axes import Equation, Expr, LinearMap, parse_expr
from libprune.engine.describe import solve_for, tensor_dims, tensor_equations
from libprune.engine.errors import FamilyError
from libprune.engine.module_family import RESERVED, NetworkFamily
from libprune.engine.surgery import CONVOLUTIONS, features_last, hooked

MAPS = (nn.Linear, *CONVOLUTIONS)
_TABLES = (nn.Embedding,)
_OVER_UNITS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
"""Norms whose statistics run over features, so that they change when a unit goes."""


def describe_module(
    network: nn.Module, family: NetworkFamily, example: Tensor | None, fingerprint: str = ""
) -> Architecture:
    """Solve the axes of a network.

    Args:
        network: any module, in evaluation mode.
        family: its description.
        example: inputs of a few samples, ``[samples, ...]``; they are run through it once. None where only shapes
            matter, not how often a map runs.
        fingerprint: digest of its weights, kept in the result.

    Raises:
        FamilyError: for a module or parameter without a description, sizes that contradict, or a module that cannot
            lose units.
    """
    described = family.described(network)
    maps = {path for path, entry in described.items() if isinstance(entry, LinearMap)}
    parameters, buffers = _stored(network, family, described)
    sizes = _solve(network, family, [*parameters, *buffers])
    rows = Counter[str]() if example is None else _rows(network, maps, example)
    axes = family.axes(sorted({name for entry in described.values() for name in entry.names}))
    architecture = Architecture(
        family=family.family,
        sizes=sizes,
        layers=1,
        layers_path="",
        parts={axis: PartShape(axis, "", None) for axis in axes},
        parameters=tuple(parameters),
        maps=tuple(_maps(network, described, axes, rows)),
        cache=None,
        head="network",
        head_macs=0,
        fingerprint=fingerprint,
        buffers=tuple(buffers),
    )
    _require_prunable(network, architecture, described)
    _require_own_weights(network, architecture)
    return architecture


def _kernel(sides: tuple[int, ...]) -> tuple[str, ...]:
    """The axes of the sides of a kernel, each named by its size."""
    return tuple(f"k{size}" for size in sides)


def _maps(
    network: nn.Module, described: dict[str, LinearMap | Expr], axes: list[str], rows: Counter[str]
) -> Iterator[Map]:
    for path, entry in described.items():
        module = network.get_submodule(path)
        if isinstance(entry, LinearMap) and not isinstance(module, _TABLES):
            sides = tuple(module.get_parameter("weight").shape[2:])
            patch = Expr(tuple((*term, *_kernel(sides)) for term in entry.input.terms))
            reads = " + ".join(axis for axis in axes if axis in entry.input.names)
            yield Map(path, 0, reads, patch, entry.output, False, prod(sides), rows[path])


def _stored(
    network: nn.Module, family: NetworkFamily, described: dict[str, LinearMap | Expr]
) -> tuple[list[Parameter], list[Parameter]]:
    """Every parameter and every stored buffer, in the network's own order."""
    entries: dict[str, Parameter] = {}
    stored = network.state_dict(keep_vars=True)
    for path, entry in described.items():
        for name in _own(network.get_submodule(path), stored, path):
            entries[name] = Parameter(name, _dims(name, entry, stored[name], network.get_submodule(path)), 0, None)
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    again = _of_repeated_modules(network)
    for name, tensor in stored.items():
        if name in again:
            continue
        if name not in entries and isinstance(tensor, nn.Parameter):
            raise FamilyError(
                f"family {family.family!r} does not describe parameter {name!r} {list(tensor.shape)} of this network; "
                "add its module"
            )
        same = first.get(id(tensor), name)
        if same != name and entries[same].dims != entries[name].dims:
            raise FamilyError(
                f"{same} and {name} are one parameter, but family {family.family!r} gives them two shapes"
            )
    parameters = [entries[name] for name in first.values()]
    return parameters, [entries[n] for n, t in stored.items() if n in entries and not isinstance(t, nn.Parameter)]


def _own(module: nn.Module, stored: dict[str, Tensor], path: str) -> list[str]:
    """The stored names of a module's own tensors, without those of modules inside."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    names = (f"{path}.{name}".removeprefix(".") for name, _ in own)
    return [name for name in names if name in stored]


def _of_repeated_modules(network: nn.Module) -> set[str]:
    """The names of what a module stores that has another path before."""
    first = {path for path, _ in network.named_modules()}
    every = dict(network.named_modules(remove_duplicate=False))
    return {f"{path}.{key}" for path in every.keys() - first for key in every[path].state_dict()}


def _dims(name: str, entry: LinearMap | Expr, tensor: Tensor, module: nn.Module) -> tuple[Expr, ...]:
    sides = tuple(map(parse_expr, _kernel(tuple(tensor.shape))))
    if isinstance(entry, Expr):
        alike = tensor.shape in {(), (1,)} or (isinstance(module, nn.PReLU) and module.num_parameters == 1)
        return sides if alike else (entry, *sides[1:])
    if not isinstance(module, MAPS + _TABLES) or getattr(module, "groups", 1) > 1:
        raise FamilyError(
            f"{name} belongs to a {type(module).__name__}"
            f"{' of several groups' if isinstance(module, MAPS) else ''}, which libprune cannot take apart as a map; "
            "maps are Linear, Conv1d and Conv2d (of one group) and Embedding, and a depthwise convolution is a vector"
        )
    dims = tensor_dims(name.rpartition(".")[2], entry, transposed=isinstance(module, _TABLES))
    return (*dims, *sides[2:])


def _solve(network: nn.Module, family: NetworkFamily, tensors: list[Parameter]) -> dict[str, int]:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    equations = tensor_equations(tensors, shapes)
    for path, expr in family.numbers(network).items():
        module, _, name = path.rpartition(".")
        equations.append(Equation(expr, getattr(network.get_submodule(module), name), f"attribute {path}"))
    names = {name for equation in equations for name in equation.expr.names if RESERVED.fullmatch(name)}
    equations += [Equation(parse_expr(name), int(name[1:]), "a kernel's side") for name in sorted(names)]
    return solve_for(family.family, "network", equations)


def _rows(network: nn.Module, paths: set[str], example: Tensor) -> Counter[str]:
    """By map how many rows one sample makes; a map that runs at every step of time counts all of them."""
    rows: Counter[str] = Counter()

    def count(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not args:
            raise FamilyError(f"module {path!r} is given its input by keyword; give it by place, where hooks see it")
        rows[path] += features_last(module, output)[..., 0].numel()

    with hooked(network) as handles, torch.no_grad():
        for path in paths:
            handles.append(network.get_submodule(path).register_forward_hook(partial(count, path)))
        network(example)
    silent = sorted(paths - rows.keys())
    if silent:
        raise FamilyError(
            f"module {silent[0]!r} is described, but the network does not call it: its statistics cannot be "
            "seen. Call the module itself, not its weight"
        )
    return Counter({path: number // len(example) for path, number in rows.items()})


def _require_own_weights(network: nn.Module, architecture: Architecture) -> None:
    """Stop at a map that shares its weight: a repair of one module would change the other."""
    owned = {parameter.name for parameter in architecture.parameters}
    for entry in {entry for block in architecture.blocks() for entry in architecture.maps_of(*block)}:
        if entry.weight not in owned:
            same = network.get_parameter(entry.weight)
            owner = next(name for name, parameter in network.named_parameters() if parameter is same)
            raise FamilyError(
                f"{entry.weight} and {owner} are one parameter, and prunable axes lie in it; untie them "
                "(module.weight = nn.Parameter(module.weight.clone())), or take its axes from `prunable`"
            )


def _require_prunable(network: nn.Module, architecture: Architecture, described: dict[str, LinearMap | Expr]) -> None:
    for path, entry in described.items():
        module = network.get_submodule(path)
        prunable = [axis for axis in architecture.parts if axis in entry.names]
        if prunable and isinstance(module, _OVER_UNITS):
            raise FamilyError(
                f"axis {prunable[0]!r} cannot be prunable: {path!r} is a {type(module).__name__}, whose statistics run "
                "over its units and change when one of them goes"
            )
        if isinstance(module, _TABLES) and isinstance(entry, LinearMap) and entry.input.names & set(architecture.parts):
            raise FamilyError(f"axis {entry.input!s} cannot be prunable: it is what embedding {path!r} looks up")
    for part in architecture.parts:
        if not architecture.consumers(0, part):
            raise FamilyError(f"axis {part!r} is prunable, but no map takes it as its input")
