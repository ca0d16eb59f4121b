"""From the masks of torch.nn.utils.prune to structure, and back, for models in memory.

`inspect` says which units a masked model has lost, `extract` takes them out, `apply` masks what a plan removes.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import prune
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Block, Parameter
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import entries_kept
from libprune.masks.extraction import Extraction, extraction
from libprune.masks.files import of_model
from libprune.masks.inspection import MaskInspection, inspection, require_units


def inspect(model: PreTrainedModel) -> MaskInspection:
    """Which units of a model are wholly masked, which partly, and what slicing would save.

    Args:
        model: of one of the families, with active masks of `torch.nn.utils.prune` or with zeroed weights. It stays as
            it is; a float32 copy is made in memory.
    """
    return inspection(extraction(of_model(model)))


def extract(model: PreTrainedModel) -> Extraction:
    """Take the wholly masked units of a model out: `.plan`, `.state`, and the model itself with `.smaller()`.

    Args:
        model: as for `inspect`.

    Raises:
        LibpruneError: if no unit is wholly masked.
    """
    found = extraction(of_model(model))
    require_units(inspection(found))
    return found


def apply(model: PreTrainedModel, plan: Plan) -> None:
    """Register masks of `torch.nn.utils.prune` that make a dense model compute what the plan leaves."""
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    for name, mask in plan_masks(describe(bare, accept=tuple(model.config.to_dict())), plan):
        module, _, parameter = name.rpartition(".")
        weight = getattr(model.get_submodule(module), parameter)
        prune.custom_from_mask(model.get_submodule(module), parameter, mask.to(weight.device))


def plan_masks(architecture: Architecture, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """By parameter the mask, bool in the parameter's shape, of every map that a plan takes something of.

    The consumers' columns alone decide what the model computes; the producers' rows and biases are masked as well, so
    that the zeros are exactly what slicing removes. Of a part that goes whole all is masked, the consumers' bias too.
    """
    for block in architecture.blocks():
        maps = {name for entry in architecture.maps_of(*block) for name in (entry.weight, entry.bias)}
        for parameter in architecture.parameters_of(*block):
            if parameter.name in maps and not (mask := _mask(architecture, plan, parameter, block)).all():
                yield parameter.name, mask


def _mask(architecture: Architecture, plan: Plan, parameter: Parameter, block: Block) -> Tensor:
    kept = entries_kept(architecture, plan, parameter)
    return torch.zeros_like(kept) if plan.gone(*block) else kept
