"""Digests of networks and samples: what changes them, and what does not."""

import torch
from torch import nn

from libprune.models.identity import digest, loss_signature
from libprune.models.samples import Samples

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
