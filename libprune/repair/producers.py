"""Refitting the maps that compute a part's units, where each unit depends on their outputs at its own token alone.

A unit of an MLP is x = phi(o), o = V z what its producers give (for a gated MLP phi(g, u) = act(g) u). Around the old
weights V the consumer's output moves by W (a * dV z), a the slopes of phi at each token. What is least squares in the
consumer's weights is then least squares in dV too:

    dV = argmin E|r - W (a * dV z)|^2 + ridge |L^1/2 dV D^1/2|^2,
    L = diag E[a^2] |w|^2, D = diag E[z z^T], r what the refitted consumer W still misses, w its columns

a Gauss-Newton step, solved by preconditioned conjugate gradients: the matrix of the normal equations is as large as
the square of the number of weights, and is never made. The preconditioner is L with E[z z^T] + ridge D. As many steps
are taken as lower the error on held-out tokens.

Cost of a step: twice the forward pass of the pruned part over the text. Memory on the host: the producers' inputs and
the slopes for the whole text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from libprune.engine.architecture import Architecture, Map
from libprune.engine.surgery import hooked, oriented
from libprune.models.memory import fits_on
from libprune.repair.least_squares import SILENT

RIDGE = 0.1
"""The ridge of the fit, relative to the curvature of each weight."""
_SOLVED = 1e-10
"""The squared, preconditioned residual at which conjugate gradients stop, as a share of the first; float32 gets no
further."""


@dataclass(frozen=True)
class Producer:
    """One map that computes units.

    Attributes:
        entry: the map.
        rows: its outputs of the kept units, ``[times, kept]``; twice each unit where gate and up are one map.
    """

    entry: Map
    rows: Int[Tensor, "times kept"]


@dataclass(frozen=True)
class Flow:
    """What a batch shows of a part's producers; on the host, or on the device of the fit where it has room.

    Attributes:
        inputs: z of each producer, ``[tokens, input]``.
        slopes: of each unit in each of a producer's outputs, ``[tokens, times, kept]``.
        missed: r, ``[tokens, output]``, float32.
        held_out: whether the fit is not to see these tokens.
    """

    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    missed: Float[Tensor, "tokens output"]
    held_out: bool

    def on(self, device: torch.device) -> "Flow":
        """The tensors on a device."""
        inputs, slopes = (tuple(one.to(device) for one in kind) for kind in (self.inputs, self.slopes))
        return Flow(inputs, slopes, self.missed.to(device), self.held_out)


def producers_of(architecture: Architecture, consumer: Map, kept: Bool[Tensor, " input"]) -> tuple[Producer, ...]:
    """The maps that compute a consumer's inputs, if each of these is a unit of its own; none otherwise."""
    axis = architecture.parts[consumer.part].axis
    units = consumer.input.units(axis, architecture.sizes)
    if consumer.stack or architecture.home(consumer)[0] in architecture.read(consumer.part):
        return ()
    if (units < 0).any() or len(np.unique(units)) < len(units):
        return ()
    producers = []
    for entry in architecture.maps_of(consumer.layer, consumer.part):
        of = entry.output.units(axis, architecture.sizes) if axis in entry.output.names else np.empty(0, np.int64)
        if not len(of):
            continue
        if (of < 0).any() or len(of) % len(units):
            return ()
        rows = np.argsort(of, kind="stable").reshape(len(units), -1).T  # in the order of the units
        producers.append(Producer(entry, torch.from_numpy(rows[:, units[kept.numpy()]].copy())))
    return tuple(producers)


@contextmanager
def outputs_as_leaves(model: nn.Module, producers: Sequence[Producer]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside the context input and output of each producer are kept by module; its output is a leaf of the graph."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with hooked(model) as handles:
        for producer in producers:
            name = producer.entry.module
            handles.append(model.get_submodule(name).register_forward_hook(partial(_cut, seen, name)))
        yield seen


def _cut(
    seen: dict[str, tuple[Tensor, Tensor]], name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Keep the input and the output of a map, and let what follows read the output as a leaf of the graph."""
    leaf = output.detach().requires_grad_()
    seen[name] = args[0].detach(), leaf
    return leaf.clone()  # an activation may write into it


def slopes_of(
    x: Float[Tensor, "*batch kept"], producers: Sequence[Producer], seen: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Float[Tensor, "tokens times kept"], ...]:
    """The slopes of the units in each producer's outputs; none if a unit depends on others' outputs or other tokens.

    This is tested: the gradient of a sum of units with random signs has, where each depends on its own outputs
    alone, exactly the signs of those.
    """
    if not x.requires_grad:
        return ()
    leaves = [seen[producer.entry.module][1] for producer in producers]
    signs = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).to(x)
    plain, signed = (
        torch.autograd.grad(x, leaves, weights, retain_graph=True) for weights in (torch.ones_like(x), signs)
    )
    by_producer = []
    for producer, one, other in zip(producers, plain, signed, strict=True):
        slopes = one.flatten(0, -2)[:, producer.rows]
        if not torch.equal(other.flatten(0, -2)[:, producer.rows], slopes * signs.flatten(0, -2)[:, None]):
            return ()
        by_producer.append(slopes)
    return tuple(by_producer)


@dataclass(frozen=True)
class Change:
    """What is to be added to the producers' weights.

    Attributes:
        rows: for each producer, ``[times, kept, input]``.
        steps: of conjugate gradients; 0 if none lowered the error on held-out tokens.
    """

    rows: tuple[Float[Tensor, "_ kept _"], ...]
    steps: int


class _Normal:
    """The normal equations of a part, applied without being made, over the tokens of the fit."""

    def __init__(self, flows: Sequence[Flow], weight: Float[Tensor, "output kept"]) -> None:
        self.flows, self.weight = [flow for flow in flows if not flow.held_out], weight
        self.tokens = sum(len(flow.missed) for flow in self.flows)
        self._columns = weight.float().square().sum(0)
        curvature, grams = zip(*(self._moments(index) for index in range(len(self.flows[0].inputs))), strict=True)
        self._left = [_floored(entry * self._columns) for entry in curvature]
        self._diagonal = [_floored(gram.diagonal()) for gram in grams]
        self._factors = []
        for gram, diagonal in zip(grams, self._diagonal, strict=True):
            damped = gram.double()
            damped.diagonal().add_(RIDGE * diagonal)
            self._factors.append(torch.linalg.cholesky(damped).float())

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        squares: Any = 0
        gram: Any = 0
        for flow in self.flows:
            z, a = (part[index].to(self.weight.device).float() for part in (flow.inputs, flow.slopes))
            squares, gram = squares + a.square().sum(0), gram + z.T @ z
        return squares / self.tokens, gram / self.tokens

    def forward(self, flow: Flow, change: Sequence[Tensor]) -> Float[Tensor, "tokens output"]:
        """W (a * dV z): the change of the consumer's output under a change dV of the producers, float32."""
        moved: Any = 0
        for z, a, rows in zip(flow.inputs, flow.slopes, change, strict=True):
            outputs = z.to(rows.device) @ rows.flatten(0, 1).T.to(z.dtype)
            moved = moved + (a.to(rows.device) * outputs.view(a.shape)).sum(1)
        return (moved @ self.weight.T).float()

    def adjoint(self, flow: Flow, missed: Float[Tensor, "tokens output"]) -> list[Tensor]:
        """The adjoint of `forward`: by producer ``[times, kept, input]``, averaged over all tokens of the fit."""
        back = (missed.to(self.weight.dtype) @ self.weight)[:, None]
        gradients = []
        for z, a in zip(flow.inputs, flow.slopes, strict=True):
            rows = (a.to(back.device) * back).flatten(1).T @ z.to(back.device)
            gradients.append(rows.view(*a.shape[1:], -1).float() / self.tokens)
        return gradients

    def right(self) -> list[Tensor]:
        """The right side: minus half the gradient at no change."""
        return _total(self.adjoint(flow, flow.missed.to(self.weight.device)) for flow in self.flows)

    def times(self, change: Sequence[Tensor]) -> list[Tensor]:
        """The matrix of the normal equations, ridge included, times a change."""
        product = _total(self.adjoint(flow, self.forward(flow, change)) for flow in self.flows)
        ridge = [RIDGE * left[..., None] * d * rows for left, d, rows in self._scales(change)]
        return [one + other for one, other in zip(product, ridge, strict=True)]

    def precondition(self, rest: Sequence[Tensor]) -> list[Tensor]:
        """A change that about solves for what is left of the right side."""
        return [
            torch.cholesky_solve(rows.flatten(0, 1).T, factor).T.reshape(rows.shape) / left[..., None]
            for left, factor, rows in zip(self._left, self._factors, rest, strict=True)
        ]

    def _scales(self, change: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self._left, self._diagonal, change, strict=True)


def fit_producers(flows: Sequence[Flow], weight: Float[Tensor, "output kept"], steps: int) -> Change:
    """Fit the weights of the producers by one Gauss-Newton step.

    Args:
        flows: the text; without any held out all steps are taken.
        weight: W, on the device and of the type to compute with.
        steps: the most steps of conjugate gradients.
    """
    size = sum(one.nbytes for flow in flows for one in (*flow.inputs, *flow.slopes, flow.missed))
    flows = [flow.on(weight.device) for flow in flows] if fits_on(weight.device, size) else flows
    normal = _Normal(flows, weight)
    kept_out = [flow for flow in flows if flow.held_out]
    rest = normal.right()
    change = [torch.zeros_like(rows) for rows in rest]
    best, taken, least = change, 0, _square(flow.missed for flow in kept_out)
    solved = normal.precondition(rest)
    along, product = solved, _dot(rest, solved)
    solved_at = _SOLVED * product
    for step in range(1, steps + 1):
        if not product > solved_at:
            break
        curved = normal.times(along)
        length = product / _dot(along, curved)
        change = [rows + length * more for rows, more in zip(change, along, strict=True)]
        rest = [rows - length * more for rows, more in zip(rest, curved, strict=True)]
        error = _square(flow.missed.to(weight.device) - normal.forward(flow, change) for flow in kept_out)
        if kept_out and not error < least:
            break
        best, taken, least = change, step, error
        solved = normal.precondition(rest)
        product, before = _dot(rest, solved), product
        along = [rows + product / before * more for rows, more in zip(solved, along, strict=True)]
    return Change(tuple(best), taken)


def changed_weight(producer: Producer, weight: Tensor, rows: Float[Tensor, "times kept input"]) -> Tensor:
    """A producer's weight with a change added to its rows, in storage order and type."""
    whole = oriented(producer.entry, weight).float().clone()
    whole[producer.rows.flatten()] += rows.flatten(0, 1).to(whole.device)
    return (whole.T if producer.entry.transposed else whole).to(weight.dtype).contiguous()


def _floored(values: Tensor) -> Tensor:
    return values.clamp_min(max(SILENT * float(values.max()), torch.finfo(values.dtype).tiny))


def _total(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    return [sum(of_one[1:], of_one[0]) for of_one in zip(*parts, strict=True)]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum((float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True)), 0.0)


def _square(parts: Iterable[Tensor]) -> float:
    return sum((float(part.square().sum()) for part in parts), 0.0)
