"""The axes of the residual stream along which a model is narrowed, and its weights along them.

A model whose stream is turned by an orthogonal matrix Q computes what it did before:

    embedding E -> E Q,  writer W -> Q^T W,  reader W -> W diag(g) Q with the gain g of its norm then 1

RMSNorm commutes with Q once its gain stands in the readers behind it (Ashkboos et al. 2024, SliceGPT). Narrowing then
keeps the first columns of everything. Where Q only orders the columns, gains stay in the norms, ordered alike; so it is
exact for LayerNorm, for norms whose output is written into the stream, and for a head that is tied to the embedding.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from libprune.collection.stream import Norm, Stream
from libprune.engine.architecture import RESIDUAL, Architecture, Parameter
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.models.layers import set_parameters
from libprune.models.memory import Keep, in_memory
from libprune.pipeline.artifacts import damage, decode_meta, require, same_origin
from libprune.pipeline.layout import NOTHING
from libprune.pipeline.shards import load_tensor, save_tensors

FILE = "axes.safetensors"
Kind = Literal["selected", "principal"]
"""Whether columns are ordered by what they hold, or turned to the principal axes."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridges, relative to each column's mean square, that the mending of a norm's readers is chosen from."""
_DAMPING = (1e-3,)


@dataclass(frozen=True)
class Axes:
    """Along which axes a model's residual stream is narrowed, and what is known of it along them.

    Attributes:
        stream: what reads it.
        order: the columns, those that are kept longest first; None where the stream is turned.
        turn: Q, whose columns are the axes; None where columns are only ordered.
        gains: of a turned stream the gain of each norm that stands in its readers, by the norm's module.
        ratios: by norm, for each width k from 1 on, the mean over tokens of the root mean square of the first k columns
            over that of all: by how much a norm over k columns gives more than it did.
        grams: by norm with readers, E[x x^T] of its output x over the sequences of a fit, float32.
        held_out: the same over the other sequences; empty if there are none.
    """

    stream: Stream
    order: Int[Tensor, " model"] | None
    turn: Float[Tensor, "model model"] | None
    gains: Mapping[str, Tensor]
    ratios: Mapping[str, Tensor]
    grams: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    _matrices: dict[tuple[str, int], tuple[Tensor, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def turned(self, parameter: Parameter, tensor: Tensor) -> Tensor:
        """A parameter of the dense model along the axes, in its type."""
        if (norm := self._folded.get(parameter.name)) is not None:
            return torch.full_like(tensor, 1 - norm.shift)
        for dim, expr in enumerate(parameter.dims):
            if RESIDUAL in expr.names:
                tensor = self._along(parameter.name, tensor, dim)
        return tensor

    @property
    def kind(self) -> Kind:
        """What the axes are."""
        return "selected" if self.turn is None else "principal"

    @property
    def digest(self) -> str:
        """Digest of the axes; results that depend on them are named by it."""
        found = self.order if self.turn is None else self.turn
        assert found is not None
        return hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest()[:16]

    @property
    def _folded(self) -> dict[str, Norm]:
        """The norms whose gain stands in their readers, by their weights."""
        return {self.stream.norms[name].weight: self.stream.norms[name] for name in self.gains}

    def _along(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        if self.turn is None:
            assert self.order is not None
            return tensor.index_select(dim, self.order.to(tensor.device))
        last = tensor.movedim(dim, -1).float()
        if name in self.stream.readers:
            last = last * self.gains[self.stream.readers[name]].to(last.device)
        return (last @ self.turn.to(last.device)).movedim(-1, dim).to(tensor.dtype).contiguous()

    def mended(self, name: str, tensor: Tensor, dims: tuple[str, ...], width: int, repair: bool) -> Tensor:
        """A parameter along the axes as a narrower model needs it: still of the whole width.

        Norms give as much as they did on average. With a repair, each reader takes the columns that go from those that
        stay, by least squares on the norm's outputs x in the dense model:

            W' = W R,  R = argmin E|x - R x_K|^2 = (E[x x_K^T] + lambda I_K D) (E[x_K x_K^T] + lambda D)^-1
        """
        norms = {norm.weight: norm for norm in self.stream.norms.values()}
        if name in norms:
            ratio, shift = float(self.ratios[norms[name].module][width - 1]), norms[name].shift
            return ((tensor.float() + shift) * ratio - shift).to(tensor.dtype)
        if not repair or name not in self.stream.readers:
            return tensor
        dim, matrix = dims.index(RESIDUAL), self.matrix(self.stream.readers[name], width)[0].to(tensor.device)
        kept = tensor.movedim(dim, -1).float() @ matrix
        return nn.functional.pad(kept, (0, len(matrix) - width)).movedim(-1, dim).to(tensor.dtype).contiguous()

    def matrix(self, norm: str, width: int) -> tuple[Float[Tensor, "model width"], float]:
        """R of a norm, float32, and its ridge: the one of `DAMPINGS` that does best on the held-out sequences.

        Without held-out sequences the ridge is 0.001.
        """
        if (norm, width) not in self._matrices:
            gram, other = self.grams[norm].double(), self.held_out.get(norm)
            solutions = [(_solve(gram, width, ridge), ridge) for ridge in (_DAMPING if other is None else DAMPINGS)]
            errors = [0.0 if other is None else lost(other.double(), matrix) for matrix, _ in solutions]
            matrix, ridge = solutions[errors.index(min(errors))]
            self._matrices[norm, width] = matrix.float(), ridge
        return self._matrices[norm, width]


def _solve(gram: Float[Tensor, "model model"], width: int, damping: float) -> Float[Tensor, "model width"]:
    kept, cross = gram[:width, :width].clone(), gram[:, :width].clone()
    ridge = damping * kept.diagonal().clamp_min(1e-12 * float(kept.diagonal().max()))
    kept.diagonal().add_(ridge)
    cross[:width].diagonal().add_(ridge)
    return torch.linalg.solve(kept, cross, left=False)


def lost(gram: Float[Tensor, "model model"], matrix: Float[Tensor, "model width"]) -> float:
    """E|x - R x_K|^2, from E[x x^T]; float64."""
    width = matrix.shape[1]
    cross = float((matrix * gram[:, :width]).sum())
    return float(gram.trace()) - 2 * cross + float(((matrix @ gram[:width, :width]) * matrix).sum())


@dataclass(frozen=True)
class Narrowed(Mapping[str, Tensor]):
    """The weights of a model along its axes, mended for a width; each is made when it is read.

    Attributes:
        weights: those of the dense model.
        repair: whether readers are mended, beside the gains of norms.
    """

    weights: Mapping[str, Tensor]
    architecture: Architecture
    axes: Axes
    width: int
    repair: bool

    def __getitem__(self, name: str) -> Tensor:
        tensor, parameter = self.weights[name], self._parameters.get(name)
        if parameter is None:
            return tensor
        dims = tuple(map(str, parameter.dims))
        return self.axes.mended(name, self.axes.turned(parameter, tensor), dims, self.width, self.repair)

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer that differ from those along the axes: norms, and what reads the stream."""
        stream = self.axes.stream
        touched = {*stream.readers, *(norm.weight for norm in stream.norms.values())}
        return {name: self[name] for name, p in self._parameters.items() if p.layer == layer and name in touched}

    @cached_property
    def _parameters(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.architecture.parameters}

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@torch.no_grad()
def turn_model(model: nn.Module, architecture: Architecture, axes: Axes, keep: Keep = in_memory) -> None:
    """Turn the stream of a model; it computes what it did before.

    Args:
        keep: where the turned parameters are put.
    """
    for parameter in architecture.parameters:
        if any(RESIDUAL in dim.names for dim in parameter.dims):
            own = model.get_parameter(parameter.name)
            set_parameters(model, {parameter.name: axes.turned(parameter, own.detach())}, keep)


def choose_kind(asked: str, stream: Stream) -> Kind:
    """The kind of axes: as asked for, or the best that a model can have.

    Raises:
        LibpruneError: if principal axes are asked for and the model cannot have them.
    """
    why = _not_turned(stream)
    if asked == "principal" and why:
        raise LibpruneError(f"width.axes is principal, but {why}; set it to selected or auto")
    return "selected" if asked == "selected" or why else "principal"


def _not_turned(stream: Stream) -> str:
    if stream.tied is not None:
        return (
            "the output head of this model is its embedding, which cannot hold the gain of the last norm; an own head "
            "would cost more than the width saves"
        )
    for norm in stream.norms.values():
        if norm.centred or norm.biased:
            return f"{norm.module} takes the mean of the columns away or adds a bias, which no rotation keeps"
    behind = set(stream.norms) - set(stream.readers.values())
    return f"{min(behind)} writes into the residual stream, which no rotation keeps" if behind else ""


def find_axes(
    kind: Kind, moments: Float[Tensor, "model model"], gain_of: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """The order or the turn of a stream, and the gains that go into the readers.

    Args:
        kind: of axes.
        moments: E[x x^T] of the states divided by the root of their mean square, summed over the norms with readers.
        gain_of: the gain of each norm by its module.
    """
    if kind == "selected":
        return torch.argsort(moments.diagonal(), descending=True, stable=True), None, {}
    _, vectors = torch.linalg.eigh(moments.double())
    return None, vectors.flip(1).float().contiguous(), {name: gain.float() for name, gain in gain_of.items()}


def write_axes(folder: Path, axes: Axes, meta: Mapping[str, Any]) -> None:
    """Write axes into an existing folder."""
    tensors = {"order": axes.order} if axes.turn is None else {"turn": axes.turn}
    for kind in _TABLES:
        tensors |= {f"{name}.{kind}": tensor for name, tensor in getattr(axes, kind).items()}
    stream = axes.stream
    about = {
        "norms": [vars(norm) for norm in stream.norms.values()],
        "readers": dict(stream.readers),
        "tied": stream.tied,
    }
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_tensors(folder / FILE, ready, {**meta, "stream": about})


_TABLES = ("gains", "ratios", "grams", "held_out")


def read_axes(folder: Path, origin: Mapping[str, Any]) -> Axes:
    """Read what `write_axes` wrote.

    Args:
        origin: digests of the model and of the calibration text that the axes must be of.

    Raises:
        ArtifactError: if it is missing, damaged, or of another model or text, or was made without a width.
    """
    if (folder / NOTHING).is_file():
        raise ArtifactError(f"{folder} was written with allocate.width: null; set a width, and run `dvc repro width`")
    path = require(folder / FILE, "width")
    with damage(path, "width"), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        meta, _ = decode_meta(path, file.metadata(), "width")
    same_origin(path, meta, origin)
    tensors = {name: load_tensor(path, name, "width")[0] for name in names}
    about = meta["stream"]
    norms = {one["module"]: Norm(**one) for one in about["norms"]}
    tables = [
        {name.removesuffix(f".{kind}"): tensor for name, tensor in tensors.items() if name.endswith(f".{kind}")}
        for kind in _TABLES
    ]
    stream = Stream(norms, about["readers"], about["tied"])
    return Axes(stream, tensors.get("order"), tensors.get("turn"), *tables)
