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
        family_of("qwen3_next")
    known = ", ".join(sorted(name for family in families().values() for name in family.model_types))
    assert f"'qwen3_next'; known: {known}; did you mean 'qwen3'" in str(error.value)
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


# The modules
