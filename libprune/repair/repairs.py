"""Carrying out a repair: from the artifacts to the fits of every pruned consumer."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from libprune.collection.accumulator import discard
from libprune.collection.calibration import require_own_weights, set_up
from libprune.collection.offload import scratch_of
from libprune.collection.resumable import sums_identity
from libprune.collection.stream_axes import Narrowed, read_axes, turn_model
from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.stock_config import bias_key
from libprune.models.compute import resolve_device
from libprune.models.folder import WeightFiles, load_config, own_model
from libprune.models.memory import Keep, in_memory, keeping
from libprune.pipeline.artifacts import read_table, same_origin
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Slice
from libprune.pipeline.shards import GRAM, HELD_OUT, read_meta, read_tensor
from libprune.pipeline.terminal import CONTINUES, Bar, note, say
from libprune.repair.blocks import STEP_TOKENS, Epochs
from libprune.repair.least_squares import (
    CPU,
    FIGURES,
    Fit,
    Inputs,
    new_parameters,
    pruned_consumers,
    repair_bias,
    repair_local,
)
from libprune.repair.sequential import SequentialRepair, behind_what_is_gone
from libprune.repair.streams import split_batches
from libprune.repair.trained_layers import Training

Repairing = Callable[[Layout, Architecture, Plan, Compute, Slice], list[Fit]]
"""From the artifacts, the dense model's description, the plan, how to run the model, and the params to the fits."""


def local_fits(layout: Layout, architecture: Architecture, plan: Plan, compute: Compute, params: Slice) -> list[Fit]:
    """Fit every pruned consumer to what the dense model gives it, from the cached Gram matrices.

    A mixture that loses experts sends their tokens to others. It is run on what the dense model gives it, and its
    experts are fitted to what the dense mixture made of that.
    """
    plan = replace(plan, width=None)  # what reads the stream is mended apart, whatever the units
    inputs = inputs_of(layout, architecture, params.fisher_share > 0)
    damping = None if params.damping == "auto" else params.damping
    weights, number = WeightFiles(own_model(layout, architecture)), sum(1 for _ in pruned_consumers(architecture, plan))
    device = resolve_device(compute.device)
    with Bar(total=number, desc="repair", unit="map") as bar:

        def read(consumer: Map) -> Inputs:
            bar.update()
            return inputs(consumer)

        fits = repair_local(
            architecture,
            plan,
            weights.__getitem__,
            read,
            damping,
            params.fisher_share,
            keep=keeping(scratch_of(layout, compute)),
            device=device,
        )
    routed = [part for part, shape in architecture.parts.items() if shape.router]
    rerouted = any(not keep.all() for (_, part), keep in plan.keep.items() if part in routed)
    if rerouted and params.fisher_share:
        raise LibpruneError(
            f"slice.fisher_share = {params.fisher_share:g} weighs Gram matrices, by which whole experts are not "
            "fitted; set it to 0"
        )
    return fits + (_layer_by_layer(layout, architecture, plan, compute, params, own_inputs=True) if rerouted else [])


def local_repair(
    layout: Layout, architecture: Architecture, device: torch.device = CPU, keep: Keep = in_memory
) -> Callable[[Plan], dict[str, Tensor]]:
    """New weights by parameter name for any plan, by `local` repair.

    The damping is chosen on held-out sequences, or is 0.001 where the text has none.

    Args:
        layout: holds the statistics and the dense model.
        architecture: the description of the dense model.
        keep: where new weights wait.
        device: where to fit.
    """
    inputs, weights = inputs_of(layout, architecture, curvature=False), WeightFiles(own_model(layout, architecture))

    def repair(plan: Plan) -> dict[str, Tensor]:
        known = {consumer.module: inputs(consumer) for consumer, _ in pruned_consumers(architecture, plan)}
        chosen = all(one.held_out is not None for one in known.values())
        fits = repair_local(
            architecture,
            plan,
            weights.__getitem__,
            lambda c: known[c.module],
            None if chosen else _DAMPING,
            keep=keep,
            device=device,
        )
        return new_parameters(fits)

    return repair


_DAMPING = 1e-3


def inputs_identity(layout: Layout) -> dict[str, Any]:
    """Metadata of the statistics that `local_repair` reads; results that depend on them are named by it."""
    return read_meta(layout.activations, "activations")


def bias_fits(layout: Layout, architecture: Architecture, plan: Plan, compute: Compute, params: Slice) -> list[Fit]:
    """Move the mean of what each pruned consumer no longer reads into its bias."""
    dense, config = WeightFiles(own_model(layout, architecture)), load_config(layout.model)

    def bias(consumer: Map) -> Tensor | None:
        if consumer.bias in dense:
            return dense[consumer.bias]
        if bias_key(architecture.family, config, consumer.part) is None:
            return None
        return torch.zeros(consumer.output.size(architecture.sizes), dtype=dense[consumer.weight].dtype)

    def mean(consumer: Map) -> Tensor:
        return read_tensor(layout.activations, consumer.layer, f"{consumer.module}{GRAM}.mean", "activations")

    inputs = inputs_of(layout, architecture, curvature=False)
    return repair_bias(architecture, plan, dense.__getitem__, bias, mean, inputs)


def inputs_of(layout: Layout, architecture: Architecture, curvature: bool) -> Callable[[Map], Inputs]:
    """Reads what the collecting stages know of a consumer's inputs.

    Raises:
        ArtifactError: if they have collected it on another model, or another text than the calibration text.
    """
    origin = {"model": architecture.fingerprint}
    if architecture.head != "network":  # whose samples are in memory
        origin["tokens"] = _calibrated_on(layout)
    same_origin(layout.activations, read_meta(layout.activations, "activations"), origin)
    if curvature:
        same_origin(layout.gradients, read_meta(layout.gradients, "gradients"), origin)

    def read(consumer: Map) -> Inputs:
        gram, rows, filled = (
            read_tensor(layout.activations, consumer.layer, consumer.module + kind, "activations")
            for kind in (GRAM, HELD_OUT, f"{HELD_OUT}.tokens")
        )
        rows = rows if consumer.stack else rows[: int(filled)]
        name = f"{consumer.module}.input_gradient_square"
        squares = read_tensor(layout.gradients, consumer.layer, name, "gradients") if curvature else None
        return Inputs(gram, rows if int(filled) else None, squares)

    return read


def block_fits(layout: Layout, architecture: Architecture, plan: Plan, compute: Compute, params: Slice) -> list[Fit]:
    """Train all weights of each layer that loses units, from the fits of `local_fits` on.

    Those of `sequential_fits` are nearer to the text of the fit, and come out worse after the training. They are where
    the training begins behind what is gone as a whole, and where the residual stream is narrower.
    """
    local = local_fits(layout, architecture, plan, compute, params) if plan.width is None else []
    behind = behind_what_is_gone(architecture, plan)
    given = {fit.consumer.module: fit for fit in local if fit.consumer.module not in behind}
    _require_drawn(layout)
    return _layer_by_layer(layout, architecture, plan, compute, params, given=given)


def _calibrated_on(layout: Layout) -> str:
    """The digest of the calibration text."""
    digest: str = read_table(layout.calibration_tokens, "tokenize")[1]["tokens"]
    return digest


def sequential_fits(
    layout: Layout, architecture: Architecture, plan: Plan, compute: Compute, params: Slice
) -> list[Fit]:
    """Fit layer by layer on what the pruned layers before hand on; goes on where an interrupted run stopped.

    The sequences are those that `tokenize` has drawn for it. The fits stay saved until `discard_fits`.
    """
    _require_drawn(layout)
    return _layer_by_layer(layout, architecture, plan, compute, params)


def _require_drawn(layout: Layout) -> None:
    """Stop if the sequences for the repair were drawn beside another calibration text."""
    drawn = read_table(layout.repair_tokens, "tokenize")[1]
    same_origin(layout.repair_tokens, drawn, {"calibration": _calibrated_on(layout)})


def _layer_by_layer(
    layout: Layout,
    architecture: Architecture,
    plan: Plan,
    compute: Compute,
    params: Slice,
    own_inputs: bool = False,
    given: Mapping[str, Fit] | None = None,
) -> list[Fit]:
    text = layout.calibration_tokens if own_inputs else layout.repair_tokens
    run = set_up(layout, compute, params.sequences, text=text, alone="slice")
    require_own_weights(run)
    damping = None if params.damping == "auto" else params.damping
    drift = 0.0 if own_inputs else None if params.drift == "auto" else params.drift
    at_once = run.at_once if given is None else max(1, STEP_TOKENS // run.meta["length"])
    batches = split_batches(run.sequences.to(run.device), at_once)
    steps = 0 if own_inputs else params.producer_steps
    narrow, identity = None, {"plan": plan.digest, **params.model_dump(), "sequences": len(run.sequences)}
    if given:
        identity["collected"] = inputs_identity(layout)
    if plan.width is not None:
        axes = read_axes(layout.width_axes, {"model": architecture.fingerprint, "tokens": _calibrated_on(layout)})
        narrow = Narrowed(run.weights, architecture, axes, plan.width, repair=True)
        turn_model(run.model, architecture, axes, run.keep)
        identity["axes"] = axes.digest
    training = None
    if given is not None:
        training = Training(Epochs(params.block_epochs, params.block_rate), params.block_ahead, given)

    def begin() -> SequentialRepair:
        return SequentialRepair(
            run.model,
            architecture,
            plan,
            batches,
            damping,
            drift,
            params.drift_cap,
            steps,
            own_inputs,
            narrow,
            training,
            run.keep,
        )

    home = run.work / (_EXPERTS if own_inputs else _LAYERS)
    return _repair_layers(begin, home / sums_identity(run, identity, ("repair",)), architecture)


def _repair_layers(begin: Callable[[], SequentialRepair], folder: Path, architecture: Architecture) -> list[Fit]:
    """Repair all layers but those whose fits a folder has, and save the fits of each; nothing begins if it has all."""
    paths = [folder / f"layer-{layer:03d}.safetensors" for layer in range(architecture.layers)]
    saved = [_load(path, architecture) for path in takewhile(Path.exists, paths)]
    if saved:
        say(f"{CONTINUES}: {len(saved)} of {len(paths)} layers are repaired")
    if len(saved) == len(paths):
        return list(chain(*saved))
    repair = begin()
    for layer, path in enumerate(Bar(paths, desc="repair", unit="layer")):
        if layer < len(saved):
            repair.step(layer, new_parameters(saved[layer]))
        else:
            saved.append(repair.step(layer))
            _save(path, saved[-1])
    return list(chain(*saved))


_LAYERS, _EXPERTS = "slice", "experts"
"""Folders of the fits that are saved, layer by layer."""


def discard_fits(layout: Layout) -> None:
    """Delete the fits that repairs layer by layer have saved; the pruned model with them must be there."""
    for name in (_LAYERS, _EXPERTS):
        discard(layout.work / name)


def _save(path: Path, fits: list[Fit]) -> None:
    """Keep the fits of one layer, for a run after an interruption."""
    numbers = {fit.consumer.weight: {name: getattr(fit, name) for name in FIGURES} for fit in fits}
    others = {fit.consumer.weight: list(fit.others) for fit in fits}
    with writing(path) as partial:
        metadata = {"fits": json.dumps(numbers), "others": json.dumps(others)}
        save_file(new_parameters(fits), partial, metadata=metadata)


def _load(path: Path, architecture: Architecture) -> list[Fit]:
    consumers = {entry.weight: entry for entry in architecture.maps}
    with safe_open(path, framework="pt") as file:
        numbers, others = (json.loads(file.metadata()[key]) for key in ("fits", "others"))
        return [
            Fit(consumers[name], file.get_tensor(name), None, others=_tensors(file, others[name]), **figures)
            for name, figures in numbers.items()
        ]


def _tensors(file: Any, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in names}


def print_fits(fits: Sequence[Fit]) -> None:
    """Print what share of its output each repaired consumer loses, and what was fitted beside it.

    Producers are the maps that compute the consumer's inputs. Of a layer that was trained as a whole, the shares of its
    output are printed that it missed before and after.
    """
    if not fits:
        return
    note(f"{'repaired map':<36}{'damping':>9}{'lost, %':>9}{'repaired':>10}{'held out':>10}{'repaired':>10}")
    for fit in fits:
        values = [100 * value for value in (fit.before, fit.after, fit.held_out_before, fit.held_out_after)]
        numbers = "".join(f"{value:>{width}.2f}" for value, width in zip(values, (9, 10, 10, 10), strict=True))
        trained = f"  layer {100 * fit.layer_before:.2f} to {100 * fit.layer_after:.2f}"
        mark = trained if not math.isnan(fit.layer_before) else "  + producers" if fit.others else ""
        damping = "-" if math.isnan(fit.damping) else f"{fit.damping:.0e}"
        note(f"{fit.consumer.module:<36}{damping:>9}{numbers}{mark}")
    if silent := [fit.consumer.module for fit in fits if math.isnan(fit.damping)]:
        others = f" and {len(silent) - 1} others" if len(silent) > 1 else ""
        say(
            f"{silent[0]}{others} kept the old weights: all inputs that stay are 0 on the text of the fit, so that "
            "nothing can be fitted to them"
        )
