"""The diagonal of the Hessian, by squared per-sequence gradients or by random probes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from libprune.collection.accumulator import UNITS, Accumulator, Group
from libprune.collection.backward import Tape, watching, watching_parameters, weight_gradient
from libprune.collection.calibration import set_up
from libprune.collection.records import Statistic, Sum, WeightedMean, count
from libprune.collection.resumable import collecting, write_artifact
from libprune.engine.architecture import Architecture, Block, Map, Parameter
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.surgery import hooked
from libprune.engine.tables import Columns
from libprune.models.compute import Finite, require_finite, sequence_losses
from libprune.models.embeddings import own_distances
from libprune.models.sequences import Pass, Sequences
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Hessian
from libprune.statistics.unit_sums import unit_sums


def measure_hessian(layout: Layout, compute: Compute, section: Hessian) -> Columns | None:
    """Estimate the diagonal of a language model's Hessian, and write its artifact.

    Args:
        section: the estimator, `fisher` or `hutchinson`, and how many calibration sequences.

    Returns:
        The per-unit table; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing, the disk has no room, probes are not possible, or a value is not
            finite.
    """
    run = set_up(layout, compute, section.sequences)
    if bare_parameters(run.architecture):  # whose squares for each sequence take a pass for each
        run = replace(run, at_once=1)
    probing = section.estimator == "hutchinson"
    if probing:
        require_probes_possible(run.compute, run.world.sharded)
    groups = hessian_groups(run.architecture, run.n_tok, section)
    identity = {"estimator": section.estimator} | ({"probes": section.probes, "seed": section.seed} if probing else {})
    with collecting(run, "hessian", layout.hessian, groups, run.at_once, identity) as work:
        sums, batches = work.accumulator, work.passes()
        if probing:
            losses_of = sequence_losses if run.sequences.pooling is None else own_distances
            collect_probes(run.model, run.architecture, batches, sums, section, losses_of)
        else:
            collect_squared_gradients(run.model, run.architecture, batches, sums, run.recompute)
        if not work.merge():
            return None
        return write_artifact(run, layout.hessian, sums, hessian_columns, {"estimator": section.estimator})["units"]


def hessian_groups(architecture: Architecture, n_tok: int, section: Hessian) -> list[Group]:
    """The statistics of every layer, by name.

    `fisher_sample` is mean_i g_i^2, as often written; `fisher` multiplies it by the n_tok
    loss-counted tokens of a sequence, over which the mean in L_i shrinks independent token
    gradients (empirical Fisher: Kunstner et al. 2019, "Limitations of the empirical Fisher
    approximation", which also says when it is not the Hessian). `hutchinson` is the mean over
    batches and probes of v * (H v), v of independent signs (Hutchinson 1990; Bekas et al. 2007).
    """
    factor = float(n_tok) if section.estimator == "fisher" else 1.0
    dtype = getattr(torch, section.storage_dtype)
    groups: list[Group] = []
    for layer in range(architecture.layers):
        group: dict[str, Statistic] = {}
        for owner, part in architecture.uses(layer):
            for parameter in curved_parameters(architecture, owner, part):
                if parameter.layer == layer:
                    shape = tuple(dim.size(architecture.sizes) for dim in parameter.dims)
                    group[parameter.name] = Sum(shape, factor, dtype)
            if owner == layer and section.estimator == "hutchinson":
                group[UNITS + part] = WeightedMean(architecture.units(part))
        groups.append(group)
    return groups


def curved_parameters(architecture: Architecture, layer: int, part: str) -> list[Parameter]:
    """The parameters of a block whose diagonal is estimated: those of its linear maps, and others that carry units."""
    mapped = {name for entry in architecture.maps_of(layer, part) for name in (entry.weight, entry.bias)}
    wanted = mapped | {parameter.name for parameter, _, _ in architecture.carriers(layer, part)}
    return [parameter for parameter in architecture.parameters_of(layer, part) if parameter.name in wanted]


def bare_parameters(architecture: Architecture) -> dict[str, Parameter]:
    """The curved parameters that belong to no map that sees whole sequences, by name: stacks, routers, heads' numbers.

    Autograd gives their gradients, of all sequences of a pass together.
    """
    curved = (p for block in architecture.blocks() for p in curved_parameters(architecture, *block))
    return {parameter.name: parameter for parameter in curved if parameter.name not in architecture.mapped}


def collect_squared_gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Iterable[Pass],
    sums: Accumulator,
    recompute: bool = False,
) -> None:
    """Add the squared gradients of every sequence, at the cost of one batched backward pass.

    The gradient of a linear map for one sequence is the product of its output gradients and its
    inputs over that sequence's tokens, so autograd only computes the former.

    Args:
        batches: each of sequences of one length; of one sequence where there are `bare_parameters`.
        sums: of the `hessian_groups`.
        recompute: whether the layers are computed again in backward.

    Raises:
        StatisticsError: naming the module and sequence whose gradient is not finite.
    """
    biases = {p.name for p in architecture.parameters if p.name.endswith(".bias")}

    def add(entry: Map, x: Tensor, deltas: Tensor) -> None:
        squares = _sum_of_squares(weight_gradient(entry, *pair) for pair in zip(x, deltas, strict=True))
        _require_no_overflow(tape.finite, squares, entry.weight, tape.first)
        sums.update(entry.layer, entry.weight, squares, count(len(x)))
        bias = f"{entry.module}.bias"
        if bias in biases:
            sums.update(entry.layer, bias, deltas.sum(1, dtype=torch.float32).square().sum(0), count(len(x)))

    def add_bare(bare: Parameter, tensor: Tensor) -> None:
        assert tensor.grad is not None and bare.layer is not None
        squares, tensor.grad = tensor.grad.float().square(), None
        _require_no_overflow(tape.finite, squares, bare.name, tape.first)
        sums.update(bare.layer, bare.name, squares, count(1))

    bare = {name: partial(add_bare, own) for name, own in bare_parameters(architecture).items()}
    watched = watching(model, architecture, add, recompute=recompute)
    with watched as tape, watching_parameters(model, architecture, bare), torch.enable_grad():
        for _, first, sequences in batches:
            assert not bare or len(sequences) == 1
            tape.finite.run(partial(_pass, tape, model, first, sequences), sums.uncounted)


def _pass(tape: Tape, model: PreTrainedModel, first: int, sequences: Sequences) -> None:
    tape.begin(first, len(sequences))
    losses = sequence_losses(model, sequences)
    tape.finite.require(losses.detach(), first, "the loss")
    tape.backward(losses.sum())


def _sum_of_squares(gradients: Iterable[Tensor]) -> Tensor:
    """The element-wise sum of squares in float32."""
    total: Tensor | None = None
    for gradient in gradients:
        values = gradient.float()
        total = values.square() if total is None else total.addcmul_(values, values)
    assert total is not None
    return total


def _require_no_overflow(finite: Finite, squares: Tensor, name: str, first: int) -> None:
    if not finite.holds(squares.sum(dtype=torch.float64)):
        raise StatisticsError(
            f"a squared gradient of {name} overflows in the batch from calibration sequence {first}; "
            "try compute.dtype: float32"
        )


def collect_probes(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[tuple[int, int, Any]],
    sums: Accumulator,
    section: Hessian,
    losses_of: Callable[[Any, Any], Tensor] = sequence_losses,
) -> None:
    """Add v * (H v) of every batch's mean loss for seeded Rademacher probes v, by double backward.

    Each pass is one sample, weighted by its sequences: the mean over its probes of W^2 v (H v) / 2, summed
    over a unit, gives that unit's standard error. Probes of one pass share its text.

    Args:
        model: the model; its attention must be differentiable twice, see `twice_differentiable`.
        batches: each of sequences of one length.
        sums: of the `hessian_groups`.
        section: number of probes, and their seed.
        losses_of: gives the loss of each sequence of a batch, from the model and the batch.

    Raises:
        StatisticsError: naming the parameter and the batch where a product is not finite.
    """
    wanted = {p.name for block in architecture.blocks() for p in curved_parameters(architecture, *block)}
    with hooked(model), twice_differentiable(model), torch.enable_grad():
        model.requires_grad_(False)
        parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in wanted}
        for _, first, sequences in batches:
            losses = losses_of(model, sequences)
            require_finite(losses.detach(), first, "the loss")
            gradients = torch.autograd.grad(losses.mean(), list(parameters.values()), create_graph=True)
            values: dict[Block, Tensor] = {}
            for probe in range(section.probes):
                signs = [_signs(p, (section.seed, first, probe, index)) for index, p in enumerate(gradients)]
                keep = probe + 1 < section.probes
                products = torch.autograd.grad(
                    gradients, list(parameters.values()), signs, retain_graph=keep, materialize_grads=True
                )
                diagonal = {name: v * hv for name, v, hv in zip(parameters, signs, products, strict=True)}
                _add_probe(architecture, sums, diagonal, parameters, len(sequences), first, values)
            for (layer, part), value in values.items():
                sums.update(layer, UNITS + part, value / section.probes, torch.tensor(float(len(sequences))))
            del gradients


def _add_probe(
    architecture: Architecture,
    sums: Accumulator,
    diagonal: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    sequences: int,
    first: int,
    values: dict[Block, Tensor],
) -> None:
    """Add one probe's products to the sums, and their sums by unit to the values of the batch."""
    for layer, part in architecture.blocks():
        layers = {p.name: p.layer for p in curved_parameters(architecture, layer, part)}
        for name, own in layers.items():
            if not torch.isfinite(diagonal[name]).all():
                raise StatisticsError(
                    f"the probed Hessian of {name} is not finite in the batch from calibration sequence {first}; "
                    "try compute.dtype: float32"
                )
            assert own is not None
            sums.update(own, name, diagonal[name].float() * sequences, count(sequences))
        terms = {name: 0.5 * weights[name].detach().float().square() * diagonal[name].float() for name in layers}
        value = torch.from_numpy(unit_sums(architecture, layer, part, terms))
        values[layer, part] = values.get((layer, part), torch.zeros(())) + value


def _signs(like: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Independent random signs in the shape of a tensor, which a seed fixes on every device."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    bits = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(like.device, like.dtype)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside the context attention is computed by its formula, since the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def hessian_columns(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit second-order sums of a block.

    `fisher`: half the sum of |W^2 H|, in nats; `hessian_trace`: sum of H. Probes also give
    `hessian`, half the sum of W^2 H with its sign, and `hessian_se`, its standard error over
    batches; noise does not cancel in the sum of absolute values.
    """

    def cost(name: str, diagonal: Tensor, rows: slice) -> Tensor:
        return 0.5 * weights[name][rows].double().square() * diagonal.abs()

    columns = {
        "fisher": unit_sums(architecture, layer, part, tensors, of=cost),
        "hessian_trace": unit_sums(architecture, layer, part, tensors),
    }
    prefix = f"{UNITS}{part}"
    if f"{prefix}.mean" in tensors:
        columns["hessian"] = tensors[f"{prefix}.mean"].numpy()
        columns["hessian_se"] = tensors[f"{prefix}.standard_error"].numpy()
    return columns


def require_probes_possible(compute: Compute, sharded: bool) -> None:
    """Stop where the graph of the whole model is not in one place, as double backward needs it.

    Args:
        compute: the params, with `offload` settled.
        sharded: whether processes share the weights out.

    Raises:
        LibpruneError: naming the setting that prevents it.
    """
    ways = {
        f"compute.offload: {compute.offload}": compute.offload != "none",
        "compute.gradient_checkpointing: true": compute.gradient_checkpointing,
        "LIBPRUNE_SHARD": sharded,
    }
    for name, used in ways.items():
        if used:
            raise LibpruneError(
                f"hessian.estimator: hutchinson cannot be used with {name}; use fisher, or switch it off"
            )
