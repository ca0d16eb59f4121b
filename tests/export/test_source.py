"""What a folder says of its layers, against the plan that it was pruned by."""

import pytest

from libprune.engine.describe import describe
from libprune.engine.errors import ExportError
from libprune.export.source import Source
from tests.support.exported import write_pruned
from tests.support.models import FAMILIES, random_plan


@pytest.mark.parametrize(("name", "kind"), [("llama", "holes"), ("qwen3", "per_layer"), ("gpt2", "uniform")])
def test_layers_are_those_that_the_plan_leaves(tmp_path, name, kind):
    whole, source = write_pruned(tmp_path, name, kind)
    plan = random_plan(describe(FAMILIES[name](0)), kind)
    sizes = source.record.architecture.sizes
    groups = [plan.kept(layer, "attention") for layer in plan.layers]
    assert [layer.groups for layer in source.layers] == groups
    assert [layer.heads for layer in source.layers] == [count * sizes.get("q", 1) for count in groups]
    assert [layer.channels for layer in source.layers] == [plan.kept(layer, "mlp") for layer in plan.layers]
    assert source.uniform == (kind == "uniform")
    assert source.head == "causal_lm"
    assert {layer.groups for layer in whole.layers} == {plan.keep[0, "attention"].size}


def test_a_parameter_has_its_place(tmp_path):
    _, source = write_pruned(tmp_path, "gpt2", "uniform")
    places = {name: source.place(name) for name in source.weights}
    transposed = {place.module for place in places.values() if place is not None and place.transposed}
    assert transposed == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert [name for name, place in places.items() if place is None and ".h." in name] == []


def test_rotary_positions_that_differ_by_layer_are_refused(tmp_path):
    _, source = write_pruned(tmp_path, "gemma3", "uniform")
    with pytest.raises(ExportError, match="rotary positions that differ between layers"):
        assert source.rope
    assert Source(source.record).head_dim == source.record.architecture.sizes["d"]
