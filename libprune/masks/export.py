"""Plans as files of masks for torch.nn.utils.prune."""

from pathlib import Path

from safetensors.torch import save_file

from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import LibpruneError, SourceError
from libprune.masks.models import plan_masks
from libprune.models.folder import WeightFiles, fingerprint, load_config
from libprune.pipeline.artifacts import encode_meta, read_plan
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.results.record import PLAN


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
        LibpruneError: if the plan is missing, of another model, or keeps everything.
    """
    if not (dense / "config.json").is_file():
        raise SourceError(f"{dense} holds no config.json; name the dense model's folder with --model")
    if not source.is_dir() and source.name != PLAN:
        raise SourceError(f"{source} is no folder and no {PLAN}; name a pruned folder or a plan")
    config = load_config(dense)
    architecture = describe(without_weights(config), fingerprint(dense), accept=tuple(config.to_dict()))
    plan, _ = read_plan(Layout(source if source.is_dir() else source.parent), architecture)
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
