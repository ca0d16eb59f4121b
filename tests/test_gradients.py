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

from libprune.architecture import Architecture
from libprune.describe import describe
from libprune.errors import StatisticsError
from libprune.gradients import GradientSums, collect_gradients, gradient_columns
from tests.models import FAMILIES, VOCAB, tokens
from tests.test_units import conv1d_stored

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


@pytest.fixture(scope="module")
def sums(model, architecture) -> GradientSums:
    return collect_gradients(model, architecture, batches(2))


def batches(size: int, ids: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    ids = tokens(SEQUENCES, LENGTH) if ids is None else ids
    return ((first, ids[first : first + size]) for first in range(0, len(ids), size))


def transformers_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean over sequences and tokens, as transformers computes it."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def block_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: p.requires_grad_() for name, p in model.named_parameters() if name.startswith("model.layers.")}


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal up to float32 rounding: relative to the largest value, below which cancellation is noise."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


# The mean gradient


def test_it_is_the_gradient_of_the_mean_loss_of_all_sequences(model, sums):
    parameters = block_parameters(model)
    loss = transformers_loss(model, tokens(SEQUENCES, LENGTH))
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert sums.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(sums.mean_gradient(name), gradient)
    assert sums.loss / sums.sequences == pytest.approx(loss.item(), rel=1e-6)
    assert (sums.sequences, sums.tokens) == (SEQUENCES, SEQUENCES * LENGTH)


@pytest.mark.parametrize("size", [1, SEQUENCES, 3 * SEQUENCES])
def test_the_batch_size_changes_nothing(model, architecture, sums, size):
    other = collect_gradients(model, architecture, batches(size))
    for name, gradient in sums.gradients.items():
        assert_close(other.gradients[name], gradient)
    for block in architecture.blocks():
        assert_close(other.by_sequence[block], sums.by_sequence[block])
        assert_close(other.by_token[block], sums.by_token[block])
    assert other.loss == pytest.approx(sums.loss, rel=1e-6)


def test_low_precision_gradients_are_summed_in_float32():
    model = FAMILIES["llama"](0).to(torch.bfloat16)
    ids = tokens(1, LENGTH)
    once, thrice = (collect_gradients(model, describe(model), [(0, ids)] * times) for times in (1, 3))
    for name, gradient in once.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(thrice.gradients[name], gradient + gradient + gradient)


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


def test_unit_fisher_by_sequence_is_half_n_tok_times_the_mean_square(model, architecture, sums):
    for block, gradient in mask_gradients(model, architecture, tokens_too=False).items():
        expected = 0.5 * N_TOK * gradient.square().mean((0, 1))
        assert_close(sums.unit_fisher(block, N_TOK, "sequence"), expected)


def test_unit_fisher_by_token_is_half_the_mean_square_over_tokens_of_the_summed_loss(model, architecture, sums):
    for block, gradient in mask_gradients(model, architecture, tokens_too=True).items():
        expected = 0.5 * (N_TOK * gradient).square().mean((0, 1))
        assert_close(sums.unit_fisher(block, N_TOK, "token"), expected)


def test_for_a_single_counted_token_the_two_differ_by_the_number_of_inputs_alone(architecture, model):
    """With two tokens only the first is counted and only its input has a gradient; the token mean is over both."""
    found = collect_gradients(model, architecture, batches(2, tokens(SEQUENCES, 2)))
    for block in architecture.blocks():
        assert_close(2 * found.unit_fisher(block, 1, "token"), found.unit_fisher(block, 1, "sequence"))


# Columns


def test_the_columns_are_sums_over_the_elements_of_a_unit(model, architecture, sums):
    weights = dict(model.named_parameters())
    for layer, part in architecture.blocks():
        columns = gradient_columns(sums, architecture, weights, N_TOK, layer, part)
        absolute, signed = np.zeros(architecture.units(part)), np.zeros(architecture.units(part))
        for parameter, dim, units in architecture.carriers(layer, part):
            terms = (weights[parameter.name].detach() * sums.mean_gradient(parameter.name)).double().movedim(dim, 0)
            for position, unit in enumerate(units):
                absolute[unit] += float(terms[position].abs().sum())
                signed[unit] += float(terms[position].sum())
        np.testing.assert_allclose(columns["taylor"], absolute, rtol=1e-5)
        np.testing.assert_allclose(columns["taylor_signed"], signed, atol=1e-5 * absolute.max())
        for over in ("sequence", "token"):
            expected = sums.unit_fisher((layer, part), N_TOK, over)
            np.testing.assert_array_equal(columns[f"unit_fisher_{over}"], expected)


# What it leaves behind


def assert_untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.grad is None


def test_only_block_parameters_have_a_gradient_and_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sums = collect_gradients(model, describe(model), batches(2))
    assert set(sums.gradients) == {name for name in before if name.startswith("model.layers.")}
    assert_untouched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_can_be_trained_as_before():
    model = FAMILIES["llama"](0)
    collect_gradients(model, describe(model), batches(2))
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is not finite


def poisoned_tokens(row: int) -> Tensor:
    """Sequences of which one alone holds the last token of the vocabulary."""
    ids = tokens(SEQUENCES, LENGTH).clamp(max=VOCAB - 2)
    ids[row, 3] = VOCAB - 1
    return ids


@settings(max_examples=10)
@given(st.integers(0, SEQUENCES - 1), st.integers(1, SEQUENCES))
def test_the_sequence_whose_loss_is_not_finite_is_named(row, size):
    model = FAMILIES["llama_mha"](0)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = torch.nan
    with pytest.raises(StatisticsError, match=rf"not finite for calibration sequence {row};.*compute\.dtype: float32"):
        collect_gradients(model, describe(model), batches(size, poisoned_tokens(row)))
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
    where = re.escape(f"the gradient at the input of {faulty} is not finite for calibration sequence {row};")
    with pytest.raises(StatisticsError, match=where):
        collect_gradients(model, describe(model), batches(size))
    handle.remove()
    assert_untouched(model)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_with_a_weight_that_is_not_finite_is_named(layer):
    model = FAMILIES["llama"](0)
    with torch.no_grad():
        model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match=rf"model\.layers\.{layer}\..*calibration sequence 0"):
        collect_gradients(model, describe(model), batches(2))
