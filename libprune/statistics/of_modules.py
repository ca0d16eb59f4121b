"""Statistics of networks: the same sums and artifacts as of language models, by autograd as it is.

Networks of the user's own fit in memory, so that nothing here saves memory: gradients of all parameters are held at
once, and per-sample gradients come from passes over one sample. A sample stands where a language model has a sequence.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libprune.collection.accumulator import ROWS, UNITS, Accumulator
from libprune.collection.calibration import Run
from libprune.collection.module_hooks import unit_masks, watched_gradients, watched_inputs
from libprune.collection.records import count
from libprune.collection.resumable import RowsOf, collecting, write_artifact
from libprune.engine.architecture import Architecture
from libprune.engine.errors import StatisticsError
from libprune.engine.surgery import hooked, oriented
from libprune.engine.tables import Columns
from libprune.models.compute import require_finite
from libprune.models.samples import Samples
from libprune.pipeline.sections import Activations, Gradients, Hessian
from libprune.pipeline.shards import GRAM
from libprune.statistics.activations import activation_columns, activation_groups, add_consumer_input
from libprune.statistics.gradients import gradient_columns, gradient_groups, layer_rows, tensor_rows
from libprune.statistics.hessian import collect_probes, hessian_columns, hessian_groups


def collect_gradients(run: Run, network: nn.Module, target: Path, section: Gradients) -> None:
    """The mean gradient of every parameter that carries a unit, and how every unit's mask gradient behaves."""
    architecture, samples = run.architecture, run.sequences
    number = -(-len(samples) // run.at_once)
    groups = gradient_groups(architecture, samples.counted, number, section)
    with collecting(run, "gradients", target, groups, run.at_once, {}) as work:
        for step, first, batch in work.batches():
            _add_gradients(network, architecture, work.accumulator, step, first, batch)
        rows: dict[str, RowsOf] = {"layers": partial(layer_rows, batches=number), "tensors": tensor_rows}
        loss = {"loss": float(work.accumulator.finish(1)["loss"])}
        write_artifact(run, target, work.accumulator, _first_order, loss, rows)


def _first_order(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> Columns:
    """As of language models, without what is told by token: a sample is asked as a whole."""
    columns = gradient_columns(architecture, tensors, weights, layer, part)
    return {name: values for name, values in columns.items() if not name.endswith("_token")}


def collect_hessian(run: Run, network: nn.Module, target: Path, section: Hessian) -> None:
    """The diagonal of the Hessian."""
    architecture, samples = run.architecture, run.sequences
    groups = hessian_groups(architecture, samples.counted, section)
    with collecting(run, "hessian", target, groups, run.at_once, estimation(section)) as work:
        if section.estimator == "hutchinson":
            collect_probes(network, architecture, work.batches(), work.accumulator, section, _losses)
        else:
            for _, first, batch in work.batches():
                _add_squares(network, architecture, work.accumulator, first, batch)
        write_artifact(run, target, work.accumulator, hessian_columns, estimation(section))


def estimation(section: Hessian) -> dict[str, Any]:
    """What the diagonal depends on beside the network and its samples."""
    return section.model_dump(exclude={"sequences"})


def collect_activations(run: Run, network: nn.Module, target: Path, section: Activations) -> None:
    """Norms and moments at every map's input, Gram matrices and histograms at the consumers'."""
    with collecting(run, "activations", target, activation_groups(run.architecture, section), run.at_once, {}) as work:
        for _, first, batch in work.batches():
            _add_activations(network, run.architecture, work.accumulator, first, batch)
        write_artifact(run, target, work.accumulator, activation_columns, {})


def _losses(network: nn.Module, batch: Samples) -> Tensor:
    return batch.losses(network)


def _carrying(network: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """The parameters that carry a unit, by name."""
    names = {parameter.name for block in architecture.blocks() for parameter in architecture.parameters_of(*block)}
    return {name: parameter for name, parameter in network.named_parameters() if name in names}


def _gradients(losses: Tensor, wanted: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """Gradients of the summed losses, by name.

    Raises:
        StatisticsError: naming the first that is not finite.
    """
    require_finite(losses.detach(), first, "the loss")
    found = torch.autograd.grad(losses.sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(wanted, found, strict=True):
        if not torch.isfinite(gradient.sum()):
            raise StatisticsError(
                f"the gradient of {name} is not finite in the pass from calibration sample {first}; check that the "
                "network is sound on its samples"
            )
    return dict(zip(wanted, found, strict=True))


def _add_gradients(
    network: nn.Module, architecture: Architecture, sums: Accumulator, number: int, first: int, batch: Samples
) -> None:
    with (
        hooked(network),
        unit_masks(network, architecture, len(batch)) as masks,
        watched_gradients(network, architecture) as deltas,
        torch.enable_grad(),
    ):
        network.requires_grad_(True)
        parameters: dict[str, Tensor] = dict(_carrying(network, architecture))
        losses = batch.losses(network)
        found = _gradients(losses, parameters | {UNITS + part: mask for part, mask in masks.items()}, first)
    samples = count(len(batch))
    for name in parameters:
        sums.update(0, name, found[name].float(), samples)
        sums.update(0, ROWS + name, found[name], samples, torch.tensor(number))
    for part in masks:
        sums.update(0, UNITS + part, found[UNITS + part].float().unsqueeze(1))
    for entry, rows in deltas.items():
        weight = network.get_parameter(entry.weight).detach()
        still = weight.new_zeros(
            0 if rows else entry.rows * len(batch), len(weight)
        )  # where no loss depends on the map
        delta = torch.cat([still, *rows]).float()
        name = f"{entry.module}.output_gradient_square"
        if name in sums.groups[0]:
            sums.update(0, name, _squares(delta, batch.counted), count(len(delta)))
        name = f"{entry.module}.input_gradient_square"
        if name in sums.groups[0]:
            sums.update(0, name, _squares(delta @ oriented(entry, weight).float(), batch.counted), count(len(delta)))
    sums.update(1, "loss", losses.detach().double().sum().cpu(), samples)


def _squares(gradient: Float[Tensor, "rows width"], counted: int) -> Float[Tensor, " width"]:
    """Sum over rows of the squared gradient of a sample's summed loss."""
    return gradient.square().sum(0).double() * counted**2


def _add_squares(network: nn.Module, architecture: Architecture, sums: Accumulator, first: int, batch: Samples) -> None:
    """Add each sample's squared gradient."""
    with hooked(network), torch.enable_grad():
        network.requires_grad_(True)
        parameters = _carrying(network, architecture)
        for index, sample in enumerate(batch.passes(1)):
            for name, gradient in _gradients(sample.losses(network), parameters, first + index).items():
                sums.update(0, name, gradient.float().square(), count(1))


def _add_activations(
    network: nn.Module, architecture: Architecture, sums: Accumulator, first: int, batch: Samples
) -> None:
    with watched_inputs(network, architecture.maps, len(batch)) as seen, torch.no_grad():
        network(batch.inputs)
    for entry, calls in seen.items():
        if entry.module in sums.groups[0]:
            x = torch.cat(calls, 1).float()
            require_finite(x, first, f"the input of {entry.module}")
            sums.update(0, entry.module, x.flatten(0, 1))
            if entry.module + GRAM in sums.groups[0]:
                add_consumer_input(sums, entry, x, first)
