"""A pruned network, its proof, and its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import unit_index
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import writing_folder
from libprune.repair.least_squares import Fit, fit_table, mean_errors
from libprune.results.module_slicing import WEIGHTS, load, stored
from libprune.results.record import PLAN, versions, write_provenance

TOLERANCE = 1e-4
"""How far outputs may differ in float32, of the largest one."""


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
    if not difference <= TOLERANCE * scale:
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
        """How many it has."""
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
        keep = np.concatenate([self.plan.keep[block] for block in self.dense.blocks()])
        with writing_folder(folder) as partial_folder:
            tensors = {name: tensor.contiguous() for name, tensor in stored(self.network).items()}
            save_file(tensors, partial_folder / WEIGHTS)
            write_table(partial_folder / PLAN, unit_index(self.dense) | {"keep": keep}, meta)
            write_table(partial_folder / "repair.parquet", fit_table(self.fits), meta)
            made: dict[str, Any] = {"family": self.dense.family, "numbers": self.numbers, "repair": self.repair}
            made |= {"errors": mean_errors(self.fits), "proof": self.proof}
            write_provenance(partial_folder, meta | made | versions())
            again = stored(load(partial_folder, self.network))
            if any(not torch.equal(tensor, again[name]) for name, tensor in tensors.items()):
                raise ArtifactError(f"the weights written to {folder} do not read back as they were")
