"""Costs counted from the axes equal the formulas that papers give, and the sizes of known models."""

from dataclasses import replace
from itertools import product
from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, without_weights
from libprune.engine.plan import Plan
from tests.support.models import ENCODERS, FAMILIES, random_plan
from tests.support.shapes import shapes


def hollow_llama(**settings) -> Architecture:
    """A Llama without memory."""
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(LlamaConfig(**settings)))


@st.composite
def llama_sizes(draw):
    groups, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "hidden_size": groups * queries * draw(st.integers(1, 4)),
        "head_dim": 2 * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * queries,
        "intermediate_size": draw(st.integers(1, 6)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


@settings(max_examples=15)
@given(llama_sizes())
def test_llama_units_cost_what_the_formulas_say(shape):
    architecture = hollow_llama(**shape, vocab_size=5, num_hidden_layers=2)
    h, d, g = shape["hidden_size"], shape["head_dim"], shape["num_attention_heads"] // shape["num_key_value_heads"]
    attention_bias, mlp_bias = shape["attention_bias"], shape["mlp_bias"]
    assert cost.unit_parameters(architecture, 1, "attention") == h * d * (2 * g + 2) + attention_bias * d * (g + 2)
    assert cost.unit_parameters(architecture, 1, "mlp") == 3 * h + 2 * mlp_bias
    assert cost.part_overhead(architecture, 1, "attention") == h + attention_bias * h
    assert cost.part_overhead(architecture, 1, "mlp") == h + mlp_bias * h


@pytest.fixture(scope="module")
def smollm2() -> Architecture:
    """SmolLM2-135M."""
    return hollow_llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def test_smollm2_has_its_published_size(smollm2):
    assert smollm2.total_parameters == 134_515_008
    assert smollm2.decoder_parameters == 106_202_880
    assert smollm2.total_parameters - smollm2.decoder_parameters == 49152 * 576 + 576
    assert cost.size(smollm2, Plan.dense(smollm2)) == cost.Size(
        decoder=106_202_880,
        total=134_515_008,
        macs=106_202_880 - 30 * 2 * 576 + 49152 * 576,
        cache=30 * 2 * 3 * 64,
        state=0,
        active=106_202_880,
    )


def expressible(architecture: Architecture, part: str) -> list[int]:
    return [n for n in range(1, architecture.units(part) + 1) if architecture.parts[part].says(n)]


def test_the_config_of_smollm2_can_say_any_count(smollm2):
    """Of 3 groups with 3 query heads each, 3, 6 and 9 heads divide the width of 576."""
    assert expressible(smollm2, "attention") == [1, 2, 3]
    assert expressible(smollm2, "mlp") == list(range(1, 1537))


def test_a_plan_costs_its_units_and_the_overhead_of_what_is_gone(smollm2):
    """One group and 100 channels out of layer 3, the attention of layer 4 and the whole of layer 5."""
    keep = dict(Plan.dense(smollm2).keep)
    keep[3, "attention"] = np.array([True, False, True])
    keep[3, "mlp"] = np.arange(1536) >= 100
    for block in [(4, "attention"), (5, "attention"), (5, "mlp")]:
        keep[block] = np.zeros_like(keep[block])
    dense, left = cost.size(smollm2, Plan.dense(smollm2)), cost.size(smollm2, Plan(keep))
    group, channel = 576 * 64 * 8, 3 * 576
    weights = group + 100 * channel + 2 * 3 * group + 1536 * channel
    assert dense.decoder - left.decoder == dense.total - left.total == weights + 3 * 576
    assert dense.macs - left.macs == weights
    assert dense.cache - left.cache == (1 + 2 * 3) * 2 * 64


def test_a_large_model_is_described_without_memory():
    """Llama-3-8B: 291 tensors."""
    llama3 = hollow_llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert len(llama3.parameters) == 291
    assert llama3.total_parameters == 8_030_261_248
    assert expressible(llama3, "attention") == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *product(FAMILIES, ["parameters", "macs"]),
        *product([name for name in FAMILIES if name not in ENCODERS], ["cache"]),
    ],
)
def test_every_objective_counts_what_a_unit_takes_with_it(name, objective):
    """The cost of a unit is what the exact size of the model loses with it, and the last one takes the rest."""
    architecture = describe(FAMILIES[name](0))
    prices, dense = cost.prices(architecture, objective), Plan.dense(architecture).keep
    size = cost.size(architecture, Plan(dense))
    amount = attrgetter({"parameters": "total"}.get(objective, objective))
    for part, shape in architecture.parts.items():
        number, layer = architecture.units(part), architecture.with_part(part)[-1]
        counts = [0, number] if shape.coupled else range(number - max(0, shape.least - 1) + (shape.least == 0))
        without = [Plan({**dense, (layer, part): np.arange(number) >= gone}) for gone in counts]
        amounts = [amount(cost.size(architecture, plan)) for plan in without]
        assert [prices.removed(plan) for plan in without] == [amounts[0] - left for left in amounts]
        found = [prices.removed(plan) for plan in without]
        each, rest = prices.unit[layer, part], prices.rest[layer, part]
        assert found == [gone * each + (rest if gone == number else 0) for gone in counts]
    staying = [p for p in architecture.parameters if p.layer is not None and p.part not in architecture.parts]
    units = (prices.unit[block] * architecture.units(block[1]) + prices.rest[block] for block in architecture.blocks())
    norms = sum(map(architecture.numel, staying)) if objective == "parameters" else 0
    assert prices.decoder == sum(units) + norms
    assert prices.total == {"parameters": size.total, "macs": size.macs, "cache": size.cache}[objective]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_active_parameters_leave_out_the_experts_that_are_not_chosen(name):
    model = FAMILIES[name](0)
    architecture, idle = describe(model), 0
    for module in model.modules():
        if hasattr(module, "has_gate"):
            chosen = model.config.num_experts_per_tok
            idle += sum(p[chosen:].numel() for p in module.parameters())
    assert cost.size(architecture, Plan.dense(architecture)).active == architecture.decoder_parameters - idle


seconds = st.floats(1e-6, 1e-2)


@given(shapes(), seconds, seconds, seconds, seconds)
def test_a_budget_of_time_counts_what_the_lines_say(shape, fixed, group, channel, outside):
    architecture = shape.architecture()
    lines = {"unit": {"attention": group, "mlp": channel}, "fixed": fixed, "outside": outside}
    prices = cost.prices(architecture, "latency", lines)
    plan = random_plan(architecture, "holes" if shape.layers > 2 else "per_layer")

    def expected(plan: Plan) -> float:
        """Half of what is fixed goes with each part."""
        price = {"attention": group, "mlp": channel}
        return float(sum(keep.any() * fixed / 2 + price[part] * keep.sum() for (_, part), keep in plan.keep.items()))

    dense = Plan.dense(architecture)
    assert prices.decoder == pytest.approx(1e12 * expected(dense), rel=1e-5)
    assert prices.total == pytest.approx(prices.decoder + 1e12 * outside, rel=1e-5)
    assert prices.decoder - prices.removed(plan) == pytest.approx(1e12 * expected(plan), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h"])
def test_a_narrower_stream_costs_what_a_model_of_that_width_has(name):
    config = FAMILIES[name](0).config
    architecture, width = describe(without_weights(config)), config.hidden_size - 10
    config.hidden_size = width
    narrow = describe(without_weights(config))
    plan = replace(Plan.dense(architecture), width=width)
    assert cost.size(architecture, plan) == cost.size(narrow, Plan.dense(narrow))
    assert {p.name: cost.shape_after(architecture, plan, p) for p in architecture.parameters} == {
        p.name: tuple(dim.size(narrow.sizes) for dim in p.dims) for p in narrow.parameters
    }
    assert architecture.narrowed(None) is architecture
