"""Masking and slicing on tensors whose entries say where they belong, and on weights zeroed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libprune.engine.architecture import Architecture, Map, Parameter, PartShape
from libprune.engine.axes import LinearMap, parse_expr, parse_map
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, slice_state
from tests.support.models import FAMILIES, tiny_exposed, tokens
from tests.support.shapes import plan_without

# An attention of 3 heads of size 2 over a residual stream of 4, in the layouts of several families.
SIZES = {"model": 4, "kv": 3, "q": 2, "d": 2}


def attention(modules: dict[str, str], transposed: bool = False, layers: int = 1) -> Architecture:
    """An architecture of attention parts alone; every map has a bias."""
    parameters, maps = [], []
    for layer in range(layers):
        for name, text in modules.items():
            path, linear = f"h.{layer}.{name}", parse_map(text)
            if isinstance(linear, LinearMap):
                maps.append(Map(path, layer, "attention", linear.input, linear.output, transposed))
                dims = (linear.input, linear.output) if transposed else (linear.output, linear.input)
                parameters.append(Parameter(f"{path}.bias", (linear.output,), layer, "attention"))
            else:
                dims = (linear,)
            parameters.append(Parameter(f"{path}.weight", dims, layer, "attention"))
    parameters.append(Parameter("wte.weight", (parse_expr("model"),), None, None))
    return Architecture(
        family="made by hand",
        sizes=SIZES,
        layers=layers,
        layers_path="h",
        parts={"attention": PartShape("kv", "attn", None, units="groups")},
        parameters=tuple(parameters),
        maps=tuple(maps),
        cache=parse_expr("kv d + kv d"),
        head="causal_lm",
        head_macs=0,
    )


def heads(*kept: int) -> np.ndarray:
    return np.isin(np.arange(SIZES["kv"]), kept)


def labels(kind: int, per_group: int = 1) -> list[int]:
    """Rows of one kind: hundreds say query, key or value, tens the head, units the position in the head."""
    return [100 * kind + 10 * head + d for head in range(SIZES["kv"] * per_group) for d in range(SIZES["d"])]


def by_head(*kinds: int) -> list[int]:
    return [100 * kind + 10 * head + d for head in range(SIZES["kv"]) for kind in kinds for d in range(SIZES["d"])]


QUERY, KEY, VALUE = 1, 2, 3
FUSED = {
    "GPT-2": ("kv d + kv d + kv d", True, labels(QUERY) + labels(KEY) + labels(VALUE)),
    "Phi-3": ("kv q d + kv d + kv d", False, labels(QUERY, per_group=2) + labels(KEY) + labels(VALUE)),
    "GPT-NeoX": ("kv (d + d + d)", False, by_head(QUERY, KEY, VALUE)),
}
KEPT = {
    "GPT-2": [100, 101, 120, 121, 200, 201, 220, 221, 300, 301, 320, 321],
    "Phi-3": [100, 101, 110, 111, 140, 141, 150, 151, 200, 201, 220, 221, 300, 301, 320, 321],
    "GPT-NeoX": [100, 101, 200, 201, 300, 301, 120, 121, 220, 221, 320, 321],
}


def stored(rows: list[int], columns: int, transposed: bool) -> Tensor:
    """A labelled weight: the label counts in thousands, the other dimension in ones."""
    weight = 1000 * torch.tensor(rows)[:, None] + torch.arange(columns)
    return weight.T.contiguous() if transposed else weight


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_keeps_the_rows_of_its_heads(family):
    output, transposed, rows = FUSED[family]
    architecture = attention({"attn.qkv": f"model -> {output}"}, transposed)
    state = {"h.0.attn.qkv.weight": stored(rows, 4, transposed), "h.0.attn.qkv.bias": torch.tensor(rows)}
    sliced = slice_state({**state, "wte.weight": torch.zeros(4)}, architecture, Plan({(0, "attention"): heads(0, 2)}))
    assert sliced["h.0.attn.qkv.bias"].tolist() == KEPT[family]
    assert torch.equal(sliced["h.0.attn.qkv.weight"], stored(KEPT[family], 4, transposed))


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_the_consumer_loses_inputs_and_keeps_its_bias(transposed):
    architecture = attention({"attn.out": "kv d -> model"}, transposed)
    columns = labels(VALUE)
    state = {"h.0.attn.out.weight": stored(columns, 4, not transposed), "h.0.attn.out.bias": torch.arange(4)}
    sliced = slice_state({**state, "wte.weight": torch.zeros(4)}, architecture, Plan({(0, "attention"): heads(1)}))
    assert torch.equal(sliced["h.0.attn.out.weight"], stored([310, 311], 4, not transposed))
    assert sliced["h.0.attn.out.bias"].tolist() == [0, 1, 2, 3]


BLOCK = {"norm": "model", "attn.q": "model -> kv q d", "attn.k": "model -> kv d", "attn.out": "kv q d -> model"}


def random_state(architecture: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {p.name: [dim.size(architecture.sizes) for dim in p.dims] for p in architecture.parameters}
    return {name: torch.randint(1000, shape, generator=generator) for name, shape in shapes.items()}


def test_a_deleted_layer_leaves_no_gap():
    architecture = attention(BLOCK, layers=3)
    state = random_state(architecture)
    plan = Plan({(0, "attention"): heads(0, 1, 2), (1, "attention"): heads(), (2, "attention"): heads(1)})
    sliced = slice_state(state, architecture, plan)
    assert {name.split(".attn")[0] for name in sliced if ".attn" in name} == {"h.0", "h.1"}
    assert torch.equal(sliced["h.0.attn.q.weight"], state["h.0.attn.q.weight"])
    assert torch.equal(sliced["h.1.attn.k.weight"], state["h.2.attn.k.weight"][2:4])
    assert torch.equal(sliced["h.1.norm.weight"], state["h.2.norm.weight"])
    assert torch.equal(sliced["wte.weight"], state["wte.weight"])


@settings(max_examples=20)
@given(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=2, max_size=2), st.data())
def test_slicing_twice_is_slicing_once(first, data):
    architecture = attention(BLOCK, transposed=data.draw(st.booleans()))
    left = sorted(first[0])
    second = data.draw(st.sets(st.integers(0, len(left) - 1), min_size=1))
    once = Plan({(0, "attention"): heads(*[left[i] for i in second])})
    state = random_state(architecture)

    smaller = replace(architecture, sizes={**SIZES, "kv": len(left)})
    then = Plan({(0, "attention"): np.isin(np.arange(len(left)), list(second))})
    twice = slice_state(slice_state(state, architecture, Plan({(0, "attention"): heads(*left)})), smaller, then)
    expected = slice_state(state, architecture, once)
    assert twice.keys() == expected.keys()
    assert all(torch.equal(twice[name], expected[name]) for name in expected)


# Masking, on a Llama with biases everywhere: 3 groups of 2 query heads of size 8, 13 channels


@pytest.fixture
def llama():
    return FAMILIES["llama"](0)


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def masked_logits(model, plan: Plan) -> Tensor:
    with masked(model, describe(model), plan):
        return logits(model)


@pytest.mark.parametrize(
    ("part", "unit", "module", "positions"),
    [("attention", 1, "self_attn.o_proj", slice(16, 32)), ("mlp", 4, "mlp.down_proj", slice(4, 5))],
)
def test_removing_a_unit_zeroes_what_it_feeds_the_consumer(llama, part, unit, module, positions):
    found = masked_logits(llama, plan_without(describe(llama), 2, part, unit))
    with torch.no_grad():
        llama.model.layers[2].get_submodule(module).weight[:, positions] = 0
    assert_close(found, logits(llama))


@pytest.mark.parametrize(("part", "module"), [("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
def test_removing_all_units_removes_the_consumers_bias_too(llama, part, module):
    architecture = describe(llama)
    found = masked_logits(llama, plan_without(architecture, 2, part, *range(architecture.units(part))))
    consumer = llama.model.layers[2].get_submodule(module)
    with torch.no_grad():
        consumer.weight.zero_()
        with_bias = logits(llama)
        consumer.bias.zero_()
    assert_close(found, logits(llama))
    assert (found - with_bias).abs().max() > 0.01


def test_the_plan_that_keeps_all_masks_nothing(llama):
    assert_close(masked_logits(llama, Plan.dense(describe(llama))), logits(llama))


def test_the_mask_is_lifted_even_after_an_error(llama):
    before = logits(llama)
    plan = plan_without(describe(llama), 0, "mlp", *range(13))
    with pytest.raises(KeyError), masked(llama, describe(llama), plan):
        assert not torch.allclose(logits(llama), before)
        raise KeyError
    assert_close(logits(llama), before)


# Norms over what remains, on Mamba heads in two groups of three, each head of size 5


@pytest.fixture
def hybrid():
    return tiny_exposed("nemotron_h")


@pytest.mark.parametrize("gone", [(1,), (0, 4), (1, 2, 3, 5), (3, 4, 5)], ids=str)
def test_a_norm_takes_its_means_over_the_kept_heads_of_each_group(hybrid, gone):
    """Also where the groups keep different numbers, as without one head alone, and where one keeps none."""
    norm, seen = hybrid.model.layers[0].mixer.norm, []
    norm.register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
    logits(hybrid)
    x, gate, _ = seen.copy()
    kept = ~np.isin(np.arange(6), gone)
    with masked(hybrid, describe(hybrid), plan_without(describe(hybrid), 0, "mamba", *gone)):
        found = norm(x, gate).unflatten(-1, (6, 5))
    gated = (x * torch.nn.functional.silu(gate)).unflatten(-1, (6, 5))
    assert not found[..., torch.from_numpy(~kept), :].any()
    for group in (slice(0, 3), slice(3, 6)):
        heads = [head for head in range(6)[group] if kept[head]]
        if heads:
            left = gated[..., heads, :]
            mean = left.square().mean((-1, -2), keepdim=True)
            expected = left / (mean + norm.variance_epsilon).sqrt() * norm.weight.view(6, 5)[heads]
            assert_close(found[..., heads, :], expected)
    assert "forward" not in vars(norm)


def test_a_layer_that_counts_the_tokens_of_the_cache_must_stay(hybrid):
    architecture = describe(hybrid)
    state = {**dict(hybrid.named_parameters()), **dict(hybrid.named_buffers())}
    plan = Plan.dense(architecture)
    for number, layer in enumerate(architecture.with_part("attention"), start=1):
        plan = plan.without((layer, "attention"), slice(None))
        if number < 2:
            slice_state(state, architecture, plan)
    with pytest.raises(LibpruneError, match="deletes all 2 layers with attention, in which transformers counts"):
        slice_state(state, architecture, plan)


# Plans


# What a config cannot say
