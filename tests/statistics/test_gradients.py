"""First-order statistics, against autograd of the same quantities written out in full."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.accumulator import ROWS, Accumulator
from libprune.engine.architecture import Architecture
from libprune.engine.errors import StatisticsError
from libprune.models.memory import recompute_layers
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.statistics.gradients import gradient_columns, layer_rows, measure_gradients
from tests.support import measured
from tests.support.collected import (
    LENGTH,
    N_TOK,
    SEQUENCES,
    architecture,
    assert_all_close,
    assert_close,
    assert_untouched,
    everything,
    gradients,
    model,
    of_layers,
    poisoned_tokens,
)
from tests.support.models import FAMILIES, VOCAB, tokens

__all__ = ["architecture", "model"]


@pytest.fixture(scope="module")
def sums(model) -> Accumulator:
    return gradients(model)


@pytest.fixture(scope="module")
def found(sums) -> dict[str, Tensor]:
    return of_layers(sums)


def transformers_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean over sequences and tokens, as transformers computes it."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def block_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: p.requires_grad_() for name, p in model.named_parameters() if name.startswith("model.layers.")}


# The mean gradient


def test_it_is_the_gradient_of_the_mean_loss_of_all_sequences(model, found):
    parameters = block_parameters(model)
    loss = transformers_loss(model, tokens(SEQUENCES, LENGTH))
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for name, gradient in expected.items():
        assert_close(found[name], gradient)
    assert float(found["loss"]) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(("size", "at_once"), [(2, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("second_moments", ["diagonal", "full"])
def test_how_batches_are_cut_changes_nothing(model, size, at_once, second_moments):
    """Whole batches and pieces of them give the same sums; the rows by batch too, where the batches are the same."""
    whole = everything(gradients(model, size, second_moments=second_moments))
    assert_all_close(everything(gradients(model, size, at_once=at_once, second_moments=second_moments)), whole)


@pytest.mark.parametrize("size", [1, SEQUENCES])
def test_the_batch_size_changes_only_the_rows_by_batch(model, sums, size):
    one, other = (
        {name: tensor for name, tensor in everything(s).items() if ROWS not in name}
        for s in (sums, gradients(model, size))
    )
    assert_all_close(other, one)


def test_low_precision_gradients_are_summed_in_float32():
    model = FAMILIES["llama"](0).to(torch.bfloat16)
    ids = tokens(1, LENGTH)
    once, thrice = (of_layers(gradients(model, 1, ids.repeat(times, 1))) for times in (1, 3))
    for name, gradient in once.items():
        if name in dict(model.named_parameters()):
            assert gradient.dtype == torch.float32
            assert_close(thrice[name], gradient, rtol=1e-6)


def test_recomputed_blocks_give_the_same_bits(model, architecture):
    expected = everything(gradients(model))
    blocks = model.model.layers
    plain = [block.forward for block in blocks]
    recompute_layers(model, architecture)
    try:
        found = everything(gradients(model, recompute=True))
    finally:
        for block, forward in zip(blocks, plain, strict=True):
            block.forward = forward
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# By batch and layer


def test_rows_are_the_size_spread_and_norm_of_each_batchs_mean_gradient(model, architecture, sums):
    for layer in range(architecture.layers):
        table = layer_rows(architecture, sums.finish(layer), layer, batches=3)
        for batch, ids in enumerate(tokens(SEQUENCES, LENGTH).split(2)):
            parameters = block_parameters(model)
            grads = torch.autograd.grad(transformers_loss(model, ids), list(parameters.values()))
            for name, gradient in zip(parameters, grads, strict=True):
                kind = name.removeprefix(f"model.layers.{layer}.")
                if kind == name:
                    continue
                (row,) = np.flatnonzero((table["parameter"] == kind) & (table["batch"] == batch))
                g = gradient.double()
                expected = [float(g.abs().mean()), float(g.std(correction=0)), float(g.norm())]
                found = [table[column][row] for column in ("mean_abs", "std", "norm")]
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


# Second moments


@contextmanager
def captured_gradients(model: nn.Module, modules: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Gradients at the inputs and outputs of modules, one entry a backward pass."""
    table: dict[str, list[Tensor]] = {}
    handles = []
    for name in modules:
        for side in ("input", "output"):
            table[f"{name}.{side}"] = []

        def keep(_, grad_input, grad_output, name=name):
            table[f"{name}.input"].append(grad_input[0])
            table[f"{name}.output"].append(grad_output[0])

        handles.append(model.get_submodule(name).register_full_backward_hook(keep))
    yield table
    for handle in handles:
        handle.remove()


def test_second_moments_are_means_over_tokens_of_the_summed_losses_gradient(model, architecture):
    found = of_layers(gradients(model, second_moments="full"))
    consumers = {c.module for block in architecture.blocks() for c in architecture.consumers(*block)}
    with captured_gradients(model, [entry.module for entry in architecture.maps]) as table:
        for sequence in tokens(SEQUENCES, LENGTH):
            (N_TOK * transformers_loss(model, sequence[None])).backward()
    model.zero_grad()
    for side, rows in table.items():
        module = side.rpartition(".")[0]
        delta = torch.cat([row.flatten(0, -2) for row in rows]).double()
        if module in consumers or side.endswith("output"):
            assert_close(found[f"{side}_gradient_square"], delta.square().mean(0))
        assert (f"{side}_gradient_gram" in found) is (module in consumers)
        if module in consumers:
            assert_close(found[f"{side}_gradient_gram"], delta.T @ delta / len(delta))


# The mask gradient of a unit


@contextmanager
def explicit_masks(model: nn.Module, architecture: Architecture, tokens_too: bool) -> Iterator[dict]:
    """Multiplies every consumer's input by a mask of ones, one a unit (and token), repeated over its positions."""
    masks, handles = {}, []
    for layer, part in architecture.blocks():
        consumer = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[part]
        units = architecture.units(part)
        shape = (1, LENGTH, units) if tokens_too else (1, 1, units)
        mask = masks[layer, part] = torch.ones(shape, requires_grad=True)
        width = architecture.sizes["q"] * architecture.sizes["d"] if part == "attention" else 1
        wide = mask.repeat_interleave(width, dim=-1)
        module = model.get_submodule(f"model.layers.{layer}.{consumer}")
        handles.append(module.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide,)))
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def mask_gradients(model: PreTrainedModel, architecture: Architecture, tokens_too: bool) -> dict:
    """Gradient of every sequence's mean-token loss by the masks; ``[sequences, (tokens,) units]`` a block."""
    rows = []
    for sequence in tokens(SEQUENCES, LENGTH):
        with explicit_masks(model, architecture, tokens_too) as masks:
            loss = transformers_loss(model, sequence[None])
            rows.append(torch.autograd.grad(loss, list(masks.values())))
    return {block: torch.cat([row[i] for row in rows]).double() for i, block in enumerate(architecture.blocks())}


def unit_statistics(sums: Accumulator, block: tuple[int, str]) -> dict[str, Tensor]:
    prefix = f"units.{block[1]}."
    return {name.removeprefix(prefix): t for name, t in sums.finish(block[0]).items() if name.startswith(prefix)}


def test_unit_statistics_are_those_of_every_sequences_mask_gradient(model, architecture, sums):
    for block, gradient in mask_gradients(model, architecture, tokens_too=False).items():
        m, found = gradient.flatten(1, -2).sum(1), unit_statistics(sums, block)
        size, spread = m.abs().mean(0), m.abs().std(0, correction=0)
        assert_close(found["unit_fisher_sequence"], 0.5 * N_TOK * m.square().mean(0))
        assert_close(found["mask_gradient"], m.mean(0))
        assert_close(found["mask_gradient_abs"], size)
        assert_close(found["mask_gradient_square"], m.square().mean(0))
        assert_close(found["sign_consistency"], m.sign().mean(0).abs())
        assert_close(found["stability"], 1 / (1 + spread / size), rtol=1e-3)
        assert_close(found["snr"], m.mean(0).abs() / m.std(0, correction=0), rtol=1e-3)


def test_unit_fisher_by_token_is_half_the_mean_square_over_tokens_of_the_summed_loss(model, architecture, sums):
    for block, gradient in mask_gradients(model, architecture, tokens_too=True).items():
        expected = (N_TOK * gradient).square().mean((0, 1))
        assert_close(unit_statistics(sums, block)["unit_fisher_token"], 0.5 * expected)
        assert_close(unit_statistics(sums, block)["mask_gradient_square_token"], expected)


def test_for_a_single_counted_token_the_two_differ_by_the_number_of_inputs_alone(architecture, model):
    """With two tokens only the first is counted and only its input has a gradient; the token mean is over both."""
    sums = gradients(model, 2, tokens(SEQUENCES, 2))
    for block in architecture.blocks():
        found = unit_statistics(sums, block)
        assert_close(2 * found["unit_fisher_token"], found["unit_fisher_sequence"])


# Columns


def test_the_columns_are_sums_over_the_elements_of_a_unit(model, architecture, sums):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        tensors = sums.finish(layer)
        columns = gradient_columns(architecture, tensors, weights, layer, part)
        absolute, signed = np.zeros(architecture.units(part)), np.zeros(architecture.units(part))
        for parameter, dim, units in architecture.carriers(layer, part):
            terms = (weights[parameter.name] * tensors[parameter.name]).double().movedim(dim, 0)
            for position, unit in enumerate(units):
                absolute[unit] += float(terms[position].abs().sum())
                signed[unit] += float(terms[position].sum())
        np.testing.assert_allclose(columns["taylor"], absolute, rtol=1e-5)
        np.testing.assert_allclose(columns["taylor_signed"], signed, atol=1e-5 * absolute.max())
        for over in ("sequence", "token"):
            expected = tensors[f"units.{part}.unit_fisher_{over}"]
            np.testing.assert_array_equal(columns[f"unit_fisher_{over}"], expected)


# What it leaves behind


def test_only_block_parameters_have_a_gradient_and_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = of_layers(gradients(model))
    assert found.keys() & before.keys() == {name for name in before if name.startswith("model.layers.")}
    assert_untouched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_can_be_trained_as_before():
    model = FAMILIES["llama"](0)
    gradients(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is not finite


@settings(max_examples=10)
@given(st.integers(0, SEQUENCES - 1), st.integers(1, SEQUENCES))
def test_the_sequence_whose_loss_is_not_finite_is_named(row, size):
    model = FAMILIES["llama_mha"](0)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = torch.nan
    with pytest.raises(StatisticsError, match=rf"not finite for calibration sequence {row};.*compute\.dtype: float32"):
        gradients(model, size, poisoned_tokens(row))
    assert_untouched(model)


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
@settings(max_examples=5)
@given(st.integers(0, 3), st.integers(0, SEQUENCES - 1), st.integers(1, SEQUENCES))
def test_the_layer_and_sequence_whose_gradient_is_not_finite_are_named(module, layer, row, size):
    """A fault in backward alone: the loss is finite, and the gradient turns infinite behind one layer's output."""
    model = FAMILIES["llama"](0)
    faulty = f"model.layers.{layer}.{module}"
    seen = 0

    def turn_infinite(_, args, output: Tensor) -> Tensor:
        nonlocal seen
        first, seen = seen, seen + len(output)
        factor = torch.ones(len(output), 1, 1)
        if first <= row < seen:
            factor[row - first] = torch.inf
        output.register_hook(lambda gradient: gradient * factor)
        return output

    handle = model.get_submodule(faulty).register_forward_hook(turn_infinite)
    where = re.escape(f"the gradient at the output of {faulty} is not finite for calibration sequence {row};")
    with pytest.raises(StatisticsError, match=where):
        gradients(model, size)
    handle.remove()
    assert_untouched(model)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_with_a_weight_that_is_not_finite_is_named(layer):
    model = FAMILIES["llama"](0)
    with torch.no_grad():
        model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match=rf"model\.layers\.{layer}\..*calibration sequence 0"):
        gradients(model)


def test_a_program_gets_the_rows_by_batch_that_are_written(tmp_path):
    project = measured.write_project(FAMILIES["llama"](0), tmp_path)
    layout, settings = Layout(project / "artifacts"), load_params(project / "params.yaml")
    table = measure_gradients(layout, settings.compute, settings.gradients)
    written, meta = read_table(layout.gradients / "layers.parquet", "gradients")
    assert meta["sequences"] == measured.SEQUENCES
    assert table.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(table[name], values)
