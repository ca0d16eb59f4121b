"""Sums over units: from any per-element quantity to one number a unit."""

from collections.abc import Callable, Container, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from libprune.engine.architecture import Architecture
from libprune.engine.errors import StatisticsError, missing_key


def sum_positions(
    values: Float[Tensor, "*batch positions"], units: Int[np.ndarray, " positions"], count: int
) -> Float[Tensor, "*batch units"]:
    """Sum the last dimension, positions, by the unit that owns them: ``[..., positions] -> [..., units]``.

    Positions of no unit (-1) are left out.
    """
    if len(units) == count and (units == np.arange(count)).all():
        return values
    owned = np.flatnonzero(units >= 0)
    index = torch.from_numpy(units[owned]).to(values.device, non_blocking=True)
    out = values.new_zeros(*values.shape[:-1], count)
    if len(owned) < len(units):
        values = values[..., torch.from_numpy(owned).to(values.device, non_blocking=True)]
    return out.index_add_(-1, index, values)


Of = Callable[[str, Tensor, slice], Tensor]
"""A per-element quantity: of a parameter's name, its tensor in some rows of the first dimension, and these rows."""

_AT_ONCE = 1 << 19
"""Elements of a parameter that are worked through at a time: 4 MiB in float64, which stay in the cache of a CPU."""


def unit_sums(
    architecture: Architecture,
    layer: int,
    part: str,
    values: Mapping[str, Tensor],
    only: Container[str] | None = None,
    of: Of | None = None,
) -> NDArray[np.float64]:
    """Sum a per-element quantity over every element that carries a unit's index; ``[units]``.

    Args:
        layer: its layer.
        part: which part of it.
        values: parameter name to a tensor of the parameter's shape.
        only: the parameters that have the quantity, where not all do.
        of: the quantity, in the shape of the tensor that it is given; None where the tensors are it. It is asked for
            some rows at a time, so that memory holds no second tensor of a parameter's size.

    Raises:
        StatisticsError: if a parameter has no entry.
    """
    count = architecture.units(part)
    total = torch.zeros(count, dtype=torch.float64)
    seen: dict[str, tuple[int, NDArray[np.int64]]] = {}
    for parameter, dim, units in architecture.carriers(layer, part):
        if only is not None and parameter.name not in only:
            continue
        if parameter.name not in values:
            raise StatisticsError(missing_key(parameter.name, values, "the collected statistics"))
        pieces = _pieces(parameter.name, values[parameter.name], of)
        if parameter.name in seen:  # rows and columns, as in a recurrent map: what is both has been counted twice
            tensor = torch.cat(list(pieces)).movedim(dim, -1)
            total -= _both(tensor, *seen[parameter.name], units, count).cpu()
            pieces = iter([tensor.movedim(-1, dim)])
        sums = (piece.movedim(dim, -1).reshape(-1, piece.shape[dim]).sum(0) for piece in pieces)
        positions = torch.cat(list(sums)) if dim == 0 else sum(sums, torch.zeros(()))
        total += sum_positions(positions, units, count).cpu()
        seen[parameter.name] = dim, units
    return total.numpy()


def _pieces(name: str, tensor: Tensor, of: Of | None) -> Iterator[Tensor]:
    """A quantity of a parameter in float64, some rows of the first dimension at a time."""
    rows = max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), rows):
        where = slice(start, start + rows)
        yield (tensor[where] if of is None else of(name, tensor[where], where)).double()


def _both(
    tensor: Tensor, dim: int, units: NDArray[np.int64], last_units: NDArray[np.int64], count: int
) -> Float[Tensor, " units"]:
    """Sum of the elements whose index belongs to a unit both in one dimension and in the last; ``[units]``.

    Args:
        tensor: values, its second carrying dimension moved to the end.
        dim: the first carrying dimension.
        units: the unit of each position there.
        last_units: the unit of each position of the last dimension.
        count: number of units.
    """
    matrix = tensor.movedim(dim, 0).flatten(1, -2).sum(1) if tensor.ndim > 2 else tensor
    return sum_positions(sum_positions(matrix, last_units, count).T, units, count).diagonal()
