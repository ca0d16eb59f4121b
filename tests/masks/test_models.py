"""From masks to structure: what is wholly masked goes, the outputs stay, and a plan comes back as it went out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import LlamaConfig, PreTrainedModel, Starcoder2Config

from libprune import masks
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.masks.export import plan_masks
from libprune.masks.extraction import LanguageExtraction, extraction
from libprune.masks.files import of_model
from tests.support.masked_models import DOWN, GATE, UP, K, O, Q, V, Zeros, removed, unstructured, zero
from tests.support.models import FAMILIES, FFN, heads, plan_of, random_plan, tiny_model, tokens


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def assert_outputs_stay(found: LanguageExtraction, model: PreTrainedModel) -> None:
    assert_same(logits(found.smaller()), logits(model))


CASES = [(family, "holes") for family in FAMILIES] + [(family, "uniform") for family in ("llama", "phi3", "gpt2")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_plan_as_masks_computes_what_the_plan_does_and_is_extracted_again(family, kind):
    model = FAMILIES[family](0)
    architecture, before = describe(model), {name: p.clone() for name, p in model.named_parameters()}
    plan = random_plan(architecture, kind)
    with masked(model, architecture, plan):
        expected = logits(model)
    masks.apply(model, plan)
    assert_same(logits(model), expected)
    found = masks.extract(model)
    assert removed(found.plan) == removed(plan)
    assert not found.decision.folds
    assert_same(under_plan(found, family) if kind == "holes" else logits(found.smaller()), expected)
    assert all(torch.equal(p, before[name.removesuffix("_orig")]) for name, p in model.named_parameters())


# Ways to mask a unit

WAYS = ("columns", "rows", "rows and biases", "some columns", "some rows", "not")
WHOLLY = ("columns", "rows", "rows and biases")


def cut(model: nn.Module, architecture: Architecture, plan: Plan, way: str) -> None:
    """Zero something of the units that a plan removes: of the consumers' columns, or of the producers' rows."""
    consumers = [consumer for block in architecture.blocks() for consumer in architecture.consumers(*block)]
    weights, biases = ({getattr(consumer, kind) for consumer in consumers} for kind in ("weight", "bias"))
    for name, mask in plan_masks(architecture, plan):
        column = name in weights
        if name in biases or column != way.endswith("columns") or (mask.ndim == 1 and way != "rows and biases"):
            continue
        if way.startswith("some"):
            mask |= torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        model.get_parameter(name).data *= mask


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_exactly_the_wholly_masked_units_go_in_whatever_ways_they_are_masked(family, seed):
    model, rng = FAMILIES[family](0), np.random.default_rng(seed)
    architecture = describe(model)
    ways = {block: rng.integers(len(WAYS), size=architecture.units(block[1])) for block in architecture.blocks()}
    for of_block in ways.values():
        of_block[0] = WAYS.index("not")  # a part without units is another matter
    for index, way in enumerate(WAYS[:-1]):
        cut(model, architecture, Plan({block: of_block != index for block, of_block in ways.items()}), way)
    found = extraction(of_model(model))
    gone = {b: np.flatnonzero(of_block < len(WHOLLY)).tolist() for b, of_block in ways.items()}
    assert removed(found.plan) == {block: units for block, units in gone.items() if units}
    assert_same(under_plan(found, family), logits(model))


def under_plan(found: LanguageExtraction, family: str) -> Tensor:
    """Logits of the dense shape with the folded weights under the plan, which slicing equals."""
    model = FAMILIES[family](0)
    model.load_state_dict(found.weights, strict=False)
    with masked(model, found.architecture, found.plan):
        return logits(model)


# Producers alone


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "bert"])
def test_constants_of_units_whose_producers_alone_are_zero_go_into_the_consumers_bias(family):
    model = FAMILIES[family](0)
    architecture = describe(model)
    plan = random_plan(architecture, "per_layer", seed=1)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert removed(found.plan) == removed(plan)
    assert set(found.decision.folds) <= {p.name for p in architecture.parameters}
    assert bool(found.decision.folds) == (family != "phi3")  # it has no biases
    assert_outputs_stay(found, model)


def test_a_constant_that_no_bias_can_hold_stays():
    model = FAMILIES["qwen2"](0)
    architecture = describe(model)
    plan = random_plan(architecture, "per_layer", seed=1)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert removed(found.plan) == {b: units for b, units in removed(plan).items() if b[1] == "mlp"}
    assert_outputs_stay(found, model)
    stuck = {(b.layer, b.part): b.staying for b in masks.inspect(model).blocks if b.staying}
    assert stuck == {b: units for b, units in removed(plan).items() if b[1] == "attention"}
    assert all("no bias to hold it" in found.decision.stays[block] for block in stuck)


def test_biases_are_added_where_the_config_can_say_them():
    make = tiny_model(Starcoder2Config, **FFN, **heads(36, 3, 2), use_bias=False, hidden_act="sigmoid")
    model = make(0)
    architecture = describe(model)
    plan = plan_of(architecture, lambda layer, part: 9 if part == "mlp" else 3)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert (removed(found.plan), found.shape) == (removed(plan), "uniform")
    assert found.decision.added == ("mlp",)
    assert_outputs_stay(found, model)
    assert found.smaller().config.use_bias
    kept, dense = (sum(p.numel() for p in one.parameters()) for one in (found.smaller(), model))
    assert masks.inspect(model).saved_parameters == dense - kept


# What counts as wholly masked: a Llama with biases everywhere, 3 groups of 2 query heads of size 8, 13 channels

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


def test_a_part_without_units_that_still_adds_its_bias_keeps_one_unit():
    model = FAMILIES["llama"](0)
    zero(model, {DOWN: slice(None)})
    found = masks.extract(model)
    assert removed(found.plan) == {(2, "mlp"): list(range(1, 13))}
    assert "one unit stays to carry its bias" in found.decision.stays[2, "mlp"]
    assert_outputs_stay(found, model)
    zero(model, {f"{DOWN}.bias": slice(None)})
    found = masks.extract(model)
    assert found.plan.gone(2, "mlp")
    assert_outputs_stay(found, model)


def test_units_that_a_norm_couples_go_all_or_none():
    model = FAMILIES["olmo2"](0)
    zero(model, {O: slice(0, 12)})
    zero(model, {UP: 3})
    found = masks.inspect(model)
    assert [b.staying for b in found.blocks if b.part == "attention"] == [[], [], [0], []]
    assert "self_attn.q_norm and self_attn.k_norm" in next(b.why for b in found.blocks if b.why)
    zero(model, {O: slice(None)})
    assert removed(masks.extract(model).plan) == {(2, "attention"): [0, 1, 2], (2, "mlp"): [3]}


def test_something_of_every_layer_stays_where_norms_of_the_stream_forbid_that_it_goes():
    model = FAMILIES["bert"](0)
    architecture = describe(model)
    gone = {block: np.full(len(keep), block[0] != 1) for block, keep in Plan.dense(architecture).keep.items()}
    masks.apply(model, Plan(gone))
    found = masks.extract(model)
    assert removed(found.plan) == {(1, "attention"): [0, 1, 2, 3], (1, "mlp"): list(range(1, 13))}
    assert_outputs_stay(found, model)


def test_layers_that_compute_nothing_at_all_are_refused():
    model = FAMILIES["llama"](0)
    masks.apply(model, Plan({block: np.zeros_like(k) for block, k in Plan.dense(describe(model)).keep.items()}))
    with pytest.raises(LibpruneError, match="none is left"):
        masks.extract(model)


# Masks that say nothing of structure


def test_scattered_zeros_are_told_and_not_extracted():
    model = FAMILIES["mistral"](0)
    unstructured(model)
    found = masks.inspect(model)
    assert found.removable == 0
    assert 0.24 < found.zeros < 0.26
    assert all(len(block.partly) == block.units for block in found.blocks)
    with pytest.raises(
        LibpruneError, match=r"no unit is wholly masked: 2\d\.\d % of the weights are zero, spread over"
    ):
        masks.extract(model)


def test_the_share_of_zeros_in_a_partly_masked_unit_is_counted_over_its_weights():
    model = FAMILIES["llama"](0)
    zero(model, {V: slice(8, 12), UP: 4})
    attention, mlp = (b for b in masks.inspect(model).blocks if b.layer == 2)
    assert attention.partly == {1: pytest.approx(4 / 48)}  # of 2·8 query, 8 key, 8 value rows and 2·8 columns
    assert mlp.partly == {4: pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.model.layers[0].mlp.up_proj.weight_mask.fill_(0.5), "mlp.up_proj.weight_mask holds values other"),
        (lambda m: m.model.layers[0].mlp.up_proj.weight_orig.data.fill_(torch.nan), "not finite"),
        (lambda m: prune.random_unstructured(m.lm_head, "weight", 0.5), "are one weight in this model"),
    ],
)
def test_masks_that_cannot_be_what_is_meant_are_named(change: Callable[[PreTrainedModel], object], message):
    model = FAMILIES["llama"](0)
    prune.random_structured(model.model.layers[0].mlp.up_proj, "weight", 0.5, dim=0)
    change(model)
    with pytest.raises(LibpruneError, match=message):
        masks.inspect(model)


def test_masks_of_what_no_unit_carries_are_multiplied_in_and_noted():
    model = FAMILIES["mistral"](0)
    prune.random_unstructured(model.lm_head, "weight", 0.5)
    zero(model, {DOWN: 4})
    found = masks.extract(model)
    assert masks.inspect(model).outside == ["lm_head.weight"]
    assert_outputs_stay(found, model)
