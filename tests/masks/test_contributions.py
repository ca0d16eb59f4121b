"""Which units send something that depends on the input, shown by weights and noise."""

import pytest
from transformers import LlamaConfig

from libprune import masks
from tests.support.masked_models import (
    DOWN,
    GATE,
    UP,
    K,
    O,
    Q,
    V,
    Zeros,
    assert_same,
    logits,
    removed,
    under_plan,
    zero,
)
from tests.support.models import FAMILIES, FFN, heads, tiny_model

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
