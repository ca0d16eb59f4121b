"""Slicing a network, and loading what was sliced into the code that made the dense one."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from libprune.architecture import Architecture
from libprune.artifacts import damage, read_json, require
from libprune.axes import Expr
from libprune.errors import ArtifactError, LibpruneError, missing_key
from libprune.plan import Plan
from libprune.surgery import CONVOLUTIONS, slice_parameter

WEIGHTS, RECORD = "model.safetensors", "libprune.json"


def stored(network: nn.Module) -> dict[str, Tensor]:
    """What a network stores, each tensor once under its first name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def sliced_state(state: Mapping[str, Tensor], architecture: Architecture, plan: Plan) -> dict[str, Tensor]:
    """What the smaller network stores.

    Raises:
        LibpruneError: if nothing is left of a part.
    """
    empty = [part for layer, part in architecture.blocks() if plan.gone(layer, part)]
    if empty:
        raise LibpruneError(f"the plan leaves no unit of {', '.join(empty)}; a network needs one of each at least")
    carrying = {entry.name: entry for entry in (*architecture.parameters, *architecture.buffers)}
    return {
        name: _whole(slice_parameter(tensor, architecture, plan, carrying[name])) if name in carrying else tensor
        for name, tensor in state.items()
    }


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def numbers_after(architecture: Architecture, plan: Plan, attributes: Mapping[str, Expr]) -> dict[str, int]:
    """Attribute path to what it must be in the smaller network."""
    kept = {part: plan.kept(layer, part) for layer, part in architecture.blocks()}
    return {path: expr.size({**architecture.sizes, **kept}) for path, expr in attributes.items()}


def with_tensors(network: nn.Module, state: Mapping[str, Tensor], numbers: Mapping[str, int]) -> nn.Module:
    """A copy of a network with other tensors, whatever their shapes.

    Args:
        network: its code; of the dense shape, say.
        state: every tensor that it stores, each once.
        numbers: attribute path to value.

    Raises:
        LibpruneError: if the names are not the network's.
    """
    new = copy.deepcopy(network)
    known = stored(new)
    for name in known.keys() ^ state.keys():
        where, names = ("the network", known) if name in state else ("the file", state)
        raise LibpruneError(f"{missing_key(name, names, where)}; load it into the network that it was made from")
    tied: dict[int, nn.Parameter] = {}
    for path, module in list(new.named_modules(remove_duplicate=False)):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                full = f"{path}.{name}".removeprefix(".")
                if id(parameter) not in tied:
                    tied[id(parameter)] = nn.Parameter(state[full].clone(), parameter.requires_grad)
                module._parameters[name] = tied[id(parameter)]
        for name in list(module._buffers):
            full = f"{path}.{name}".removeprefix(".")
            if full in state:
                module._buffers[name] = state[full].clone()
        _note_shapes(module)
    for path, value in numbers.items():
        owner, _, name = path.rpartition(".")
        setattr(new.get_submodule(owner), name, value)
    return new


def _note_shapes(module: nn.Module) -> None:
    """Let the numbers that torch's own modules keep of their shapes say the new ones."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        each = module.out_channels // module.groups
        module.out_channels = module.weight.shape[0]
        if module.groups > 1:  # a depthwise one; others of several groups are not sliced
            module.groups = module.out_channels // each if module.weight.shape[1] == 1 else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def load(folder: Path | str, network: nn.Module) -> nn.Module:
    """The pruned network of a folder, in evaluation mode.

    Args:
        folder: what `Pruned.save` wrote.
        network: made by the code of the dense one; its weights do not matter.

    Raises:
        LibpruneError: if the folder is damaged, or of another network.
    """
    folder = Path(folder)
    path = require(folder / WEIGHTS, "slice")
    with damage(path, "slice"), safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in list(file.keys())}
    record = read_json(folder / RECORD, "slice")
    if "numbers" not in record:
        raise ArtifactError(f"{folder / RECORD} does not say how a network was pruned; name a folder of Pruned.save")
    return with_tensors(network, state, record["numbers"]).eval()


def difference(network: nn.Module, inputs: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference between a network's outputs and those expected, and the largest of these."""
    with torch.no_grad():
        found = network(inputs)
    return float((found - expected).abs().max()), float(expected.abs().max())
