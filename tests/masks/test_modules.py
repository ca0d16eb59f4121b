"""Masks of networks that are not transformers: what sends nothing goes, outputs stay, and whoever stays is told why."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from libprune import masks
from libprune.engine.architecture import Architecture
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked as under_plan
from libprune.masks.files import of_model
from libprune.masks.inspection import inspection
from libprune.masks.modules import network_extraction
from libprune.networks import Network, Samples, load
from libprune.pipeline.sections import Allocate, Score
from tests.support.masked_networks import (
    DEPTHWISE,
    NETS,
    Depthwise,
    built,
    computed,
    family,
    randomly_cut,
    removed,
    zero,
)
from tests.support.predictions import assert_same

# The oracle: a unit can go if the outputs stay without it, for one constant in its place, and so can the next one then


def without(network: nn.Module, architecture: Architecture, part: str, unit: int, x: Tensor) -> nn.Module:
    """A copy in which what a unit first sends is added to biases where there are any, and the unit's columns go."""
    smaller = copy.deepcopy(network)
    for consumer in architecture.consumers(0, part):
        taken: list[Tensor] = []
        module = smaller.get_submodule(consumer.module)
        handle = network.get_submodule(consumer.module).register_forward_pre_hook(
            lambda _, args, taken=taken: taken.append(args[0])
        )
        computed(network, x)
        handle.remove()
        feature = consumer.input.units(part, architecture.sizes)[:: consumer.kernel] == unit
        first = taken[0][0].flatten(1)[:, 0] if module.weight.ndim > 2 else taken[0][0]
        with torch.no_grad():
            whole = module.weight.flatten(2).sum(2) if module.weight.ndim > 2 else module.weight
            if module.bias is not None:
                module.bias += whole[:, feature] @ first[feature]
            module.weight[:, feature] = 0
    return smaller


def can_go(network: nn.Module, architecture: Architecture, inputs: list[Tensor]) -> dict[str, list[int]]:
    """The units of each part that go one after another until none is left without which the outputs stay."""
    expected = [computed(network, x) for x in inputs]
    units = [(part, unit) for _, part in architecture.blocks() for unit in range(architecture.units(part))]
    gone, before = set(), None
    while gone != before:
        before = set(gone)
        for part, unit in units:
            if (part, unit) not in gone:
                smaller = without(network, architecture, part, unit, inputs[0])
                outputs = [computed(smaller, x) for x in inputs]
                if all(torch.allclose(y, z, rtol=0, atol=1e-9) for y, z in zip(outputs, expected, strict=True)):
                    network = smaller
                    gone.add((part, unit))
    return {part: sorted(unit for other, unit in gone if other == part) for part in architecture.parts}


def inputs_of(name: str) -> list[Tensor]:
    """Of all shapes and several sizes."""
    shapes = NETS[name][2]
    return [scale * torch.randn(8, *shape, dtype=torch.float64) for shape in shapes for scale in (0.3, 3.0)]


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_exactly_the_units_go_without_which_the_outputs_stay(name, seed):
    network, described, _ = built(name, [nn.Tanh(), nn.Sigmoid()][seed % 2], seed)
    inputs = inputs_of(name)
    architecture = describe_module(network.double(), described, inputs[0])
    randomly_cut(network, architecture, seed)
    expected = can_go(of_model(network, language=False).model, architecture, inputs)
    for part, units in expected.items():
        if len(units) == architecture.units(part):
            units.remove(0)
    plan = network_extraction(of_model(network, language=False), described, inputs[0]).plan
    assert removed(plan) == {part: units for part, units in expected.items() if units}


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_outputs_stay_and_the_given_network_too(name, seed):
    network, described, x = built(name, nn.ReLU(), seed)
    randomly_cut(network, describe_module(network, described, x), seed)
    before = copy.deepcopy(network.state_dict())
    found = network_extraction(of_model(network, language=False), described, x)
    for shape in NETS[name][2]:
        other = torch.randn(5, *shape)
        assert_same(computed(found.network, other), computed(network, other))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    dense, left = (sum(p.numel() for p in one.parameters()) for one in (network, found.network))
    assert inspection(found).saved_parameters == dense - left
    assert found.proof["difference"] <= 1e-5 * found.proof["scale"]
    assert found.proof["noise_difference"] <= 1e-5 * found.proof["noise_scale"]


@pytest.mark.parametrize("name", NETS)
def test_a_plan_as_masks_computes_what_the_plan_does_and_is_extracted_again(name, tmp_path):
    network, described, x = built(name, nn.ReLU())
    architecture = describe_module(network, described, x)
    rng = np.random.default_rng(1)
    keep = {block: rng.permutation(architecture.units(block[1])) > 1 for block in architecture.blocks()}
    plan = Plan(keep)
    with under_plan(network, architecture, plan):
        expected = computed(network, x)
    masks.apply(network, described, plan)
    assert_same(computed(network, x), expected)
    found = masks.extract(network, described, x)
    assert found.plan.digest == plan.digest
    assert not found.decision.folds
    found.save(tmp_path / "out")
    assert_same(computed(load(tmp_path / "out", built(name, nn.ReLU(), 1)[0]), x), expected)


# Constants, and what can hold them


class Two(nn.Module):
    """Two convolutions with a batch norm and an activation between."""

    def __init__(self, **second: object) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()
        self.second = nn.Conv2d(4, 3, 3, **second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.first(x))))


TWO = family(["c"], first="pixel -> c", norm="c", second="c -> out")
X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
HOLDS: dict[str, tuple[dict[str, object], str]] = {
    "a bias": ({}, ""),
    "a bias behind padding of what is there": ({"padding": 1, "padding_mode": "reflect"}, ""),
    "no bias": ({"bias": False}, "they send a constant to second, which has no bias to hold it"),
    "a bias behind zero padding": ({"padding": 1}, "they send a constant to second, whose zero padding"),
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_constant_behind_norm_and_activation_goes_into_the_next_bias_or_stays_with_a_reason(name):
    second, why = HOLDS[name]
    network = Two(**second).eval()
    zero(network, "first.weight", 0, [1, 2])
    zero(network, "second.weight", 1, [2])
    (seen,) = masks.inspect(network, TWO, X).blocks
    assert (seen.removable, seen.folded, seen.staying) == (([2], [], [1]) if why else ([1, 2], [1], []))
    assert why in seen.why
    assert_same(computed(masks.extract(network, TWO, X).network, X), computed(network, X))


class SharedBias(Two):
    """Another map adds the same bias once more."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(1, 3, 3)
        self.other.bias = self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x)


def test_a_bias_that_two_maps_share_holds_no_constant_of_one():
    network, described = SharedBias(), family(["c"], **TWO.modules, other="pixel -> out")
    zero(network, "first.weight", 0, [1])
    (seen,) = masks.inspect(network, described, X).blocks
    assert (seen.removable, seen.staying) == ([], [1])
    assert "whose bias is that of another module" in seen.why


def test_of_a_residual_axis_a_unit_goes_only_if_every_producer_has_lost_it():
    network, described, x = built("residual", nn.ReLU())
    zero(network, "stem.weight", 0, [1])
    zero(network, "norm.bias", 0, [1])
    zero(network, "norm.weight", 0, [1])
    zero(network, "norm_b.bias", 0, [1])
    assert masks.inspect(network, described, x).removable == 0
    zero(network, "norm_b.weight", 0, [1])
    assert removed(masks.extract(network, described, x).plan) == {"s": [1]}


RECURRENT_ZEROS: dict[str, tuple[dict[str, list[int]], str]] = {
    "all rows, biases left": ({"x2h.weight": [2, 7, 12, 17], "h2h.weight": [2, 7, 12, 17]}, "stays"),
    "and the recurrent map does not read it": (
        {"x2h.weight": [2, 7, 12, 17], "h2h.weight": [2, 7, 12, 17], "h2h columns": [2]},
        "stays",
    ),
    "the cell's rows and biases": (
        {"x2h.weight": [12], "h2h.weight": [12], "x2h.bias": [12], "h2h.bias": [12]},
        "goes",
    ),
    "one of the two maps into the cell": ({"x2h.weight": [12], "x2h.bias": [12]}, "partly"),
}


@pytest.mark.parametrize("name", RECURRENT_ZEROS)
def test_a_recurrent_unit_goes_if_nothing_enters_its_cell_and_stays_where_biases_let_it_drift(name):
    zeros, becomes = RECURRENT_ZEROS[name]
    network, described, x = built("recurrent", nn.Identity())
    for where, positions in zeros.items():
        zero(network, where.replace(" columns", ".weight"), int("columns" in where), positions)
    (seen,) = masks.inspect(network, described, x).blocks
    assert seen.removable == [2] * (becomes == "goes")
    assert seen.staying == [2] * (becomes == "stays")
    assert ("changes with time" in seen.why) == (becomes == "stays")
    assert (2 in seen.partly) == (becomes == "partly")


class Pooled(Depthwise):
    """A zero-padded depthwise convolution whose border is seen in a mean alone."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.project(self.deep(self.norm(self.expand(x))).mean(2, keepdim=True)).flatten(1))


def test_what_zero_padding_makes_of_a_constant_shows_in_inputs_of_other_sizes():
    network = Pooled().eval()
    zero(network, "expand.weight", 0, [1])
    (seen, _) = masks.inspect(network, DEPTHWISE, torch.randn(4, 2, 7)).blocks
    assert (seen.removable, seen.staying) == ([], [1])
    assert "the input's size" in seen.why


# What masked units read and feed


def test_what_only_masked_units_read_or_feed_goes_with_them():
    network, described, x = built("lenet", nn.Sigmoid())
    zero(network, "conv2.weight", 0, [0, 1, 2])
    zero(network, "fc1.weight", 1, range(12))
    zero(network, "conv2.weight", 1, [0, 1])
    zero(network, "fc2.weight", 1, [0, 1, 2])
    zero(network, "fc1.weight", 0, [3])
    entries = torch.ones(6, 16)
    entries[4] = 0
    entries[4, :4] = 1
    prune.custom_from_mask(network.fc1, "weight", entries)
    found = masks.extract(network, described, x)
    assert removed(found.plan) == {"c1": [0, 1], "c2": [0, 1, 2], "f": [0, 1, 2, 3, 4]}
    assert_same(computed(found.network, x), computed(network, x))


def test_an_axis_of_which_all_could_go_keeps_one_unit_of_zeros():
    network, described, x = built("lenet", nn.Sigmoid())
    zero(network, "fc2.weight", 1, range(6))
    found = masks.extract(network, described, x)
    assert removed(found.plan) == {"c1": [1, 2, 3], "c2": [1, 2, 3], "f": [1, 2, 3, 4, 5]}
    assert found.network.fc1.weight.tolist() == [[0.0] * 4]
    assert all("so one unit stays" in block.why for block in masks.inspect(network, described, x).blocks)
    assert_same(computed(found.network, x), computed(network, x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.table(ids)).mean(1))


def test_an_embedding_is_zero_for_all_ids_or_its_unit_stays():
    network, described = Words(), family(["e"], table="vocab -> e", head="e -> classes")
    ids = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(0))
    network.table.weight.data[:4, 1] = 0
    assert masks.inspect(network, described, ids).removable == 0
    network.table.weight.data[:, 1] = 0
    assert removed(masks.extract(network, described, ids).plan) == {"e": [1]}


# Precision, faults


def test_a_network_in_bfloat16_is_told_in_float32_and_comes_back_as_it_was():
    network, described, x = built("lenet", nn.ReLU())
    zero(network.bfloat16(), "conv1.weight", 0, [1])
    zero(network, "conv1.bias", 0, [1])
    found = masks.extract(network, described, x.bfloat16())
    assert {tensor.dtype for tensor in found.network.parameters()} == {torch.bfloat16}
    assert torch.equal(found.network.conv1.weight, network.conv1.weight[[0, 2, 3]])
    assert masks.inspect(network, described, x).saved_bytes == 2 * (9 + 1 + 36)


def test_a_unit_that_only_a_large_input_wakes_is_not_masked():
    class Distant(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(torch.relu(self.one(x) - 200))

    network = Distant().eval()
    zero(network, "one.weight", 0, [0])
    described = family(["h"], one="a -> h", two="h -> b")
    assert masks.inspect(network, described, torch.randn(8, 3)).blocks[0].removable == [0]


def test_masks_pass_neurons_that_return_their_state_too():
    class Neuron(nn.Module):
        def __init__(self):
            super().__init__()
            self.leak = nn.Parameter(torch.rand(4))

        def forward(self, x, state):
            state = self.leak * state + x
            return torch.tanh(state), state

    class Spiking(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.neuron, self.two = nn.Linear(3, 4), Neuron(), nn.Linear(4, 2)

        def forward(self, x):
            y, state = self.neuron(self.one(x), 0)
            return self.two(y) + self.two(self.neuron(self.one(x), state)[0])

    network = Spiking().eval()
    for name in ("one.weight", "one.bias"):
        zero(network, name, 0, [2])
    described = family(["h"], one="a -> h", neuron="h", two="h -> b")
    assert masks.extract(network, described, torch.randn(8, 3)).plan.keep[0, "h"].tolist() == [True, True, False, True]


def test_scattered_zeros_are_told_and_not_extracted():
    network, described, x = built("residual", nn.ReLU())
    for module in (network.a, network.b):
        prune.random_unstructured(module, "weight", 0.25)
    seen = masks.inspect(network, described, x)
    assert seen.removable == 0
    assert all(len(block.partly) == block.units for block in seen.blocks)
    with pytest.raises(LibpruneError, match=r"no unit is wholly masked: \d+\.\d % of the weights are zero"):
        masks.extract(network, described, x)


def test_a_buffer_that_is_called_a_mask_is_none():
    network, described, x = built("lenet", nn.ReLU())
    network.register_buffer("causal_mask", torch.full((2,), 0.5))
    zero(network, "fc2.weight", 1, [1])
    found = masks.extract(network, described, x)
    assert found.network.causal_mask.tolist() == [0.5, 0.5]
    assert removed(found.plan) == {"f": [1]}


class Features(nn.Module):
    """Returns what it hands on, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.cat([h, self.b(h)], 1)


class Pair(Features):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(self.a(x))


class Reshaped(Features):
    """Knows a width by heart."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 4))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Features(), "outputs have shape .* an axis of its outputs is prunable"),
        (Pair(), "returns a tuple, not a tensor"),
        (Reshaped(), "the sliced network does not run"),
    ],
)
def test_a_network_that_cannot_be_compared_is_refused(network, message):
    zero(network, "b.weight", 1, [1])
    with pytest.raises(LibpruneError, match=message):
        masks.extract(network, family(["h"], a="x -> h", b="h -> y"), torch.randn(6, 3))


def test_without_a_sample_nothing_is_compared():
    with pytest.raises(LibpruneError, match="hold no sample; give some"):
        masks.inspect(Features(), family(["h"], a="x -> h", b="h -> y"), torch.zeros(0, 3))


def test_masks_that_cannot_be_what_is_meant_are_named():
    network = Features()
    network.b.weight = nn.Parameter(torch.randn(4, 4))
    network.b.bias, network.a = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)
    network.a.weight = network.b.weight
    described = family(["h"], a="h -> h", b="h -> h")
    zero(network, "b.weight", 1, [1])
    with pytest.raises(LibpruneError, match="are one weight in this model"):
        masks.inspect(network, described, torch.randn(6, 4))
    network = Features()
    zero(network, "b.weight", 1, [1])
    network.b.weight_mask.fill_(0.5)
    with pytest.raises(LibpruneError, match=r"b\.weight_mask holds values other than 0 and 1"):
        masks.inspect(network, described, torch.randn(6, 3))


def test_a_plan_of_another_network_or_without_a_unit_is_not_applied():
    network, described = built("lenet", nn.ReLU())[:2]
    keep = {(0, "c1"): np.ones(4, bool), (0, "c2"): np.ones(4, bool), (0, "f"): np.ones(6, bool)}
    with pytest.raises(LibpruneError, match="of units c1 4, c2 4, f 5, but the network has c1 4, c2 4, f 6"):
        masks.apply(network, described, Plan(keep | {(0, "f"): np.ones(5, bool)}))
    with pytest.raises(LibpruneError, match="leaves no unit of f"):
        masks.apply(network, described, Plan(keep | {(0, "f"): np.zeros(6, bool)}))


def test_a_network_with_batch_norms_is_named_by_its_weights_and_pruned(tmp_path):
    network, described, x = built("residual", nn.ReLU())
    whole = Network(network, described, Samples(x, torch.zeros(len(x), dtype=torch.int64)), tmp_path / "work")
    plan = whole.plan(Score(criterion="magnitude"), Allocate(ratio=0.3))
    assert whole.prune(plan, "none").parameters < whole.architecture.total_parameters
