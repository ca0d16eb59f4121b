"""Which units send something that depends on the input, shown by weights and noise."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from libprune import masks
from libprune.engine.describe_module import describe_module
from libprune.engine.module_family import NetworkFamily
from libprune.masks.contributions import network_contributions
from tests.support.masked_models import DOWN, GATE, UP, K, O, Q, V, Zeros, logits, removed, under_plan, zero
from tests.support.models import FAMILIES, FFN, heads, tiny_model
from tests.support.predictions import assert_same

# A Llama with biases everywhere, 3 groups of 2 query heads of size 8, 13 channels

HEAD, QUERIES = slice(8, 16), slice(16, 32)


LOW = [row for head in (16, 24) for row in range(head, head + 3)]


REMOVABLE: dict[str, tuple[Zeros, str, list[int]]] = {
    "the consumer's columns": ({DOWN: 4}, "mlp", [4]),
    "the consumer's columns of a group": ({O: QUERIES}, "attention", [1]),
    "those of one of its two query heads": ({O: slice(16, 24)}, "attention", []),
    "rows of the values": ({V: HEAD}, "attention", [1]),
    "values and their bias": ({V: HEAD, f"{V}.bias": HEAD}, "attention", [1]),
    "all but one row of the values": ({V: slice(8, 15)}, "attention", []),
    "queries and keys": ({Q: QUERIES, K: HEAD, f"{Q}.bias": QUERIES, f"{K}.bias": HEAD}, "attention", []),
    "some columns, and the rows of the others": ({O: LOW, V: slice(11, 16)}, "attention", [1]),
    "too few columns, and some rows": ({O: LOW, V: slice(12, 16)}, "attention", []),
    "up and its bias": ({UP: 4, f"{UP}.bias": 4}, "mlp", [4]),
    "up alone": ({UP: 4}, "mlp", []),
    "gate and its bias": ({GATE: 4, f"{GATE}.bias": 4}, "mlp", [4]),
    "gate alone": ({GATE: 4}, "mlp", []),
    "gate and up": ({GATE: 4, UP: 4}, "mlp", [4]),
    "a bias alone": ({f"{UP}.bias": 4}, "mlp", []),
}


@pytest.mark.parametrize("name", REMOVABLE)
def test_a_unit_is_wholly_masked_if_nothing_of_it_depends_on_the_input(name):
    zeros, part, units = REMOVABLE[name]
    model = FAMILIES["llama"](0)
    zero(model, zeros)
    if not units:
        assert masks.inspect(model).removable == 0
        return
    found = masks.extract(model)
    assert removed(found.plan) == {(2, part): units}
    assert_same(under_plan(found, "llama"), logits(model))


RELU: dict[str, tuple[float, Zeros, list[int]]] = {
    "a channel that never wakes up on any text but could": (-1e6, {}, []),
    "a gate that its bias keeps shut": (-0.5, {GATE: 4}, [4]),
    "a gate that its bias keeps open": (0.5, {GATE: 4}, []),
}


@pytest.mark.parametrize("name", RELU)
def test_weights_and_not_a_run_say_that_a_channel_is_off(name):
    bias, zeros, units = RELU[name]
    model = tiny_model(LlamaConfig, **FFN, **heads(30, 3, 2, 8), mlp_bias=True, hidden_act="relu")(0)
    model.model.layers[2].mlp.gate_proj.bias.data[4] = bias
    zero(model, zeros)
    assert [b.removable for b in masks.inspect(model).blocks if (b.layer, b.part) == (2, "mlp")] == [units]


# Networks


class Stuck(nn.Module):
    """The second map has no bias to hold constants, so that they stay; what it makes of them is constant, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(("rows", "goes"), [([0, 1], False), ([0, 1, 2, 3], True)])
def test_an_output_that_reads_constants_alone_is_one(rows, goes):
    network = Stuck()
    network.first.weight.data[rows] = 0
    family = NetworkFamily(
        family="f", prunable=["h"], modules={"first": "a -> g", "second": "g -> h", "third": "h -> b"}
    )
    architecture = describe_module(network, family, torch.randn(2, 3))
    sent = network_contributions(network, architecture, [torch.randn(8, 3)], torch.Generator().manual_seed(0))[0, "h"]
    assert sent.still.tolist() == [goes] * 5
    assert not sent.silent.any()
    with torch.no_grad():
        expected = torch.tanh(network.second(torch.tanh(network.first.bias)))
    given = expected if goes else np.full(5, np.nan)
    np.testing.assert_allclose(sent.constants["third"], given, rtol=1e-6, atol=1e-7)  # of terms that may cancel
