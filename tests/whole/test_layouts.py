"""What the stages collect, on every layout of a block: fused maps, interleaved heads, [in, out] storage, and more."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import StatisticsError
from libprune.statistics.hessian import bare_parameters
from tests.support.collected import (
    LENGTH,
    N_TOK,
    SEQUENCES,
    activations,
    architecture,
    assert_close,
    assert_untouched,
    gradients,
    hessian,
    of_layers,
)
from tests.support.models import FAMILIES, LAYOUTS, MAMBA, tokens

__all__ = ["architecture"]

MODELS = {name: FAMILIES[name] for name in (*LAYOUTS, "qwen3_5")} | {"mamba": MAMBA}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param](0)


def of_blocks(model: PreTrainedModel, architecture: Architecture) -> dict[str, Tensor]:
    """The parameters inside the blocks, as those that take a gradient."""
    return {
        p.name: model.get_parameter(p.name).requires_grad_() for p in architecture.parameters if p.layer is not None
    }


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def consumers(architecture: Architecture) -> dict[tuple[int, str], Map]:
    """The one consumer of every block."""
    found = {block: architecture.consumers(*block) for block in architecture.blocks()}
    assert all(len(maps) == 1 for maps in found.values())
    return {block: maps[0] for block, maps in found.items()}


def assert_close_beside(found: Tensor, expected: Tensor, scale: float, rtol: float = 1e-4) -> None:
    """As `assert_close`, where the expected may be rounding beside a scale: a bias of the keys has no gradient."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=rtol * max(1e-3 * scale, float(expected.abs().max()))
    )


def test_gradients_are_those_of_autograd(model, architecture):
    found, parameters = of_layers(gradients(model)), of_blocks(model, architecture)
    expected = torch.autograd.grad(loss_of(model, tokens(SEQUENCES, LENGTH)), list(parameters.values()))
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for name, gradient in zip(parameters, expected, strict=True):
        assert_close_beside(found[name], gradient, scale)
    assert_untouched(model)


def test_the_fisher_diagonal_is_the_sum_of_squares_over_sequences(model, architecture):
    bare = bare_parameters(architecture)
    found, parameters = of_layers(hessian(model, 1 if bare else 2)), of_blocks(model, architecture)
    rows = [
        torch.autograd.grad(loss_of(model, row[None]), list(parameters.values())) for row in tokens(SEQUENCES, LENGTH)
    ]
    expected = {name: torch.stack(of_one).square().mean(0) for name, *of_one in zip(parameters, *rows, strict=True)}
    scale = max(float(value.max()) for value in expected.values())
    described = {f"{entry.module}.{kind}" for entry in architecture.maps for kind in ("weight", "bias")} | bare.keys()
    for name in described & expected.keys():
        assert_close_beside(found[name] / N_TOK, expected[name], scale)


@contextmanager
def masks(model: PreTrainedModel, architecture: Architecture) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Every consumer's input is multiplied by ones, one a unit, spread over the unit's positions."""
    ones, handles = {}, []
    for block, consumer in consumers(architecture).items():
        axis = architecture.parts[block[1]].axis
        ones[block] = torch.ones(architecture.units(block[1]), requires_grad=True)
        wide = ones[block][torch.from_numpy(consumer.input.units(axis, architecture.sizes))]
        if path := architecture.parts[block[1]].norm:
            norm = model.get_submodule(f"{architecture.layers_path}.{block[0]}.{path}")
            groups = (architecture.parts[block[1]].groups, -1)
            handles.append(norm.register_forward_hook(partial(masked_norm, wide, groups)))
            continue
        module = model.get_submodule(consumer.module)
        handles.append(module.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide, *args[1:])))
    try:
        yield ones
    finally:
        for handle in handles:
            handle.remove()


def masked_norm(
    mask: Tensor, groups: tuple[int, int], norm: nn.Module, args: tuple[Tensor, Tensor], _: Tensor
) -> Tensor:
    """The output of a norm of x times silu(gate), whose means are over what the mask keeps of each group."""
    x = args[0] * nn.functional.silu(args[1])
    left = (mask * x.square()).unflatten(-1, groups).sum(-1) / mask.unflatten(-1, groups).sum(-1)
    divisor = (left + norm.variance_epsilon).sqrt().repeat_interleave(x.shape[-1] // groups[0], -1)
    return norm.weight * mask * x / divisor


def test_mask_gradients_are_those_of_explicit_masks(model, architecture):
    sums, rows = gradients(model), []
    for row in tokens(SEQUENCES, LENGTH):
        with masks(model, architecture) as ones:
            rows.append(torch.autograd.grad(loss_of(model, row[None]), list(ones.values())))
    for number, (layer, part) in enumerate(architecture.blocks()):
        expected = torch.stack([row[number] for row in rows]).double()
        found = sums.finish(layer)
        assert_close(found[f"units.{part}.mask_gradient"], expected.mean(0))
        assert_close(found[f"units.{part}.unit_fisher_sequence"], 0.5 * N_TOK * expected.square().mean(0))


def test_gram_matrices_are_those_of_the_consumers_inputs(model, architecture):
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(consumer.module).register_forward_pre_hook(
            lambda _, args, name=consumer.module: seen.update({name: args[0].detach().flatten(0, -2)})
        )
        for consumer in consumers(architecture).values()
    ]
    with torch.no_grad():
        model(tokens(SEQUENCES, LENGTH), use_cache=False)
    for handle in handles:
        handle.remove()
    found = of_layers(activations(model))
    assert len(seen) == len(list(architecture.blocks()))
    for name, x in seen.items():
        assert_close(found[f"{name}.input_gram"], x.T @ x / len(x))


@pytest.mark.parametrize("collect", [activations, gradients])
@pytest.mark.parametrize("row", [0, 3])
def test_a_value_that_is_not_finite_is_laid_to_its_sequence_where_tokens_are_joined(collect, row):
    model = FAMILIES["opt"](0)
    of_row = torch.arange(SEQUENCES * LENGTH)[:, None] // LENGTH == row
    model.model.decoder.layers[1].fc1.register_forward_hook(lambda *call: call[2].masked_fill(of_row, torch.inf))
    message = rf"the input of model\.decoder\.layers\.1\.fc2 is not finite for calibration sequence {row};"
    with pytest.raises(StatisticsError, match=message):
        collect(model, size=SEQUENCES)
