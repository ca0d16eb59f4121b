"""Plans as masks for torch.nn.utils.prune: in a file, or on a model in memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from libprune.engine.architecture import Architecture, Heads
from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import LibpruneError, SourceError
from libprune.engine.plan import Plan
from libprune.engine.surgery import entries_kept
from libprune.masks.decision import of_dense
from libprune.models.folder import WeightFiles, fingerprint, load_config
from libprune.pipeline.artifacts import encode_meta, read_plan, read_table
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.results.record import PLAN


def plan_masks(architecture: Architecture, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The masks of a plan: by parameter that loses something, bool in its shape, true where an entry stays.

    The plan is one that `require_sayable` lets pass.

    The consumers' columns alone decide what the model computes; the producers' rows and biases are masked as well, so
    that the zeros are exactly what slicing removes. In a language model only maps have masks, and of a part that goes
    whole all is masked, the consumers' bias too.
    """
    maps = {name for entry in architecture.maps for name in (entry.weight, entry.bias)}
    gone = plan.removed
    for parameter in architecture.parameters:
        if parameter.name in maps or not architecture.layered:
            kept = entries_kept(architecture, plan, parameter)
            if parameter.layer is not None and architecture.home(parameter) in gone:
                kept = torch.zeros_like(kept)
            if not kept.all():
                yield parameter.name, kept


def require_sayable(architecture: Architecture, plan: Plan) -> None:
    """Stop at a plan that masks of the dense model's parameters cannot say.

    Raises:
        LibpruneError: if the residual stream is narrower, or some units behind a norm over all of them go.
    """
    if plan.width is not None:
        raise LibpruneError(
            f"the plan keeps {plan.width} columns of the residual stream, in an order or along axes of its own, which "
            "masks of the dense model's parameters cannot say; take a plan with allocate.width: null"
        )
    for layer, part in architecture.blocks():
        norms, kept = architecture.parts[part].norms, plan.kept(layer, part)
        if norms and 0 < kept < architecture.units(part):
            raise LibpruneError(
                f"the plan removes some {part} units of layer {layer}, but {' and '.join(norms)} would still count "
                "them as zeros; masks can only say a plan that keeps all or none of them"
            )


def register(model: nn.Module, architecture: Architecture, plan: Plan) -> None:
    """Register the masks of a plan on a model, on each of the modules that share a parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removesuffix("_orig"))
    sharing = {group[0]: group for group in names.values()}
    for name, mask in plan_masks(architecture, plan):
        for path in sharing[name]:
            module, _, own = path.rpartition(".")
            owner = model.get_submodule(module)
            prune.custom_from_mask(owner, own, mask.to(getattr(owner, own).device))


def export_masks(source: Path, dense: Path, target: Path, orig: bool) -> int:
    """Write the masks of a plan.

    Args:
        source: a pruned folder, or a `plan.parquet`.
        dense: the dense model's folder.
        target: a safetensors file of `X_mask`, bool, in the shape of X, for every parameter X that loses something.
        orig: write X as `X_orig` beside it.

    Returns:
        The number of masks.

    Raises:
        LibpruneError: if the plan is missing, of another model, keeps everything, or cannot be said by masks.
    """
    if not (dense / "config.json").is_file():
        raise SourceError(f"{dense} holds no config.json; name the dense model's folder with --model")
    if not source.is_dir() and source.name != PLAN:
        raise SourceError(f"{source} is no folder and no {PLAN}; name a pruned folder or a plan")
    config = load_config(dense)
    layout = Layout(source if source.is_dir() else source.parent)
    _, meta = read_table(layout.plan, "allocate")
    units: Heads = "queries" if meta.get("heads") else "groups"
    model = without_weights(config)
    architecture = of_dense(describe(model, fingerprint(dense), accept=tuple(config.to_dict()), heads=units))
    plan, _ = read_plan(layout, architecture)
    require_sayable(architecture, plan)
    masks = dict(plan_masks(architecture, plan))
    if not masks:
        raise LibpruneError(f"the plan in {source} keeps every unit; there is nothing to mask")
    tensors = {f"{name}_mask": mask for name, mask in masks.items()}
    if orig:
        weights = WeightFiles(dense)
        tensors |= {f"{name}_orig": weights[name] for name in masks}
    with writing(target) as partial:
        save_file(tensors, partial, metadata=encode_meta({"model": architecture.fingerprint, "plan": plan.digest}))
    return len(masks)
