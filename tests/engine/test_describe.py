"""The closed world: what a family file does not speak of stops, by name."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from libprune.engine.describe import describe, with_biases, without_weights
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.engine.family import family_of
from libprune.engine.stock_config import bias_key
from tests.support.models import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"](0)


def test_an_unknown_config_key_stops_unless_the_user_vouches_for_it(llama):
    llama.config.window_of_doom = 3
    with pytest.raises(FamilyError, match=r"'window_of_doom' = 3.*prepare\.accept_config"):
        describe(llama)
    assert describe(llama, accept=("window_of_doom",)).layers == 4


def test_a_config_that_contradicts_the_weights_is_refused(llama):
    llama.config.intermediate_size = 12
    with pytest.raises(LibpruneError, match=r"mlp\.\w+\.\w+ = 13, but ffn is 12"):
        describe(llama)


@pytest.mark.parametrize(
    ("place", "name", "extra", "stops_at"),
    [
        ("model.layers.1.mlp", "gate2", nn.Linear(3, 3), "model.layers.1.mlp.gate2.weight"),
        ("model.layers.1", "gain", nn.Parameter(torch.ones(3)), "model.layers.1.gain"),
        ("model.layers.0.self_attn.q_proj", "scale", nn.Parameter(torch.ones(48)), "layers.0.self_attn.q_proj.scale"),
        ("model.norm", "matrix", nn.Parameter(torch.ones(30, 30)), "model.norm.matrix"),
        ("model", "extra_norm", nn.LayerNorm(3), "model.extra_norm.weight"),
    ],
    ids=["module", "own parameter", "parameter of a map", "parameter of a norm", "outside the blocks"],
)
def test_an_undescribed_parameter_stops_with_its_name(llama, place, name, extra, stops_at):
    setattr(llama.get_submodule(place), name, extra)
    with pytest.raises(FamilyError, match=re.escape(stops_at)):
        describe(llama)


@pytest.mark.parametrize(
    ("place", "name"),
    [("model.layers.1.mlp", "up_proj"), ("model.layers.3.self_attn", "o_proj"), ("model", "norm"), ("model", "layers")],
)
def test_a_described_module_that_the_model_lacks_stops_with_its_name(llama, place, name):
    delattr(llama.get_submodule(place), name)
    with pytest.raises(FamilyError, match=re.escape(f"'{place}.{name}', which this model lacks")):
        describe(llama)


@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [
        ("model.layers.2.mlp", "down_proj", nn.Linear(11, 30)),
        ("model.layers.2.self_attn", "k_proj", nn.Linear(30, 16)),
        ("model.layers.2", "input_layernorm", nn.LayerNorm(29)),
    ],
)
def test_a_weight_of_another_shape_stops_with_its_name(llama, place, name, wrong):
    setattr(llama.get_submodule(place), name, wrong)
    with pytest.raises(LibpruneError, match=re.escape(f"{place}.{name}.weight = ")):
        describe(llama)


def test_meta_tensors_are_enough(llama):
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(llama.config)
    assert describe(hollow) == describe(llama)


def sayable(name: str) -> list[str]:
    """The parts of a tiny model whose biases a key of its config can give."""
    config = FAMILIES[name](0).config
    family = family_of(config.model_type, config.to_dict()).family
    return [part for part in ("attention", "mlp") if bias_key(family, config, part)]


SAYABLE = [
    (name, parts)
    for name in FAMILIES
    for said in [sayable(name)]
    for parts in (("attention",), ("mlp",), ("attention", "mlp"))
    if {*parts} <= {*said}
]


def test_some_families_can_say_biases_and_some_lack_them():
    lacking = [f for f, _ in SAYABLE if not any(p.name.endswith(".bias") for p in describe(FAMILIES[f](0)).parameters)]
    assert len({*lacking}) >= 2


@pytest.mark.parametrize(("family", "parts"), SAYABLE)
def test_added_biases_are_those_of_the_model_that_the_config_makes(family, parts):
    """The description is derived from that of the model without them; the model itself is the witness."""
    model = FAMILIES[family](0)
    model.config.architectures = [type(model).__name__]
    biased, config = with_biases(describe(model, fingerprint="here"), model.config, parts)
    made = without_weights(config)
    assert biased == describe(made, fingerprint="here", accept=tuple(config.to_dict()))
    assert [p.name for p in biased.parameters] == [name for name, _ in made.named_parameters()]


def test_no_part_changes_nothing(llama):
    architecture = describe(llama)
    assert with_biases(architecture, llama.config, ()) == (architecture, llama.config)
