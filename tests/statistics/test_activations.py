"""Forward-only statistics, against the inputs themselves, captured and worked on in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from libprune.collection.accumulator import Accumulator
from libprune.collection.records import HELD_OUT_TOKENS
from libprune.engine.architecture import Architecture
from libprune.engine.errors import StatisticsError
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.statistics.activations import ACTIVE, HISTOGRAM_STRIDE, NORMS, activation_columns, measure_activations
from tests.support import measured
from tests.support.collected import (
    LENGTH,
    SEQUENCES,
    activations,
    architecture,
    assert_all_close,
    assert_close,
    assert_untouched,
    captured,
    everything,
    model,
    of_layers,
)
from tests.support.models import FAMILIES, VOCAB, tokens

__all__ = ["architecture", "model"]

CONSUMERS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def sums(model) -> Accumulator:
    return activations(model)


@pytest.fixture(scope="module")
def found(sums) -> dict[str, Tensor]:
    return of_layers(sums)


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
        "input_min": x.amin(0),
        "input_max": x.amax(0),
        "input_variance": x.var(0, correction=0),
    }


def test_norms_mean_variance_and_range_are_those_of_the_inputs(found, inputs):
    for module, x in inputs.items():
        assert found[f"{module}.input_tokens"] == len(x) == SEQUENCES * LENGTH
        for name, expected in reference(x).items():
            assert_close(found[f"{module}.{name}"], expected)


def test_gram_matrices_and_histograms_are_kept_at_the_consumers_alone(found, inputs):
    for module, x in inputs.items():
        for kind in ("gram", "histogram"):
            assert (f"{module}.input_{kind}" in found) is module.endswith(CONSUMERS)
        if module.endswith(CONSUMERS):
            assert_close(found[f"{module}.input_gram"], x.T @ x / len(x))
            assert torch.equal(found[f"{module}.input_gram"], found[f"{module}.input_gram"].T)
            per_feature = found[f"{module}.input_histogram"].sum(1)
            assert (per_feature == len(x) // HISTOGRAM_STRIDE).all()


def held_out_tokens(stored: dict[str, Tensor], module: str) -> int:
    (name,) = [n for n in stored if n.startswith(f"{module}.input_held_out") and n.endswith("tokens")]
    return int(stored[name])


def test_held_out_sequences_are_kept_from_the_gram_matrix_and_their_inputs_are_stored(model, architecture):
    number, length = 18, 2 * HELD_OUT_TOKENS
    ids = tokens(number, length)
    consumers = [entry.module for entry in architecture.maps if entry.module.endswith(CONSUMERS)]
    with captured(model, consumers) as table, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    stored = of_layers(activations(model, 5, ids))
    for module, inputs in table.items():
        x = inputs.view(number, length, -1)
        fitted = torch.cat([sequence for index, sequence in enumerate(x) if index % 8 != 7])
        assert_close(stored[f"{module}.input_gram"], fitted.T @ fitted / len(fitted))
        rows = stored[f"{module}.input_held_out"]
        assert held_out_tokens(stored, module) == 2 * HELD_OUT_TOKENS
        assert_close(rows[rows.any(1)], torch.cat([x[7, ::2], x[15, ::2]]))
        assert stored[f"{module}.input_tokens"] == number * length  # norms and moments are of all sequences


@pytest.mark.parametrize("size", [1, 4, 8, 18])
def test_the_batch_size_does_not_move_held_out_inputs(size):
    model, ids = FAMILIES["llama"](0), tokens(18, 12)
    one, two = (of_layers(activations(model, n, ids)) for n in (size, 7))
    for name, tensor in two.items():
        if ".input_held_out" in name or name.endswith(".input_gram"):
            assert_close(one[name], tensor)


def test_few_sequences_are_all_fitted_to(model, sums):
    stored = of_layers(sums)
    modules = [name.removesuffix(".input_gram") for name in stored if name.endswith(".input_gram")]
    assert len(modules) == 8
    for module in modules:
        assert held_out_tokens(stored, module) == 0
        assert not stored[f"{module}.input_held_out"].any()


def test_a_layers_tensors_are_those_of_its_own_maps(architecture, sums):
    for layer in range(architecture.layers):
        modules = {name.partition(".input_")[0].partition(".cosine_")[0] for name in sums.finish(layer)}
        assert modules == {e.module for e in architecture.maps if e.layer == layer} | {"block"}


def test_the_cosine_is_that_of_every_tokens_state_before_and_after_a_block(model, sums):
    with torch.no_grad():
        states = model.model(input_ids=tokens(SEQUENCES, LENGTH), use_cache=False, output_hidden_states=True)
    last = {}
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, output: last.update(state=output))
    with torch.no_grad():
        model.model(input_ids=tokens(SEQUENCES, LENGTH), use_cache=False)
    handle.remove()
    chain = [*states.hidden_states[:-1], last["state"]]
    for layer, (before, after) in enumerate(itertools.pairwise(chain)):
        cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        found = sums.finish(layer)
        assert float(found["block.cosine_mean"]) == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert float(found["block.cosine_variance"]) == pytest.approx(float(cosines.var(correction=0)), abs=1e-6)


@pytest.mark.parametrize("size", [1, SEQUENCES])
def test_the_batch_size_changes_nothing(model, sums, size):
    other = everything(activations(model, size))
    for name, tensor in everything(sums).items():
        if "histogram" in name:  # a value within rounding of an edge may fall on either side
            assert int((other[name] - tensor).abs().sum()) <= 4
    assert_all_close(
        *({n: t for n, t in stored.items() if "histogram" not in n} for stored in (other, everything(sums)))
    )


def test_the_variance_of_a_constant_input_is_zero():
    found = of_layers(activations(FAMILIES["llama"](0), ids=torch.zeros(2, 1, dtype=torch.long)))
    for name, tensor in found.items():
        if name.endswith("input_variance"):
            assert float(tensor.min()) >= 0
            assert float(tensor.max()) < 1e-12 * float(found[name.replace("variance", "norm_max")].max() ** 2)


def test_low_precision_inputs_are_multiplied_exactly_and_summed_in_float32():
    """The Gram matrix of bfloat16 inputs, against float64: the products are exact, only the sums round."""
    model = FAMILIES["llama"](0).to(torch.bfloat16)
    found = of_layers(activations(model))
    modules = [name for name, _ in model.named_modules() if name.endswith(CONSUMERS)]
    with captured(model, modules) as table, torch.no_grad():
        for ids in tokens(SEQUENCES, LENGTH).split(2):
            model(input_ids=ids, use_cache=False)
            for module, x in table.items():
                found[f"{module}.input_gram"] = found[f"{module}.input_gram"].double() - x.T @ x / (SEQUENCES * LENGTH)
                found.setdefault(f"{module}.scale", torch.tensor(0.0))
                found[f"{module}.scale"] += float(x.square().sum(1).mean())
    for module in modules:
        assert float(found[f"{module}.input_gram"].abs().max()) < 1e-6 * float(found[f"{module}.scale"])


def test_storage_type_is_that_of_the_gram_matrices_alone():
    found = of_layers(activations(FAMILIES["llama"](0), storage_dtype="bfloat16"))
    kinds = {name: tensor.dtype for name, tensor in found.items() if "norm" in name or name.endswith(".input_gram")}
    assert {dtype for name, dtype in kinds.items() if name.endswith("_gram")} == {torch.bfloat16}
    assert {dtype for name, dtype in kinds.items() if not name.endswith("_gram")} == {torch.float32}


# By unit


def test_activation_columns_are_means_over_a_units_own_features(model, architecture, sums, inputs):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        (consumer,) = architecture.consumers(layer, part)
        x = inputs[consumer.module]
        columns = activation_columns(architecture, sums.finish(layer), weights, layer, part)
        width = x.shape[1] // architecture.units(part)
        features = {
            "magnitude": x.abs().mean(0),
            "variance": x.var(0, correction=0),
            "range": x.amax(0) - x.amin(0),
        }
        for name, values in features.items():
            expected = values.view(-1, width).mean(1).numpy()
            np.testing.assert_allclose(columns[f"activation_{name}"], expected, rtol=1e-4)
        assert ((columns["activation_entropy"] >= 0) & (columns["activation_entropy"] <= np.log(len(x)))).all()
        active = (x.abs() >= ACTIVE * x.square().mean().sqrt()).double().mean(0).view(-1, width).mean(1).numpy()
        # From a quarter of the tokens, with the threshold rounded down to an edge.
        assert np.abs(columns["activation_frequency"] - active).max() < 0.35
        assert np.abs(columns["activation_frequency"] - active).mean() < 0.1


def test_wanda_is_the_sum_of_every_elements_weight_times_its_inputs_norm(model, architecture, sums, inputs):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        columns = activation_columns(architecture, sums.finish(layer), weights, layer, part)
        for kind in NORMS:
            expected = np.zeros(architecture.units(part))
            for entry in architecture.maps_of(layer, part):
                x = inputs[entry.module]
                norm = x.mean(0).abs() if kind == "mean" else reference(x)[f"input_norm_{kind}"]
                weight = weights[entry.weight].detach().double().abs()
                terms = (weight.T if entry.transposed else weight) * norm  # [output, input]
                add_to_units(expected, terms, entry.module, architecture)
            np.testing.assert_allclose(columns[f"wanda_{kind}"], expected, rtol=1e-4)


def test_fluctuation_is_the_variance_of_the_consumers_inputs_times_its_squared_weights(
    model, architecture, sums, inputs
):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        (consumer,) = architecture.consumers(layer, part)
        weight = weights[consumer.weight].double()
        centred = inputs[consumer.module] - inputs[consumer.module].mean(0)
        expected = []
        for own in torch.arange(centred.shape[1]).tensor_split(architecture.units(part)):
            # What the unit gives of each output beside its mean, position by position.
            given = [centred[:, p, None] * (weight[p] if consumer.transposed else weight[:, p]) for p in own]
            expected.append(sum(float(part.square().sum(1).mean()) for part in given))
        found = activation_columns(architecture, sums.finish(layer), weights, layer, part)["fluctuation"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def add_to_units(total: np.ndarray, terms: Tensor, module: str, architecture: Architecture) -> None:
    """Adds ``[output, input]`` to the units of a Llama-like map: equal stretches of rows, or columns of a consumer."""
    rows = terms.T if module.endswith(CONSUMERS) else terms
    width, remainder = divmod(len(rows), len(total))
    assert remainder == 0
    for position, row in enumerate(rows):
        total[position // width] += float(row.sum())


def test_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    activations(model)
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
    message = rf"the input of model\.layers\.0\.self_attn\.q_proj is not finite for calibration sequence {row};"
    with pytest.raises(StatisticsError, match=message):
        activations(model, size, ids)
    assert_untouched(model)


def test_a_program_gets_the_table_of_units_that_is_written(tmp_path):
    project = measured.write_project(FAMILIES["llama"](0), tmp_path)
    layout, settings = Layout(project / "artifacts"), load_params(project / "params.yaml")
    table = measure_activations(layout, settings.compute, settings.activations)
    written, meta = read_table(layout.activations / "units.parquet", "activations")
    assert meta["sequences"] == measured.SEQUENCES
    assert table.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(table[name], values)
