"""Samples of a network: cut in their order, and their losses one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from libprune.engine.errors import LibpruneError
from libprune.models.samples import Samples, cross_entropy, digest, loss_signature
from libprune.models.sequences import NO_TARGET


@given(st.integers(1, 20), st.integers(1, 25))
def test_passes_hold_every_sample_once_in_order(number, at_once):
    samples = Samples(torch.arange(number)[:, None], torch.arange(number))
    passes = list(samples.passes(at_once))
    assert [len(one) for one in passes[:-1]] == [at_once] * (len(passes) - 1)
    assert 1 <= len(passes[-1]) <= at_once
    assert torch.cat([one.inputs[:, 0] for one in passes]).tolist() == list(range(number))
    assert torch.cat([one.targets for one in passes]).tolist() == list(range(number))


def test_chosen_samples_and_those_on_a_device_keep_their_loss():
    def loss(outputs, targets):
        return outputs.sum(1)

    samples = Samples(torch.rand(4, 2), torch.arange(4), loss)
    for some in (samples[torch.tensor([2, 0])], samples[1:3], samples.to(torch.device("cpu"))):
        assert some.loss is loss
    assert samples[torch.tensor([2, 0])].targets.tolist() == [2, 0]


@pytest.mark.parametrize("shape", [(5,), (5, 4)])
def test_cross_entropy_is_the_mean_over_a_samples_own_targets(shape):
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(*shape, 3, generator=generator), torch.randint(3, shape, generator=generator)
    if len(shape) == 2:
        targets[:, 1] = NO_TARGET
    expected = [
        nn.functional.cross_entropy(o.view(-1, 3), t.view(-1), ignore_index=NO_TARGET)
        for o, t in zip(outputs, targets, strict=True)
    ]
    torch.testing.assert_close(cross_entropy(outputs, targets), torch.stack(expected))
    assert cross_entropy(outputs.bfloat16(), targets).dtype == torch.float32
    assert cross_entropy(outputs.double(), targets).dtype == torch.float64
    assert Samples(outputs, targets).counted == (1 if len(shape) == 1 else 3)


def test_losses_that_are_not_one_number_a_sample_are_refused():
    samples = Samples(torch.rand(4, 2), torch.arange(4) % 3, nn.functional.cross_entropy)
    with pytest.raises(LibpruneError, match=r"the loss of 4 samples has shape \[\]; it must give one number a sample"):
        samples.losses(nn.Linear(2, 3))


@pytest.mark.parametrize(("inputs", "targets"), [(3, 2), (0, 0)])
def test_a_sample_needs_an_input_and_a_target(inputs, targets):
    with pytest.raises(LibpruneError, match=f"there are {inputs} inputs and {targets} targets"):
        Samples(torch.zeros(inputs, 2), torch.zeros(targets))


# Digests

X = torch.arange(6.0).view(2, 3)


def test_every_value_type_shape_name_and_letter_changes_the_digest():
    changed = X.clone()
    changed[1, 2] = changed[1, 2].nextafter(torch.tensor(9.0))
    others = [
        ([("x", changed)], "text"),
        ([("x", X.double())], "text"),
        ([("x", X.view(3, 2))], "text"),
        ([("y", X)], "text"),
        ([("x", X), ("y", X)], "text"),
        ([("y", X), ("x", X)], "text"),
        ([], "text"),
        ([("x", X)], "texts"),
    ]
    digests = [digest([("x", X)], "text"), *(digest(*other) for other in others)]
    assert len(set(digests)) == len(digests)


def test_how_a_tensor_lies_in_memory_does_not_change_the_digest():
    apart = X.T.contiguous().T
    assert not apart.is_contiguous()
    parameter = nn.Parameter(X)
    assert digest([("x", X)], "") == digest([("x", apart)], "") == digest([("x", parameter)], "")


def test_a_tensor_without_dimensions_has_a_digest():
    assert digest([("x", torch.tensor(1))], "") != digest([("x", torch.tensor(2))], "")


def test_loss_functions_are_named_by_their_values():
    network, targets = nn.Linear(3, 2), torch.tensor([0, 1])

    def doubled(outputs, wanted):
        return 2 * nn.functional.cross_entropy(outputs, wanted, reduction="none")

    plain = loss_signature(Samples(X, targets), network)
    assert plain == loss_signature(Samples(X, targets), network)
    assert len(plain.split()) == len(X)
    assert plain != loss_signature(Samples(X, targets, doubled), network)
    assert network.weight.grad is None
