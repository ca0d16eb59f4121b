"""Slicing a network of the user's own, the folder of the result, and loading it into the code of the dense network."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.axes import Expr
from libprune.engine.errors import ArtifactError, LibpruneError, cause, missing_key
from libprune.engine.plan import Plan
from libprune.engine.surgery import CONVOLUTIONS, slice_parameter
from libprune.engine.tables import join_blocks, unit_index
from libprune.pipeline.artifacts import damage, require, write_table
from libprune.pipeline.atomic import writing_folder
from libprune.repair.least_squares import Fit, fit_table, mean_errors
from libprune.results.proof import agrees
from libprune.results.record import PLAN, PROVENANCE, read_provenance, versions, write_provenance

WEIGHTS = "model.safetensors"
"""The file of a pruned network's tensors."""


def stored(network: nn.Module) -> dict[str, Tensor]:
    """What a network stores, each tensor once under its first name.

    Raises:
        LibpruneError: if it stores something else than tensors.
    """
    seen: set[int] = set()
    tensors = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise LibpruneError(
                f"the network stores {name!r}, a {type(tensor).__name__} and no tensor (get_extra_state), which cannot "
                "be sliced; keep it in a tensor, or out of what is stored"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def require_fits(architecture: Architecture, plan: Plan) -> None:
    """Stop at a plan of another network, or one that leaves nothing of a part.

    Raises:
        LibpruneError: naming the parts.
    """
    units = {block: len(keep) for block, keep in plan.keep.items()}
    expected = {block: architecture.units(block[1]) for block in architecture.blocks()}
    if units != expected:
        raise LibpruneError(
            f"the plan is of units {_counts(units)}, but the network has {_counts(expected)}; take a plan of this one"
        )
    empty = [part for layer, part in architecture.blocks() if plan.gone(layer, part)]
    if empty:
        raise LibpruneError(f"the plan leaves no unit of {', '.join(empty)}; a network needs one of each at least")


def _counts(units: Mapping[Block, int]) -> str:
    return ", ".join(f"{part} {count}" for (_, part), count in units.items()) or "none"


def sliced(
    network: nn.Module,
    architecture: Architecture,
    plan: Plan,
    attributes: Mapping[str, Expr],
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, dict[str, int]]:
    """A smaller copy of a network, and by path the numbers that its code works out from widths.

    Args:
        network: of the dense shape.
        plan: which units stay.
        attributes: by path the expression of each number.
        dtype: the type to store, where it is not the one that the network computes in.

    Raises:
        LibpruneError: if the plan is of another network, or leaves nothing of a part.
    """
    require_fits(architecture, plan)
    state, computed = stored(network), next(network.parameters()).dtype
    for entry in (*architecture.parameters, *architecture.buffers):
        if entry.name in state:
            state[entry.name] = slice_parameter(state[entry.name], architecture, plan, entry)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.dtype == computed else tensor for name, tensor in state.items()}
    sizes = dict(architecture.sizes) | {part: plan.kept(layer, part) for layer, part in architecture.blocks()}
    numbers = {path: expr.size(sizes) for path, expr in attributes.items()}
    return with_tensors(network, state, numbers), numbers


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
    for name in sorted(known.keys() ^ state.keys()):
        where, names = ("the network", known) if name in state else ("the file", state)
        raise LibpruneError(f"{missing_key(name, names, where)}; load it into the network that it was made from")
    tied, buffers = dict[int, nn.Parameter](), dict[int, Tensor]()
    for path, module in list(new.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                full = f"{path}.{name}".removeprefix(".")
                if id(parameter) not in tied:
                    tied[id(parameter)] = nn.Parameter(state[full].clone(), parameter.requires_grad)
                module._parameters[name] = tied[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            full = f"{path}.{name}".removeprefix(".")
            if full in state:
                buffers[id(buffer)] = state[full].clone()
            module._buffers[name] = buffers.get(id(buffer), buffer)
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
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for tensor in (module.weight, module.running_mean):
            module.num_features = module.num_features if tensor is None else len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """What a network computes.

    Raises:
        LibpruneError: if that is not one tensor.
    """
    with torch.no_grad():
        result = network(inputs)
    if not isinstance(result, Tensor):
        raise LibpruneError(
            f"the network returns a {type(result).__name__}, not a tensor; wrap it in a module that returns what counts"
        )
    return result


def difference(network: nn.Module, inputs: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference between a sliced network's outputs and those expected, and the largest of these.

    Raises:
        LibpruneError: if it does not run, or its outputs have another shape.
    """
    try:
        given = outputs(network, inputs)
    except RuntimeError as error:
        raise LibpruneError(
            f"the sliced network does not run: {cause(error)}; it works out something from a width that the "
            "family's `attributes` do not name, or stores something of that width that its `modules` do not"
        ) from error
    if given.shape != expected.shape:
        raise LibpruneError(
            f"the sliced network's outputs have shape {list(given.shape)} instead of {list(expected.shape)}: an axis "
            "of its outputs is prunable; take it out of the family's `prunable`"
        )
    return float((given - expected).abs().max()), float(expected.abs().max())


def require_alike(difference: float, scale: float, family: str, what: str) -> None:
    """Stop where a smaller network does not compute the same.

    Args:
        difference: the largest of an output.
        scale: the largest output.
        family: name of the family, which is the likely cause.
        what: what differs, for the message.

    Raises:
        LibpruneError: with both numbers.
    """
    if not agrees(difference, scale):
        raise LibpruneError(
            f"{what} by {difference:.3g} of {scale:.3g}: family {family!r} describes a module wrongly, or the network "
            "works out something from a width that the family's `attributes` do not name"
        )


@dataclass(frozen=True)
class Pruned:
    """A smaller network and how it came about.

    Attributes:
        network: the module, in evaluation mode.
        dense: the description of the dense network.
        plan: which units stay.
        repair: how the weights were fitted.
        fits: how well each repaired map was fitted.
        numbers: attribute path to what it is now, of those that the family names.
        proof: largest difference of an output between the sliced and the masked network, and the largest output; in
            float64 where they differ in the network's own precision, as units that fire at a threshold may.
    """

    network: nn.Module
    dense: Architecture
    plan: Plan
    repair: str
    fits: list[Fit]
    numbers: dict[str, int]
    proof: dict[str, float]

    @property
    def parameters(self) -> int:
        """Number of parameters of the smaller network."""
        return cost.size(self.dense, self.plan).total

    def save(self, folder: Path | str) -> None:
        """Write a folder that `libprune.networks.load` reads: weights, plan, fits, record.

        Raises:
            LibpruneError: if the folder exists, or does not read back as it was written.
        """
        folder = Path(folder)
        if folder.exists():
            raise LibpruneError(f"{folder} exists; name a folder that does not")
        meta = {"model": self.dense.fingerprint, "plan": self.plan.digest}
        keep = join_blocks(self.dense, self.plan.keep)
        with writing_folder(folder) as partial_folder:
            tensors = {name: tensor.contiguous() for name, tensor in stored(self.network).items()}
            save_file(tensors, partial_folder / WEIGHTS)
            write_table(partial_folder / PLAN, unit_index(self.dense) | {"keep": keep}, meta)
            write_table(partial_folder / "repair.parquet", fit_table(self.fits), meta)
            made: dict[str, Any] = {"family": self.dense.family, "numbers": self.numbers, "repair": self.repair}
            made |= {"errors": mean_errors(self.fits), "proof": self.proof}
            write_provenance(partial_folder, meta | made | versions())
            again = stored(load(partial_folder, self.network))
            if any(not torch.equal(tensor.cpu(), again[name].cpu()) for name, tensor in tensors.items()):
                raise ArtifactError(f"the weights written to {folder} do not read back as they were")


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
    record = read_provenance(folder)
    if "numbers" not in record:
        raise ArtifactError(
            f"{folder / PROVENANCE} does not say how a network was pruned; name a folder of Pruned.save"
        )
    _require_of(path, state, stored(network))
    return with_tensors(network, state, record["numbers"]).eval()


def _require_of(path: Path, state: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Stop at a tensor that is none of the dense one with fewer outputs or inputs."""
    for name in state.keys() & dense.keys():
        narrow, whole = state[name].shape, dense[name].shape
        fewer = len(narrow) == len(whole) and all(map(int.__le__, narrow, whole))
        if not fewer or narrow[2:] != whole[2:]:
            raise LibpruneError(
                f"{path}: {name} has shape {list(narrow)}, which is no part of the network's {list(whole)}; load it "
                "into the network that it was made from"
            )
