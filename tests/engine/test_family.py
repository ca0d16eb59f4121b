"""Family files, and the closed world: what a family file does not speak of stops, by name."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.engine.family import FOLDER, families, family_of, load_family
from libprune.engine.stock_config import check_config
from tests.support.models import FAMILIES

SHIPPED = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture
def llama():
    return FAMILIES["llama"](0)


# The files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_valid_and_found_by_its_model_types(path):
    family = load_family(path)
    assert family.family == path.stem
    assert all(family_of(model_type) == family for model_type in family.model_types)


def test_no_model_type_is_described_twice():
    types = [name for family in families().values() for name in family.model_types]
    assert len(types) == len(set(types))


def test_an_unknown_model_type_is_told_what_is_known_and_what_to_write():
    with pytest.raises(FamilyError) as error:
        family_of("qwen3_next")
    known = ", ".join(sorted(name for family in families().values() for name in family.model_types))
    assert f"'qwen3_next'; known: {known}; did you mean 'qwen3'" in str(error.value)
    assert "libprune/families/qwen3_next.yaml" in str(error.value)


@pytest.fixture
def edited(tmp_path):
    """Loads the Llama file with one text in it replaced."""

    def load(old: str, new: str):
        text = (FOLDER / "llama.yaml").read_text()
        assert old in text
        path = tmp_path / "edited.yaml"
        path.write_text(text.replace(old, new))
        return load_family(path)

    return load


@pytest.mark.parametrize("old", ["layers: model.layers", "    axis: kv", "  inert:"])
def test_an_unknown_key_is_refused_by_name(edited, old):
    indent = " " * (len(old) - len(old.lstrip()))
    with pytest.raises(FamilyError, match=r"edited\.yaml(.|\n)*colour(.|\n)*Extra inputs are not permitted"):
        edited(old, f"{indent}colour: red\n{old}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mlp.up_proj: model -> ffn", "mlp.up_proj: model -> (ffn", "a '\\(' is not closed"),
        ("lm_head: model -> vocab", "lm_head: model -> vocab -> x", "more than one '->'"),
        ("num_attention_heads: kv q", "num_attention_heads: kv * q", "cannot read '\\* q'"),
        ("cache: kv d + kv d", "cache: kv d +", "an axis name is missing"),
    ],
    ids=["part", "outside", "config", "cache"],
)
def test_an_expression_that_cannot_be_read_is_refused_when_the_file_is(edited, old, new, message):
    with pytest.raises(FamilyError, match=rf"edited\.yaml(.|\n)*{message}"):
        edited(old, new)


@pytest.mark.parametrize("new", ["model -> ffn", "ffn"], ids=["other map", "vector"])
def test_a_part_must_have_a_map_that_takes_its_axis(edited, new):
    with pytest.raises(FamilyError, match="no map of the part takes axis 'ffn' as its input"):
        edited("mlp.down_proj: ffn -> model", f"mlp.down_proj: {new}")


@pytest.mark.parametrize("expr", ["(ffn)", "ffn+ffn"])
def test_the_map_that_takes_the_axis_may_be_any_expression(edited, expr):
    edited("mlp.down_proj: ffn -> model", f"mlp.down_proj: {expr} -> model")


@pytest.mark.parametrize("text", ["", "- a list", "family: [unclosed"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(FamilyError, match=r"broken\.yaml"):
        load_family(path)


# The config


def test_an_unknown_config_key_stops_unless_the_user_vouches_for_it(llama):
    llama.config.window_of_doom = 3
    with pytest.raises(FamilyError, match=r"'window_of_doom' = 3.*prepare\.accept_config"):
        describe(llama)
    assert describe(llama, accept=("window_of_doom",)).layers == 4


def test_a_value_that_a_fixed_key_does_not_allow_is_refused(llama):
    family = family_of("llama")
    fixed = {**family.config.fixed, "hidden_act": ["silu"]}
    strict = family.model_copy(update={"config": family.config.model_copy(update={"fixed": fixed})})
    check_config(strict, llama.config)
    llama.config.hidden_act = "gelu"
    with pytest.raises(FamilyError, match=r"'hidden_act' = 'gelu' is not supported by family 'llama': \['silu'\]"):
        check_config(strict, llama.config)


def test_a_config_that_contradicts_the_weights_is_refused(llama):
    llama.config.intermediate_size = 12
    with pytest.raises(LibpruneError, match=r"mlp\.\w+\.\w+ = 13, but ffn is 12"):
        describe(llama)


def test_keys_that_every_config_has_need_no_mention():
    check_config(family_of("llama"), PreTrainedConfig())


# The modules


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
