"""Statistics of networks that are no transformers: the sums and artifacts of language models, filled by plain autograd.

Networks of the user's own fit in memory, so that nothing here saves memory: gradients of all parameters are held at
once, and per-sample gradients come from passes over one sample. A sample stands where a language model has a sequence.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from libprune.collection.accumulator import ROWS, UNITS, Accumulator
from libprune.collection.calibration import Run
from libprune.collection.module_hooks import unit_masks, watched_gradients, watched_inputs
from libprune.collection.records import count
from libprune.collection.resumable import Collection, collecting, write_artifact
from libprune.engine.architecture import Architecture
from libprune.engine.errors import StatisticsError
from libprune.engine.surgery import hooked, oriented
from libprune.engine.tables import Columns
from libprune.models.compute import require_finite
from libprune.models.samples import Samples
from libprune.pipeline.sections import Activations, Gradients, Hessian
from libprune.statistics.activations import InputSums, write_activations
from libprune.statistics.gradients import add_second_moment, gradient_columns, gradient_groups, write_gradients
from libprune.statistics.hessian import collect_probes, hessian_columns, hessian_groups


def measure_module_gradients(run: Run, network: nn.Module, target: Path, section: Gradients) -> None:
    """Write the mean gradient of every parameter that carries a unit, and how every unit's mask gradient behaves.

    Raises:
        LibpruneError: if the disk has no room, or a value is not finite.
    """
    architecture, samples = run.architecture, run.sequences
    number = -(-len(samples) // run.at_once)
    groups = gradient_groups(architecture, samples.counted, number, section)
    with collecting(run, "gradients", target, groups, run.at_once, {}) as work:
        for step, first, batch in work.batches():
            _add_gradients(network, architecture, work.accumulator, step, first, batch, samples.counted)
        write_gradients(run, target, work.accumulator, number, _columns_by_sample)


def _columns_by_sample(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> Columns:
    """The `gradient_columns` of a block without those by token, which a mask of a whole sample does not have."""
    columns = gradient_columns(architecture, tensors, weights, layer, part)
    return {name: values for name, values in columns.items() if not name.endswith("_token")}


def measure_module_hessian(run: Run, network: nn.Module, target: Path, section: Hessian) -> None:
    """Write the diagonal of the Hessian of every parameter that carries a unit.

    Raises:
        LibpruneError: if the disk has no room, or a value is not finite.
    """
    architecture, samples = run.architecture, run.sequences
    groups = hessian_groups(architecture, samples.counted, section)
    with collecting(run, "hessian", target, groups, run.at_once, estimation(section)) as work:
        sums = work.accumulator
        if section.estimator == "hutchinson":
            collect_probes(network, architecture, work.batches(), sums, section, lambda net, batch: batch.losses(net))
        else:
            for _, first, batch in work.batches():
                _add_squares(network, architecture, sums, first, batch)
        write_artifact(run, target, sums, hessian_columns, estimation(section))


def estimation(section: Hessian) -> dict[str, Any]:
    """The params that the diagonal depends on, beside the network and its samples."""
    return section.model_dump(exclude={"sequences"})


def measure_module_activations(run: Run, network: nn.Module, target: Path, section: Activations) -> None:
    """Write norms and moments at every map's input, and Gram matrices and histograms at the consumers'.

    Raises:
        LibpruneError: if the disk has no room, or a value is not finite.
    """

    def collect(work: Collection) -> None:
        for _, first, batch in work.batches():
            _add_activations(network, run.architecture, work.accumulator, first, batch)

    write_activations(run, target, section, collect)


def _carrying(network: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """The parameters that carry a unit, by name."""
    names = {parameter.name for block in architecture.blocks() for parameter in architecture.parameters_of(*block)}
    return {name: parameter for name, parameter in network.named_parameters() if name in names}


def _gradients(losses: Tensor, wanted: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """Gradients of the summed losses by the wanted tensors, by name.

    Raises:
        StatisticsError: naming the first tensor whose gradient is not finite.
    """
    require_finite(losses.detach(), first, "the loss")
    values = torch.autograd.grad(losses.sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(wanted, values, strict=True))
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient.sum()):
            raise StatisticsError(
                f"the gradient of {name} is not finite in the pass from calibration sample {first}; check that the "
                "network is sound on its samples"
            )
    return gradients


def _add_gradients(
    network: nn.Module,
    architecture: Architecture,
    sums: Accumulator,
    number: int,
    first: int,
    batch: Samples,
    counted: int,
) -> None:
    """Add the gradients by parameters and unit masks of one batch, and its second moments."""
    with (
        hooked(network),
        unit_masks(network, architecture, len(batch)) as masks,
        watched_gradients(network, architecture) as deltas,
        torch.enable_grad(),
    ):
        network.requires_grad_(True)
        parameters: dict[str, Tensor] = dict(_carrying(network, architecture))
        losses = batch.losses(network)
        gradients = _gradients(losses, parameters | {UNITS + part: mask for part, mask in masks.items()}, first)
    samples = count(len(batch))
    for name in parameters:
        sums.update(0, name, gradients[name].float(), samples)
        sums.update(0, ROWS + name, gradients[name], samples, torch.tensor(number))
    for part in masks:
        sums.update(0, UNITS + part, gradients[UNITS + part].float().unsqueeze(1))
    for entry, rows in deltas.items():
        weight = network.get_parameter(entry.weight).detach()
        unused = [] if rows else [weight.new_zeros(entry.rows * len(batch), len(weight))]  # no loss depends on the map
        delta = torch.cat([*unused, *rows]).float()
        add_second_moment(sums, entry, "output", delta, counted)
        if f"{entry.module}.input_gradient_square" in sums.groups[0]:
            add_second_moment(sums, entry, "input", delta @ oriented(entry, weight).float(), counted)
    sums.update(1, "loss", losses.detach().double().sum().cpu(), samples)


def _add_squares(network: nn.Module, architecture: Architecture, sums: Accumulator, first: int, batch: Samples) -> None:
    """Add the squared gradient of each sample of a batch."""
    with hooked(network), torch.enable_grad():
        network.requires_grad_(True)
        parameters = _carrying(network, architecture)
        for index, sample in enumerate(batch.passes(1)):
            for name, gradient in _gradients(sample.losses(network), parameters, first + index).items():
                sums.update(0, name, gradient.float().square(), count(1))


def _add_activations(
    network: nn.Module, architecture: Architecture, sums: Accumulator, first: int, batch: Samples
) -> None:
    """Add the inputs of all calls of every map that carries units."""
    with watched_inputs(network, architecture.maps, len(batch)) as seen, torch.no_grad():
        network(batch.inputs)
    inputs = InputSums(sums, architecture.sizes)
    inputs.begin(first, len(batch))
    for entry, calls in seen.items():
        if entry.module in sums.groups[0]:
            inputs.add(entry, torch.cat(calls, 1).float())
