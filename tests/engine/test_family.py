"""Family files, and the closed world: what a family file does not speak of stops, by name."""

import pytest

from libprune.engine.errors import FamilyError
from libprune.engine.family import FOLDER, families, family_of, load_family

SHIPPED = sorted(FOLDER.glob("*.yaml"))


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
        family_of("no_such_model")
    known = ", ".join(sorted(name for family in families().values() for name in family.model_types))
    assert f"'no_such_model'; known: {known}" in str(error.value)
    assert "name it in prepare.families" in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_local_experts": 8}, "it is a mixture of 8 experts; the mixtures that are known are"),
        ({"n_routed_experts": 64, "layer_types": ["linear_attention"]}, "it is a mixture of 64 experts"),
        ({"text_config": {"num_experts": 128}}, "it is a mixture of 128 experts"),
        (
            {"vision_config": {"depth": 2}, "text_config": {"model_type": "mistral", "num_experts": 4}},
            "with vision_config (images); its text part is of type 'mistral', which family 'llama' describes, but",
        ),
        ({"audio_config": {"d": 2}, "text_config": {"model_type": "new"}}, "its text part is of type 'new', unknown"),
        ({"vision_config": {"d": 2}, "audio_config": {"d": 2}}, "vision_config (images) and audio_config (sound)"),
        ({"layer_types": ["linear_attention", "full_attention", "mamba"]}, "(linear_attention, mamba)"),
    ],
)
def test_an_unknown_model_of_another_kind_is_told_as_such_and_is_near_to_no_family(config, message):
    with pytest.raises(FamilyError) as error:
        family_of("mistral9", config)
    assert message in str(error.value)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("config", [{}, {"num_experts": 1}, {"layer_types": ["full_attention", "sliding_attention"]}])
def test_an_unknown_dense_model_is_near_to_its_like(config):
    with pytest.raises(FamilyError, match=r"did you mean '.*'\? To add it"):
        family_of("mistral9", config)


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
    with pytest.raises(FamilyError, match=r"edited\.yaml: unknown key '(\w+\.)*colour'"):
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
    with pytest.raises(FamilyError, match=rf"edited\.yaml: .*{message}[^\n]*$"):
        edited(old, new)


@pytest.mark.parametrize("new", ["model -> ffn", "ffn"], ids=["other map", "vector"])
def test_a_part_must_have_a_map_that_takes_its_axis(edited, new):
    with pytest.raises(FamilyError, match="no map of the part takes axis 'ffn' as its input"):
        edited("mlp.down_proj: ffn -> model", f"mlp.down_proj: {new}")


@pytest.mark.parametrize("name", ["self_attn.o_proj", "input_layernorm", "missing"], ids=["map", "no unit", "unknown"])
def test_a_norm_over_what_remains_is_a_vector_of_the_part(edited, name):
    with pytest.raises(FamilyError, match=f"norm '{name}' is no vector of the part that has axis 'kv'"):
        edited("    axis: kv\n", f"    axis: kv\n    norm: {name}\n")


@pytest.mark.parametrize("expr", ["(ffn)", "ffn+ffn"])
def test_the_map_that_takes_the_axis_may_be_any_expression(edited, expr):
    edited("mlp.down_proj: ffn -> model", f"mlp.down_proj: {expr} -> model")


@pytest.mark.parametrize("text", ["", "- a list", "family: [unclosed"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(FamilyError, match=r"broken\.yaml"):
        load_family(path)


# A family by reference

TOWER = """
family: seeing
model_types: [seeing]
tower:
  family: llama
  model_types: [llama]
  prefix: model.reader
  config: text_config
  untouched: [model.eye]
  inert: [vision_config]
"""


def test_a_tower_has_the_modules_of_its_family_under_its_own_prefix(tmp_path):
    path = tmp_path / "seeing.yaml"
    path.write_text(TOWER)
    family, llama = load_family(path), families()["llama"]
    assert family.layers == "model.reader.layers"
    assert family.outside.keys() == {"model.reader.embed_tokens", "model.reader.norm", "lm_head"}
    assert (family.parts, family.cache, family.config) == (llama.parts, llama.cache, llama.config)
    assert family.heads == {"image_text_to_text": {}}
    assert family.gguf is None
    assert family.untouched("model.eye.0.weight")
    assert not family.untouched("model.eyelid.weight")
    nested = {"text_config": {"hidden_size": 3}, "hidden_size": 5}
    assert family.sized(nested) == {"hidden_size": 3}
    assert llama.sized(nested) is nested


def test_a_tower_may_say_its_sizes_by_other_keys(tmp_path):
    path = tmp_path / "seeing.yaml"
    path.write_text(TOWER + "  sizes: {hidden_size: [model, kv q d], head_dim: []}\n")
    sizes, whole = load_family(path).config.expressions, families()["llama"].config.expressions
    assert sizes.keys() == whole.keys() - {"head_dim"}
    assert [str(one) for one in sizes["hidden_size"]] == ["model", "kv q d"]
    assert all(sizes[key] == whole[key] for key in sizes if key != "hidden_size")


def test_the_family_of_a_tower_may_lie_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        (FOLDER / "llama.yaml").read_text().replace("cache: kv d + kv d", "cache: kv d")
    )
    path = tmp_path / "seeing.yaml"
    path.write_text(TOWER.replace("family: llama", "family: mine"))
    assert load_family(path).cache == "kv d"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("family: llama", "family: lama", r"seeing\.yaml: .*lama\.yaml does not exist"),
        ("family: llama", "family: mistral3", r"seeing\.yaml: tower\.family 'mistral3' is one of a tower itself"),
        ("family: llama", "family: bert", "tower.family 'bert' describes no models that predict the next token"),
        ("  inert:", "  colour: red\n  inert:", r"seeing\.yaml: unknown key 'tower\.colour'$"),
        ("  prefix: model.reader\n", "", r"seeing\.yaml: tower\.prefix: Field required$"),
    ],
    ids=["unknown", "a tower itself", "another head", "key", "missing"],
)
def test_a_tower_that_cannot_be_read_is_refused_by_name(tmp_path, old, new, message):
    path = tmp_path / "seeing.yaml"
    path.write_text(TOWER.replace(old, new))
    with pytest.raises(FamilyError, match=message):
        load_family(path)


# The config


# The modules
