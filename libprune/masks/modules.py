"""Removing wholly masked units of a network of the user's own: a smaller network, its folder and its proof."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from libprune.engine.architecture import Map
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.surgery import CONVOLUTIONS
from libprune.masks.contributions import network_contributions
from libprune.masks.decision import settle
from libprune.masks.extraction import Extraction
from libprune.masks.files import Masked, ties
from libprune.models.samples import digest
from libprune.results.module_folder import Pruned, difference, outputs, require_alike, sliced, stored

_SAMPLES = 4


@dataclass(frozen=True)
class NetworkExtraction(Extraction[nn.Module]):
    """The extraction of a network, with the smaller network that it gives.

    Attributes:
        family: its family.
        inputs: examples of what it takes, ``[samples, ...]``.
    """

    family: NetworkFamily
    inputs: Shaped[Tensor, "samples ..."]

    @property
    def shape(self) -> str:
        """The word for results that load into the network's own code."""
        return "network"

    @cached_property
    def network(self) -> nn.Module:
        """The smaller network, on the CPU, in the stored type and evaluation mode."""
        return self._smaller(self.masked.dtype)[0]

    def _smaller(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, int]]:
        dense = self.decision.model
        return sliced(dense, self.own, self.plan, self.family.numbers(dense), dtype)

    @cached_property
    def proof(self) -> dict[str, float]:
        """How the smaller network's outputs differ from those of the masked one, before it is rounded to its type.

        Returns:
            The largest difference on the inputs and the largest output, and both numbers on inputs without any order.

        Raises:
            LibpruneError: if they differ.
        """
        smaller, _ = self._smaller()
        noise = _like(self.inputs, len(self.inputs), torch.Generator().manual_seed(1))
        proof: dict[str, float] = {}
        for name, inputs in (("", self.inputs), ("noise_", noise)):
            differs, scale = difference(smaller, inputs, outputs(self.masked.model, inputs))
            what = "without the wholly masked units the outputs differ"
            require_alike(differs, scale, self.family.family, what)
            proof |= {f"{name}difference": differs, f"{name}scale": scale}
        return proof

    def save(self, folder: Path) -> None:
        """Write a folder that `libprune.networks.load` reads.

        Raises:
            LibpruneError: if the folder exists, or the smaller network does not compute the same.
        """
        network, numbers = self._smaller(self.masked.dtype)
        Pruned(network, self.own, self.plan, self.repair, [], numbers, self.proof).save(folder)


def network_extraction(
    masked: Masked[nn.Module], family: NetworkFamily | Path, inputs: Shaped[Tensor, "samples ..."]
) -> NetworkExtraction:
    """What can be removed of a masked network.

    Raises:
        LibpruneError: if the family does not describe it, or there is no input.
    """
    network, described = masked.model, NetworkFamily.of(family)
    if not len(inputs):
        raise LibpruneError(f"inputs of shape {list(inputs.shape)} hold no sample; give some, in the first dimension")
    inputs = inputs.detach().cpu()
    if inputs.is_floating_point():
        inputs = inputs.to(next(network.parameters()).dtype)
    outputs(network, inputs[:2])
    name = digest(stored(network).items(), described.model_dump_json())
    own = describe_module(network, described, inputs[:2], name)
    generator = torch.Generator().manual_seed(0)
    probes = _probes(network, inputs, generator)
    contributions = partial(network_contributions, architecture=own, probes=probes, generator=generator)
    return NetworkExtraction(masked, own, own, settle(network, own, contributions, _obstacle), described, inputs)


def _like(inputs: Shaped[Tensor, "samples ..."], samples: int, generator: torch.Generator) -> Shaped[Tensor, "..."]:
    """Inputs without any order: every entry is drawn from all entries of the given ones."""
    shape = (samples, *inputs.shape[1:])
    return inputs.flatten()[torch.randint(inputs.numel(), shape, generator=generator)]


def _probes(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Inputs as they are given, and shorter where the network takes these: what changes with size or time, shows."""
    given = torch.cat([inputs[:_SAMPLES], _like(inputs, _SAMPLES, generator)])
    shorter = [
        given.narrow(dim, 0, size)
        for dim in range(1, given.ndim)
        for size in sorted({1, given.shape[dim] // 2} - {0, given.shape[dim]})
    ]
    return [given, *(probe for probe in shorter if _takes(network, probe))]


def _takes(network: nn.Module, probe: Tensor) -> bool:
    try:
        with torch.no_grad():
            network(probe)
    except Exception:  # the network's own code raises what it likes
        return False
    return True


def _obstacle(network: nn.Module, consumer: Map) -> str:
    """Why a constant at the input of a map cannot go into its bias; empty if it can."""
    module, name = network.get_submodule(consumer.module), consumer.module
    if consumer.bias not in dict(network.named_parameters(remove_duplicate=False)):
        return f"they send a constant to {name}, which has no bias to hold it"
    if any(consumer.bias in names for names in ties(network)):
        return f"they send a constant to {name}, whose bias is that of another module, too"
    pads = isinstance(module, CONVOLUTIONS) and any(module._reversed_padding_repeated_twice)
    if pads and module.padding_mode == "zeros":
        return f"they send a constant to {name}, whose zero padding it does not reach, so that no bias can stand for it"
    return ""
