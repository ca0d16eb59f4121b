"""From the masks of torch.nn.utils.prune to structure, and back, for models in memory.

`inspect` says which units a masked model has lost, `extract` takes them out, `apply` masks what a plan removes. Each
takes a language model of one of the families as it is, and a network of the user's own with its family and inputs.
"""

import copy
from contextlib import suppress
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Block
from libprune.engine.describe import describe
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.plan import Plan
from libprune.masks.decision import of_dense
from libprune.masks.export import register, require_sayable
from libprune.masks.extraction import LanguageExtraction, extraction
from libprune.masks.files import of_model
from libprune.masks.inspection import MaskInspection, inspection, require_units
from libprune.masks.modules import NetworkExtraction, network_extraction
from libprune.results.module_folder import require_fits

Family = NetworkFamily | Path
"""The description of a network, or the file of it."""
Inputs = Shaped[Tensor, "samples ..."]


def inspect(model: nn.Module, family: Family | None = None, inputs: Inputs | None = None) -> MaskInspection:
    """Which units of a model are wholly masked, which partly, and what slicing would save.

    Args:
        model: with active masks of `torch.nn.utils.prune` or with zeroed weights. It stays as it is; a copy is made in
            memory, in float32 if it is a language model or stored in less.
        family: of a network of the user's own its description, or the file of it; None for a language model.
        inputs: of such a network a few examples of what it takes. Constants are those for inputs of their shape.

    Raises:
        LibpruneError: if the family does not describe the model, or a mask is none.
    """
    return inspection(_extraction(model, family, inputs))


@overload
def extract(model: PreTrainedModel) -> LanguageExtraction: ...
@overload
def extract(model: nn.Module, family: Family, inputs: Inputs) -> NetworkExtraction: ...
def extract(
    model: nn.Module, family: Family | None = None, inputs: Inputs | None = None
) -> LanguageExtraction | NetworkExtraction:
    """Take the wholly masked units of a model out.

    Args:
        model: a masked model, as `inspect` takes it.
        family: of a network its description, or the file of it.
        inputs: of a network a few examples of what it takes, on which the outputs are compared.

    Returns:
        With `.plan`; of a language model `.state`, its state dict, and `.smaller()`, the model itself; of a network
        `.network`, `.proof` and `.save(folder)`.

    Raises:
        LibpruneError: if no unit is wholly masked, or the outputs of a network without them differ.
    """
    extracted = _extraction(model, family, inputs)
    require_units(inspection(extracted))
    if isinstance(extracted, NetworkExtraction):
        _ = extracted.proof  # stops here where the outputs differ
    return extracted


def _extraction(
    model: nn.Module, family: Family | None, inputs: Inputs | None
) -> LanguageExtraction | NetworkExtraction:
    if family is not None and inputs is not None:
        return network_extraction(of_model(model, language=False), family, inputs)
    if not isinstance(model, PreTrainedModel):
        raise LibpruneError(f"{type(model).__name__} is no language model of transformers; give its family and inputs")
    if family is not None or inputs is not None:
        raise LibpruneError("masks of a network need both its family and inputs, those of a language model neither")
    return extraction(of_model(model, language=True))


@overload
def apply(model: PreTrainedModel, plan: Plan, /) -> None: ...
@overload
def apply(model: PreTrainedModel, *, plan: Plan) -> None: ...
@overload
def apply(model: nn.Module, family: Family, plan: Plan) -> None: ...
def apply(model: nn.Module, family: Family | Plan | None = None, plan: Plan | None = None) -> None:
    """Register masks of `torch.nn.utils.prune` that make a dense model compute what the plan leaves.

    Everything that slicing removes is masked, but for vectors beside the maps of a language model.

    Args:
        model: the dense one.
        family: of a network its description, or the file of it; left out for a language model.
        plan: which units stay.

    Raises:
        LibpruneError: if the plan is of another model, or leaves no unit of a part of a network, or cannot be said by
            masks, or the arguments are not a language model and a plan, or a network, its family and a plan.
    """
    asked, described = (family, None) if isinstance(family, Plan) and plan is None else (plan, family)
    if isinstance(asked, Plan) and described is None and isinstance(model, PreTrainedModel):
        architecture = _described_as(model, asked)
        require_sayable(architecture, asked)
        register(model, architecture, asked)
    elif isinstance(asked, Plan) and described is not None and not isinstance(described, Plan):
        architecture = describe_module(of_model(model, language=False).model, NetworkFamily.of(described), None)
        require_fits(architecture, asked)
        register(model, architecture, asked)
    else:
        raise LibpruneError(
            "masks.apply takes a language model of transformers and a plan, or a network, its family and a plan; given "
            f"are {', '.join(type(given).__name__ for given in (model, family, plan))}"
        )


def _described_as(model: PreTrainedModel, plan: Plan) -> Architecture:
    """The description of a dense language model by the units that a plan is of: groups of heads, or query heads.

    Raises:
        LibpruneError: if the plan is of another model.
    """
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    known = tuple(model.config.to_dict())
    own = of_dense(describe(bare, accept=known))
    units = {block: len(keep) for block, keep in plan.keep.items()}
    if units == _units(own):
        return own
    with suppress(FamilyError):
        queries = describe(bare, accept=known, heads="queries")
        if units == _units(queries):
            return queries
    layer, part = min(dict(units.items() ^ _units(own).items()))
    raise LibpruneError(
        f"the plan is of {units.get((layer, part), 0)} {part} units in layer {layer}, but this {own.family} model has "
        f"{_units(own).get((layer, part), 0)}; take a plan of this model"
    )


def _units(architecture: Architecture) -> dict[Block, int]:
    return {block: architecture.units(block[1]) for block in architecture.blocks()}
