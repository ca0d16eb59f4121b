"""From a plan to a pruned model folder: repair, slice, write, prove."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from libprune.collection.offload import pass_bytes, scratch_of, settle
from libprune.collection.stream_axes import Narrowed, read_axes
from libprune.engine import cost
from libprune.engine.architecture import RESIDUAL, Architecture
from libprune.engine.describe import added_biases, with_biases
from libprune.engine.plan import Plan
from libprune.engine.surgery import require_sliceable, slice_state
from libprune.models.compute import named_dtype, resolve_device
from libprune.models.folder import WeightFiles, load_config, load_model, own_model
from libprune.models.memory import keeping
from libprune.models.parallel import World
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_json, read_plan, read_table, same_origin, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.processes import FreshPython
from libprune.pipeline.sections import Compute, Slice
from libprune.repair.least_squares import Fit, fit_table, mean_errors, new_parameters
from libprune.repair.rescale import Rescaling, measure_rescaling
from libprune.results.card import write_card
from libprune.results.folder import write_pruned
from libprune.results.proof import masked_logits, verify_folder
from libprune.results.record import versions, write_provenance

_CHECKED_SEQUENCES, _CHECKED_LENGTH = 2, 64


@dataclass(frozen=True)
class _Weights(Mapping[str, Tensor]):
    """The dense weights with repaired ones in their place and zeros for added ones, rescaled and cast when read.

    What is no parameter, such as biases on the choice of experts, keeps its type.
    """

    dense: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    dtype: torch.dtype
    kept: Collection[str] = ()
    factors: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        tensor = (self.new if name in self.new else self.dense)[name]
        if name in self.factors:
            tensor = tensor.float() * self.factors[name]
        return tensor if name in self.kept else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.dense.keys() | self.new.keys())

    def __len__(self) -> int:
        return len(self.dense.keys() | self.new.keys())


def prune(
    layout: Layout, folder: Path, compute: Compute, params: Slice, python: FreshPython | None = None
) -> tuple[dict[str, Any], list[Fit]]:
    """Write the pruned model into an empty folder and prove that it loads.

    Args:
        folder: for the pruned model.
        python: the process that proves it, as of `libprune.results.proof.reload`.

    Returns:
        How near the reloaded logits are, how well the consumers were fitted, and by what layers behind gaps were
        multiplied, for metrics; and the fits.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the result fails its proof.
    """
    architecture = read_architecture(layout)
    plan, meta = read_plan(layout, architecture)
    origin = read_json(layout.origin, "prepare")
    same_origin(layout.origin, {"model": origin.pop("model", None)}, {"model": architecture.fingerprint})
    text, about = read_tokens(layout.calibration_tokens, architecture.fingerprint)
    same_origin(layout.plan, meta, {"tokens": about["tokens"]} if "tokens" in meta else {})
    dense = WeightFiles(own_model(layout, architecture))
    require_sliceable(architecture, plan)
    disk = _disk(layout, compute, architecture)
    compute = compute if disk is None else _from_disk(compute, params)
    fits = REPAIRS[params.repair].repair(layout, architecture, plan, compute, params)
    rescaling = Rescaling({})
    if params.rescale == "auto" and not REPAIRS[params.repair].layer_by_layer:
        rescaling = measure_rescaling(layout, architecture, plan, compute, len(text))
    added = sorted({fit.consumer.part for fit in fits if fit.bias is not None and fit.consumer.bias not in dense})
    own, (architecture, config) = architecture, with_biases(architecture, load_config(layout.model), added)
    stored = named_dtype(params.dtype, dense[architecture.parameters[0].name].dtype)
    buffers = [buffer.name for buffer in architecture.buffers]
    new = added_biases(own, architecture) | new_parameters(fits)
    repaired = _Weights(dense, new, stored, buffers, rescaling.by_name(architecture))
    calibrated = {"model": architecture.fingerprint, "tokens": about["tokens"]}
    weights = _weights(layout, repaired, architecture, plan, params, calibrated)
    state = slice_state(weights, architecture, plan, keeping(disk))
    write_pruned(folder, layout.model, architecture, plan, meta["shape"], state, config)
    shutil.copyfile(layout.plan, folder / "plan.parquet")
    write_table(folder / "repair.parquet", fit_table(fits), {"model": architecture.fingerprint})
    model = load_model(layout.model, torch.float32, config=config, scratch=disk)
    proof = _prove(text, folder, model, architecture, plan, weights, meta["shape"], disk, python)
    errors = mean_errors(fits)
    sizes = {"dense": cost.size(own, Plan.dense(own)), "pruned": cost.size(architecture, plan)}
    made: dict[str, Any] = {
        "origin": origin,
        "plan": meta,
        "tokens": about["tokens"],
        "repair_text": _repair_text(layout, params),
        "slice": params.model_dump(),
        "repair": errors,
        "biases_added": added,
        "parameters": {name: {"all": size.total, "decoder": size.decoder} for name, size in sizes.items()},
        "proof": proof,
    }
    factors = {str(layer): factor for layer, factor in rescaling.factors.items()}
    if factors or rescaling.why_not:
        made["rescale"] = {"factors": factors, "why_not": rescaling.why_not}
    if architecture.experts:
        made["experts"] = architecture.experts
    if plan.width is not None:
        made["columns"] = {"before": architecture.sizes[RESIDUAL], "after": plan.width}
    if (gone := architecture.trimmed) is not None:
        rows = {"before": gone.rows, "after": architecture.sizes["vocab"]}
        made["vocabulary"] = {"rows": rows, "parameters_removed": gone.parameters}
    if architecture.own_family is not None:
        made["own_family"] = architecture.own_family
    write_provenance(folder, made | versions())
    write_card(folder)
    return proof | errors | ({"rescale": factors} if factors else {}), fits


def _repair_text(layout: Layout, params: Slice) -> dict[str, Any] | None:
    """The text that a repair layer by layer was fitted to; None for others, which read what was collected."""
    if not REPAIRS[params.repair].layer_by_layer:
        return None
    _, drawn = read_table(layout.repair_tokens, "tokenize")
    return {name: drawn[name] for name in ("tokens", "length")} | {"sequences": params.sequences or drawn["sequences"]}


def _disk(layout: Layout, compute: Compute, architecture: Architecture) -> Path | None:
    """Where the weights of the proof lie, if not in memory: those of two models, in float32."""
    needs = pass_bytes(architecture, _CHECKED_SEQUENCES * _CHECKED_LENGTH, torch.float32)
    needs = replace(needs, weights=2 * needs.weights)
    return scratch_of(layout, settle(compute, needs, torch.device("cpu"), World()))


def _from_disk(compute: Compute, params: Slice) -> Compute:
    """How the dense model is run where the proof reads weights from disk: as the proof does.

    A GPU that is to hold weights which change is asked for itself: they cannot visit it.
    """
    changes = REPAIRS[params.repair].layer_by_layer and resolve_device(compute.device).type != "cpu"
    return compute if changes else compute.model_copy(update={"offload": "disk"})


def _weights(
    layout: Layout,
    repaired: _Weights,
    architecture: Architecture,
    plan: Plan,
    params: Slice,
    origin: Mapping[str, Any],
) -> Mapping[str, Tensor]:
    """All weights in dense shape, along the axes of the residual stream where that is to be narrower.

    A repair layer by layer has fitted its maps along these axes, every other one in the dense model.
    """
    if plan.width is None:
        return repaired
    axes, mends = read_axes(layout.width_axes, origin), params.repair != "none"
    if REPAIRS[params.repair].layer_by_layer:
        return replace(repaired, dense=Narrowed(repaired.dense, architecture, axes, plan.width, mends))
    return Narrowed(repaired, architecture, axes, plan.width, mends)


def _prove(
    text: Sequences,
    folder: Path,
    model: nn.Module,
    architecture: Architecture,
    plan: Plan,
    weights: Mapping[str, Tensor],
    shape: str,
    disk: Path | None,
    python: FreshPython | None,
) -> dict[str, float]:
    """Compare the folder, loaded in a fresh process, with the dense model under the same weights and the mask."""
    ids = text.ids[:_CHECKED_SEQUENCES, :_CHECKED_LENGTH]
    expected = masked_logits(model, architecture, plan, weights, ids, keeping(disk))
    proof = verify_folder(folder, ids, expected, shape == "per_layer", architecture.head, disk, python)
    return {"logit_difference": proof.difference, "logit_scale": proof.scale}
