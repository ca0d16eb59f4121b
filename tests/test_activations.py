"""Forward-only statistics, against the inputs themselves, captured and worked on in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.activations import NORMS, ActivationSums, activation_columns, collect_activations
from libprune.architecture import Architecture
from libprune.describe import describe
from libprune.errors import StatisticsError
from tests.models import FAMILIES, VOCAB, tokens
from tests.test_gradients import LENGTH, MODELS, SEQUENCES, assert_close, assert_untouched, batches

CONSUMERS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param](0)


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return describe(model)


@pytest.fixture(scope="module")
def sums(model, architecture) -> ActivationSums:
    return collect_activations(model, architecture, batches(2))


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


@pytest.fixture(scope="module")
def inputs(model, architecture) -> dict[str, Tensor]:
    """The input of every map over all calibration tokens, from one forward pass."""
    with captured(model, [entry.module for entry in architecture.maps]) as table, torch.no_grad():
        model(input_ids=tokens(SEQUENCES, LENGTH), use_cache=False)
    return table


def reference(x: Tensor) -> dict[str, Tensor]:
    """What is stored of an input, straight from its definition."""
    return {
        "input_norm_l1": x.abs().sum(0),
        "input_norm_l2": torch.linalg.vector_norm(x, dim=0),
        "input_norm_max": x.abs().amax(0),
        "input_mean": x.mean(0),
        "input_variance": x.var(0, correction=0),
    }


def test_norms_mean_and_variance_are_those_of_the_inputs(sums, inputs):
    assert sums.tokens == SEQUENCES * LENGTH
    assert sums.inputs.keys() == inputs.keys()
    for module, x in inputs.items():
        stored = sums.tensors(module)
        for name, expected in reference(x).items():
            assert_close(stored[f"{module}.{name}"], expected)
        for kind in NORMS:
            by_name = reference(x) | {"input_norm_mean": x.mean(0).abs()}
            assert_close(sums.inputs[module].norm(kind, sums.tokens), by_name[f"input_norm_{kind}"])


def test_gram_matrices_are_kept_at_the_consumers_alone(sums, inputs):
    for module, x in inputs.items():
        stored = sums.tensors(module)
        assert (f"{module}.input_gram" in stored) is module.endswith(CONSUMERS)
        if module.endswith(CONSUMERS):
            assert_close(stored[f"{module}.input_gram"], x.T @ x / len(x))


def test_a_layers_tensors_are_those_of_its_own_maps(architecture, sums):
    for layer in range(architecture.layers):
        tensors = sums.layer_tensors(architecture, layer)
        prefix = f"model.layers.{layer}."
        assert {name.rpartition(".")[0] for name in tensors} == {n for n in sums.inputs if n.startswith(prefix)}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("size", [1, SEQUENCES])
def test_the_batch_size_changes_nothing(model, architecture, sums, size):
    other = collect_activations(model, architecture, batches(size))
    assert other.tokens == sums.tokens
    for module in sums.inputs:
        for name, tensor in sums.tensors(module).items():
            assert_close(other.tensors(module)[name], tensor)


def test_the_variance_of_a_constant_input_is_not_negative():
    model = FAMILIES["llama"](0)
    sums = collect_activations(model, describe(model), [(0, torch.zeros(2, 1, dtype=torch.long))])
    for module in sums.inputs:
        variance = sums.tensors(module)[f"{module}.input_variance"]
        assert float(variance.min()) >= 0
        assert float(variance.max()) < 1e-5 * float(sums.tensors(module)[f"{module}.input_norm_max"].max() ** 2)


def test_wanda_is_the_sum_of_every_elements_weight_times_its_inputs_norm(model, architecture, sums, inputs):
    weights = dict(model.named_parameters())
    for layer, part in architecture.blocks():
        columns = activation_columns(sums, architecture, weights, layer, part)
        assert columns.keys() == {f"wanda_{kind}" for kind in NORMS}
        for kind in NORMS:
            expected = np.zeros(architecture.units(part))
            for entry in architecture.maps_of(layer, part):
                x = inputs[entry.module]
                norm = x.mean(0).abs() if kind == "mean" else reference(x)[f"input_norm_{kind}"]
                weight = weights[entry.weight].detach().double().abs()
                terms = (weight.T if entry.transposed else weight) * norm  # [output, input]
                add_to_units(expected, terms, entry.module, architecture)
            np.testing.assert_allclose(columns[f"wanda_{kind}"], expected, rtol=1e-4)


def add_to_units(total: np.ndarray, terms: Tensor, module: str, architecture: Architecture) -> None:
    """Adds ``[output, input]`` to the units of a Llama-like map: equal stretches of rows, or columns of a consumer."""
    rows = terms.T if module.endswith(CONSUMERS) else terms
    width, remainder = divmod(len(rows), len(total))
    assert remainder == 0
    for position, row in enumerate(rows):
        total[position // width] += float(row.sum())


def test_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    collect_activations(model, describe(model), batches(2))
    assert_untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 2, SEQUENCES])
def test_the_module_and_batch_whose_input_is_not_finite_are_named(size):
    model = FAMILIES["llama"](0)
    row = 3
    ids = tokens(SEQUENCES, LENGTH).clamp(max=VOCAB - 2)
    ids[row, 5] = VOCAB - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = torch.inf
    message = rf"the input of model\.layers\.0\.self_attn\.q_proj is not finite.* sequence {row // size * size};"
    with pytest.raises(StatisticsError, match=message):
        collect_activations(model, describe(model), batches(size, ids))
    assert_untouched(model)
