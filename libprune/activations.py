"""Forward-only statistics: norms at every map's input, Gram matrices at the consumers'."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.architecture import Architecture, Map
from libprune.errors import StatisticsError
from libprune.units import unit_sums

NORMS = ("l1", "l2", "mean", "max")


@dataclass
class InputSums:
    """Running sums at the input of one map, over tokens; each ``[input]``, float64 or (max) float32.

    Attributes:
        total: sum of x.
        absolute: sum of |x|.
        square: sum of x^2.
        largest: maximum of |x|.
        gram: sum of x x^T, ``[input, input]`` float32, at consumers only.
    """

    total: Tensor
    absolute: Tensor
    square: Tensor
    largest: Tensor
    gram: Tensor | None = None

    def norm(self, kind: str, tokens: int) -> Tensor:
        """A norm of each input feature: l1 = sum |x|, l2 = sqrt(sum x^2), mean = |mean x|, max = max |x|."""
        values = {
            "l1": self.absolute,
            "l2": self.square.sqrt(),
            "mean": (self.total / tokens).abs(),
            "max": self.largest.double(),
        }
        return values[kind].float()


@dataclass
class ActivationSums:
    """Sums of every map, by module name, and the tokens seen."""

    inputs: dict[str, InputSums] = field(default_factory=dict)
    tokens: int = 0

    def layer_tensors(self, architecture: Architecture, layer: int) -> dict[str, Tensor]:
        """What is stored of one block, for all its maps."""
        maps = [entry for part in architecture.parts for entry in architecture.maps_of(layer, part)]
        return {name: tensor for entry in maps for name, tensor in self.tensors(entry.module).items()}

    def tensors(self, module: str) -> dict[str, Tensor]:
        """What is stored of one map: norms, mean and variance of its input, and E[x x^T] at a consumer."""
        sums = self.inputs[module]
        mean = sums.total / self.tokens
        stored = {f"{module}.input_norm_{kind}": sums.norm(kind, self.tokens) for kind in NORMS if kind != "mean"}
        stored[f"{module}.input_mean"] = mean.float()
        stored[f"{module}.input_variance"] = (sums.square / self.tokens - mean.square()).clamp(min=0).float()
        if sums.gram is not None:
            stored[f"{module}.input_gram"] = sums.gram / self.tokens
        return stored


def collect_activations(
    model: PreTrainedModel, architecture: Architecture, batches: Iterable[tuple[int, Tensor]]
) -> ActivationSums:
    """One forward pass over the batches.

    Raises:
        StatisticsError: naming the module and batch whose input is not finite.
    """
    sums = ActivationSums()
    with _collecting(model, architecture, sums), torch.no_grad():
        for first, ids in batches:
            model.base_model(input_ids=ids, use_cache=False)
            sums.tokens += ids.numel()
            _require_finite(sums, first)
    return sums


@contextmanager
def _collecting(model: PreTrainedModel, architecture: Architecture, sums: ActivationSums) -> Iterator[None]:
    handles = []
    for layer, part in architecture.blocks():
        consumers = {entry.module for entry in architecture.consumers(layer, part)}
        for entry in architecture.maps_of(layer, part):
            hook = partial(_watch_input, entry, entry.module in consumers, sums)
            handles.append(model.get_submodule(entry.module).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_input(entry: Map, with_gram: bool, sums: ActivationSums, module: nn.Module, args: tuple[Tensor]) -> None:
    x = args[0].flatten(0, -2).float()
    magnitude = x.abs()
    now = InputSums(
        total=x.sum(0, dtype=torch.float64),
        absolute=magnitude.sum(0, dtype=torch.float64),
        square=x.square().sum(0, dtype=torch.float64),
        largest=magnitude.amax(0),
        gram=x.T @ x if with_gram else None,
    )
    before = sums.inputs.get(entry.module)
    sums.inputs[entry.module] = now if before is None else _merge(before, now)


def _merge(one: InputSums, two: InputSums) -> InputSums:
    return InputSums(
        total=one.total + two.total,
        absolute=one.absolute + two.absolute,
        square=one.square + two.square,
        largest=torch.maximum(one.largest, two.largest),
        gram=None if one.gram is None or two.gram is None else one.gram.add_(two.gram),
    )


def _require_finite(sums: ActivationSums, first: int) -> None:
    for module, entry in sums.inputs.items():
        if not torch.isfinite(entry.square).all():
            raise StatisticsError(
                f"the input of {module} is not finite in the batch from calibration sequence {first}; "
                "try compute.dtype: float32, and check that the model is sound on this text"
            )


def activation_columns(
    sums: ActivationSums, architecture: Architecture, weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit sums of |W_ij| a_j of a block, for every norm a of the input features."""
    columns = {}
    for kind in NORMS:
        terms = {
            entry.weight: _weighted(entry, weights[entry.weight].detach().cpu(), sums, kind)
            for entry in architecture.maps_of(layer, part)
        }
        columns[f"wanda_{kind}"] = unit_sums(architecture, layer, part, terms, weights_only=True)
    return columns


def _weighted(entry: Map, weight: Tensor, sums: ActivationSums, kind: str) -> Tensor:
    norm = sums.inputs[entry.module].norm(kind, sums.tokens).cpu()
    return weight.abs().float() * (norm[:, None] if entry.transposed else norm)
