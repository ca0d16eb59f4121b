"""Descriptions: what belongs to which block, what they say of the kind of model, and how they are written."""

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from libprune.engine.architecture import Architecture, Map, Parameter
from libprune.engine.describe import describe
from libprune.engine.describe_module import describe_module
from libprune.engine.module_family import NetworkFamily
from tests.support.models import ENCODERS, FAMILIES, TOWERS
from tests.support.networks import CASES


def description(name: str) -> Architecture:
    if name in CASES:
        return describe_module(CASES[name].network(), CASES[name].family, CASES[name].inputs(2), "cafe")
    return describe(FAMILIES[name](0), "cafe")


@pytest.mark.parametrize("name", [*FAMILIES, *CASES])
def test_a_description_survives_being_written(name):
    architecture = description(name)
    text = architecture.to_json()
    assert Architecture.from_json(text) == architecture
    assert Architecture.from_json(text).to_json() == text
    assert json.loads(text).keys() == {field.name for field in fields(Architecture)}


@pytest.mark.parametrize("changed", ["family", "maps", "of another version"])
def test_a_description_of_other_fields_is_not_read(changed):
    data = json.loads(description("gpt2").to_json())
    data.pop(changed) if changed in data else data.update({changed: 1})
    with pytest.raises((KeyError, TypeError), match=changed):
        Architecture.from_json(json.dumps(data))


@pytest.mark.parametrize("name", [*FAMILIES, *CASES])
def test_a_block_has_what_is_of_its_part_and_what_carries_its_axis(name):
    architecture = description(name)
    carried = {part: shape.axis for part, shape in architecture.parts.items()}
    for layer, part in architecture.blocks():

        def belongs(entry: Parameter | Map, names: frozenset[str], layer: int = layer, part: str = part) -> bool:
            in_block = entry.layer is not None and entry.layer in architecture.users(layer, part)
            return in_block and (entry.part == part or carried[part] in names)

        parameters = [p for p in architecture.parameters if belongs(p, frozenset().union(*(e.names for e in p.dims)))]
        maps = [m for m in architecture.maps if belongs(m, m.input.names | m.output.names)]
        assert list(architecture.parameters_of(layer, part)) == parameters
        assert list(architecture.maps_of(layer, part)) == maps
    if architecture.layered:
        named = [p.name for block in architecture.blocks() for p in architecture.parameters_of(*block)]
        assert len(named) == len(set(named)), "parts of a language model share no parameter"


def test_only_attention_of_a_language_model_has_groups():
    """A network may call one of its axes attention, whose units are channels like any."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    modules = {"0": "a -> attention", "1": "attention -> mlp", "2": "mlp -> b"}
    family = NetworkFamily(family="f", prunable=["attention", "mlp"], modules=modules)
    described = describe_module(network, family, torch.randn(2, 3))
    assert [described.grouped(part) for part in ("attention", "mlp")] == [False, False]
    assert [description("llama").grouped(part) for part in ("attention", "mlp")] == [True, False]


def test_layers_stay_where_norms_work_on_the_stream_itself_the_first_lacks_one_or_they_share_units():
    stay = {name for name in (*FAMILIES, *CASES) if description(name).layers_stay}
    assert stay == {*ENCODERS, "gemma4_text"}
    assert {name for name in TOWERS if describe(TOWERS[name](0)).layers_stay} == {"qwen3_vl"}
