"""From the masks of torch.nn.utils.prune to structure, and back, for networks of the user's own.

`inspect` says which units a masked network has lost, `extract` takes them out, `apply` masks what a plan removes. See
`libprune.masks.models` for language models.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.utils import prune

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe_module import describe_module
from libprune.engine.module_family import NetworkFamily
from libprune.engine.plan import Plan
from libprune.engine.surgery import entries_kept
from libprune.masks.files import Masked
from libprune.masks.inspection import MaskInspection, block_masks, outside, require_units, zero_share
from libprune.masks.module_decision import Settled, like, settle
from libprune.masks.module_files import of_network
from libprune.models.identity import digest
from libprune.results.module_folder import (
    Pruned,
    difference,
    numbers_after,
    outputs,
    require_alike,
    require_fits,
    sliced_state,
    stored,
    with_tensors,
)


@dataclass(frozen=True)
class Extraction:
    """A masked network, what can be removed of it, and what is left.

    Attributes:
        masked: the network as it was given.
        family: its family.
        inputs: examples of what it takes, ``[samples, ...]``.
        architecture: its description.
        settled: which units go, and what folds into which bias.
    """

    masked: Masked[nn.Module]
    family: NetworkFamily
    inputs: Shaped[Tensor, "samples ..."]
    architecture: Architecture
    settled: Settled

    @property
    def plan(self) -> Plan:
        """Which units stay."""
        return self.settled.plan

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Attribute path to what it is now, of those that the family names."""
        return numbers_after(self.architecture, self.plan, self.family.numbers(self.masked.model))

    @cached_property
    def network(self) -> nn.Module:
        """The smaller network, on the CPU, in the stored type and evaluation mode."""
        return self._smaller(self.masked.dtype)

    @property
    def _computed(self) -> torch.dtype:
        """The type that the masked network computes in."""
        return next(self.masked.model.parameters()).dtype

    def _smaller(self, dtype: torch.dtype) -> nn.Module:
        state = sliced_state(stored(self.settled.network), self.architecture, self.plan)
        typed = {name: tensor.to(dtype) if tensor.dtype == self._computed else tensor for name, tensor in state.items()}
        return with_tensors(self.settled.network, typed, self.numbers)

    @cached_property
    def proof(self) -> dict[str, float]:
        """How the smaller network's outputs differ from those of the masked one, before it is rounded to its type.

        Returns:
            The largest difference on the inputs and the largest output, and the same on inputs without any order.

        Raises:
            LibpruneError: if they differ.
        """
        smaller = self._smaller(self._computed)
        noise = like(self.inputs, len(self.inputs), torch.Generator().manual_seed(1))
        found: dict[str, float] = {}
        for name, inputs in (("", self.inputs), ("noise_", noise)):
            differs, scale = difference(smaller, inputs, outputs(self.masked.model, inputs))
            what = "without the wholly masked units the outputs differ"
            require_alike(differs, scale, self.family.family, what)
            found |= {f"{name}difference": differs, f"{name}scale": scale}
        return found

    def save(self, folder: Path) -> None:
        """Write a folder that `libprune.networks.load` reads.

        Raises:
            LibpruneError: if the folder exists, or the smaller network does not compute the same.
        """
        repair = "masks" if self.masked.masks or self.settled.biases else "none"
        Pruned(self.network, self.architecture, self.plan, repair, [], self.numbers, self.proof).save(folder)


def inspect(network: nn.Module, family: NetworkFamily | Path, inputs: Shaped[Tensor, "samples ..."]) -> MaskInspection:
    """Which units of a network are wholly masked, which partly, and what slicing would save.

    Args:
        network: with active masks of `torch.nn.utils.prune` or with zeroed weights. It stays as it is.
        family: its description, or the file of it.
        inputs: a few examples of what it takes. Constants are those for inputs of their shape.

    Raises:
        LibpruneError: if the family does not describe the network, or a mask is none.
    """
    return inspection(extraction(of_network(network), family, inputs))


def extract(network: nn.Module, family: NetworkFamily | Path, inputs: Shaped[Tensor, "samples ..."]) -> Extraction:
    """Take the wholly masked units of a network out: `.plan`, `.network`, `.proof`, and `.save(folder)`.

    Args:
        network: as for `inspect`.
        family: its description, or the file of it.
        inputs: as for `inspect`; the outputs are compared on them.

    Raises:
        LibpruneError: if no unit is wholly masked, or the outputs without them differ.
    """
    found = extraction(of_network(network), family, inputs)
    require_units(inspection(found))
    _ = found.proof  # stops here where the outputs differ
    return found


def apply(network: nn.Module, family: NetworkFamily | Path, plan: Plan) -> None:
    """Register masks of `torch.nn.utils.prune` that make a dense network compute what the plan leaves.

    All that slicing removes is masked: rows, biases and columns of maps, and entries of batch norms and other vectors.

    Args:
        network: the dense one.
        family: its description, or the file of it.
        plan: which units stay.

    Raises:
        LibpruneError: if the plan is of another network, or leaves no unit of a part.
    """
    architecture = describe_module(of_network(network).model, NetworkFamily.of(family), None)
    require_fits(architecture, plan)
    names: dict[int, list[str]] = {}
    for name, tensor in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name.removesuffix("_orig"))
    groups = {group[0]: group for group in names.values()}
    for parameter in architecture.parameters:
        mask = entries_kept(architecture, plan, parameter)
        for path in groups[parameter.name] if not mask.all() else ():
            module, _, name = path.rpartition(".")
            owner = network.get_submodule(module)
            prune.custom_from_mask(owner, name, mask.to(getattr(owner, name).device))


def extraction(
    masked: Masked[nn.Module], family: NetworkFamily | Path, inputs: Shaped[Tensor, "samples ..."]
) -> Extraction:
    """What can be removed of a masked network.

    Raises:
        LibpruneError: if the family does not describe it.
    """
    described = NetworkFamily.of(family)
    inputs = inputs.detach().cpu()
    if inputs.is_floating_point():
        inputs = inputs.to(next(masked.model.parameters()).dtype)
    outputs(masked.model, inputs[:2])
    name = digest(stored(masked.model).items(), described.model_dump_json())
    architecture = describe_module(masked.model, described, inputs[:2], name)
    return Extraction(masked, described, inputs, architecture, settle(masked.model, architecture, inputs))


def inspection(found: Extraction) -> MaskInspection:
    """The numbers of an extraction."""
    masked, own, settled = found.masked, found.architecture, found.settled
    dense, left = (cost.size(own, plan).total for plan in (Plan.dense(own), found.plan))
    return MaskInspection(
        family=own.family,
        masks=len(masked.masks),
        outside=outside(masked, own),
        zeros=zero_share(masked, own),
        blocks=[
            block_masks(
                masked,
                own,
                block,
                ~found.plan.keep[block],
                settled.wholly[block],
                settled.folded[block] & ~found.plan.keep[block],
                settled.stays.get(block, ""),
            )
            for block in own.blocks()
        ],
        decoder=dense,
        saved_parameters=dense - left,
        saved_bytes=(dense - left) * masked.dtype.itemsize,
        dtype=str(masked.dtype).removeprefix("torch."),
        shape="network",
        biases_added=[],
    )
