"""Training the layers of a pruned model, against its own definition and the repair that it begins with."""

import numpy as np
import pytest
import torch
from torch import nn

from libprune.repair.blocks import Epochs, Trained, train_layer
from tests.support.models import FAMILIES, LAYOUTS

MODELS = {name: FAMILIES[name] for name in LAYOUTS}
FEW = Epochs(2, 1e-3)


def linear(epochs: Epochs, dtype: torch.dtype = torch.float32, noise: float = 0.0) -> tuple[Trained, nn.Linear]:
    """A linear map that is trained to another one; `noise` is added to what the batches of the fit are to give."""
    generator = torch.Generator().manual_seed(0)
    meant, found = (0.3 * torch.randn(5, 5, generator=generator) for _ in range(2))
    inputs = torch.randn(16, 4, 6, 5, generator=generator)
    held_out = [number % 8 == 7 for number in range(16)]
    targets = [
        x @ meant.T + (0.0 if out else noise) * torch.randn(x.shape, generator=generator)
        for x, out in zip(inputs, held_out, strict=True)
    ]
    module = nn.Linear(5, 5, bias=False, dtype=dtype)
    module.weight.data.copy_(found)
    trained = train_layer(
        lambda number: module(inputs[number].to(dtype)), targets, held_out, {"weight": module.weight}, epochs
    )
    return trained, module


def test_a_linear_map_learns_what_it_is_to_give():
    trained, module = linear(Epochs(60, 2e-2))
    assert trained.after < 1e-3 * trained.before
    torch.testing.assert_close(module.weight.detach(), trained.tensors["weight"])


def test_steps_below_the_resolution_of_bfloat16_add_up():
    """A step of 1e-5 is below half of the distance of two numbers near 0.3."""
    trained, module = linear(Epochs(200, 1e-5), torch.bfloat16)
    assert trained.after < trained.before
    assert trained.tensors["weight"].dtype == torch.float32
    assert torch.equal(module.weight.detach(), trained.tensors["weight"].bfloat16())


def test_where_no_epoch_is_better_on_held_out_text_nothing_changes():
    trained, module = linear(Epochs(3, 1.0), noise=50.0)
    assert trained.tensors == {}
    assert trained.after == trained.before
    expected = linear(Epochs(1, 1e-9))[1].weight.detach()
    torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=1e-6)


def test_epochs_that_are_worse_are_waited_out_as_often_as_asked_for():
    """The first steps are too long; the training ends there, or goes on until the steps are shorter."""
    (ended, _), (waited, _) = (linear(Epochs(40, 10.0, patience)) for patience in (1, 40))
    assert ended.after == ended.before
    assert waited.after < 0.1 * waited.before


def test_the_error_is_that_of_the_definition():
    """Against numpy: tokens that are longer than the median count as if they had its length."""
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=(2, 3, 4)) * rng.choice([1.0, 300.0], size=(2, 3, 1)) for _ in range(2)]
    given = [target + rng.normal(size=target.shape) for target in targets]
    parameter = nn.Parameter(torch.zeros(1))
    trained = train_layer(
        lambda number: torch.from_numpy(given[number]).float() + 0 * parameter,
        [torch.from_numpy(target).float() for target in targets],
        [True, False],
        {"none": parameter},
        Epochs(1, 1e-3),
    )
    lengths = [np.linalg.norm(target, axis=-1) for target in targets]
    middle = np.sort(np.concatenate([length.ravel() for length in lengths]))[5]  # torch takes the lower of two
    weight = np.minimum(1, middle / lengths[0]) ** 2
    missed = (weight * np.square(given[0] - targets[0]).sum(-1)).sum() / (weight * lengths[0] ** 2).sum()
    assert trained.before == pytest.approx(missed, rel=1e-4)
