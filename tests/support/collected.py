"""What the tests of the collecting stages share: models, batches, sums, and comparisons up to rounding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.accumulator import Accumulator
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.models.sequences import Pass, Sequences
from libprune.pipeline.sections import Activations, Gradients, Hessian
from libprune.statistics.activations import activation_groups, collect_activations
from libprune.statistics.gradients import collect_gradients, gradient_groups
from libprune.statistics.hessian import collect_probes, collect_squared_gradients, hessian_groups
from tests.support.models import FAMILIES, VOCAB, tokens
from tests.support.weights import conv1d_stored

SEQUENCES, LENGTH = 5, 12
N_TOK = LENGTH - 1

# Multi-head with tied weights and biases everywhere, grouped queries, per-head norms, and [in, out] storage.
MODELS = {
    "llama": FAMILIES["llama"],
    "llama_mha": FAMILIES["llama_mha"],
    "qwen3": FAMILIES["qwen3"],
    "conv1d": lambda seed: conv1d_stored(FAMILIES["llama"](seed)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param](0)


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return describe(model)


def batches(size: int, ids: Tensor | None = None) -> Iterator[Pass]:
    """Number, index of the first sequence, and sequences of every batch."""
    ids = tokens(SEQUENCES, LENGTH) if ids is None else ids
    return ((first // size, first, Sequences(ids[first : first + size])) for first in range(0, len(ids), size))


def gradients(
    model: PreTrainedModel,
    size: int = 2,
    ids: Tensor | None = None,
    at_once: int = 99,
    recompute: bool = False,
    architecture: Architecture | None = None,
    **section: Any,
) -> Accumulator:
    """The sums of the gradients stage."""
    architecture = architecture or describe(model)
    section = {"storage_dtype": "float32"} | section
    length = LENGTH if ids is None else ids.shape[1]
    sums = Accumulator(gradient_groups(architecture, length - 1, SEQUENCES, Gradients(**section), at_once < size))
    collect_gradients(model, architecture, batches(size, ids), sums, at_once, recompute)
    return sums


def hessian(
    model: Any, size: int = 2, ids: Tensor | None = None, architecture: Any = None, **section: Any
) -> Accumulator:
    """The sums of the hessian stage."""
    architecture = architecture or describe(model)
    settings = Hessian(**({"storage_dtype": "float32", "estimator": "fisher"} | section))
    length = LENGTH if ids is None else ids.shape[1]
    sums = Accumulator(hessian_groups(architecture, length - 1, settings))
    if settings.estimator == "hutchinson":
        collect_probes(model, architecture, batches(size, ids), sums, settings)
    else:
        collect_squared_gradients(model, architecture, batches(size, ids), sums)
    return sums


def activations(model: PreTrainedModel, size: int = 2, ids: Tensor | None = None, **section: Any) -> Accumulator:
    """The sums of the activations stage."""
    architecture = describe(model)
    sums = Accumulator(activation_groups(architecture, Activations(**section)))
    collect_activations(model, architecture, batches(size, ids), sums)
    return sums


def everything(sums: Accumulator) -> dict[str, Tensor]:
    """What is stored of all groups, by name and group."""
    return {f"{group}:{k}": v for group in range(len(sums.groups)) for k, v in sums.finish(group).items()}


def of_layers(sums: Accumulator) -> dict[str, Tensor]:
    """What is stored of all layers; a parameter's name holds its layer."""
    return {name: tensor for group in range(len(sums.groups)) for name, tensor in sums.finish(group).items()}


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal up to float32 rounding: relative to the largest value, below which cancellation is noise."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_all_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and tensors that are equal up to rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor)


def assert_untouched(model: nn.Module) -> None:
    """No hook and no gradient is left on a model."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.grad is None


def poisoned_tokens(row: int) -> Tensor:
    """Sequences of which one alone holds the last token of the vocabulary."""
    ids = tokens(SEQUENCES, LENGTH).clamp(max=VOCAB - 2)
    ids[row, 3] = VOCAB - 1
    return ids


@contextmanager
def captured(model: nn.Module, modules: list[str]) -> Iterator[dict[str, Tensor]]:
    """Fills a table with the inputs of modules, ``[tokens, input]`` in float64, while the model runs."""
    table, handles = {}, []
    for name in modules:

        def keep(_, args, name=name):
            table[name] = args[0].detach().flatten(0, -2).double()

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    yield table
    for handle in handles:
        handle.remove()
