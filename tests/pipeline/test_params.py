"""params.yaml: what is not understood stops, with its place and what was probably meant."""

import re
from functools import partial

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from libprune.allocation.search import RIVALS
from libprune.engine.errors import ParamsError
from libprune.pipeline.params import PRESETS, Params, load_params
from tests.support.params import PLACES, SHIPPED, sections, shipped, untrained, write_and_load


@pytest.fixture
def load(tmp_path):
    """Writes a text or the given content as a params file and reads it."""
    return partial(write_and_load, tmp_path / "params.yaml")


# What is shipped


def test_the_file_of_the_repository_is_valid_and_says_every_key():
    assert load_params(SHIPPED)
    data = shipped()
    assert data.keys() == {"preset", *sections()}
    for name, section in sections().items():
        assert data[name].keys() == section.model_fields.keys()


def test_what_is_left_out_takes_its_default(load):
    data = {"prepare": {"model": "m"}, "tokenize": {"text": "t"}}
    params = load(data)
    assert params.allocate.ratio == 0.2
    assert params == load(data | {"allocate": {}, "score": {}})


def test_values_are_read_as_they_are_written(load):
    data = shipped()
    data["allocate"] |= {"ratio": 0.35, "min_groups": 0}
    data["gradients"]["sequences"] = None
    params = load(data)
    assert (params.allocate.ratio, params.allocate.min_groups, params.gradients.sequences) == (0.35, 0, None)


# Misspelled keys


@st.composite
def misspelled(draw):
    """A place, and its key with one letter dropped or two neighbours exchanged."""
    place = draw(st.sampled_from(PLACES))
    key = place[-1]
    at = draw(st.integers(0, len(key) - 2))
    swap = draw(st.booleans())
    wrong = key[:at] + key[at + 1] + key[at] + key[at + 2 :] if swap else key[:at] + key[at + 1 :]
    assume(wrong != key)
    return place, wrong


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(misspelled())
def test_a_misspelled_key_is_refused_with_its_place_and_the_nearest(load, case):
    place, wrong = case
    data = shipped()
    holder = data if len(place) == 1 else data[place[0]]
    holder[wrong] = holder.pop(place[-1])
    named = ".".join([*place[:-1], wrong])
    with pytest.raises(ParamsError) as error:
        load(data)
    hint = re.search(rf"unknown key '{re.escape(named)}'; did you mean ([^?]*)\?", str(error.value))
    assert hint, str(error.value)
    assert repr(place[-1]) in hint[1]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_key_beside_the_known_ones_is_refused_with_the_known_ones(load, place):
    data = shipped()
    (data if len(place) == 1 else data[place[0]])["zzz"] = 1
    known = list(Params.model_fields if len(place) == 1 else sections()[place[0]].model_fields)
    with pytest.raises(ParamsError, match=rf"unknown key '[a-z.]*zzz' \(known: {', '.join(known)}\)"):
        load(data)


def test_a_misspelled_part_of_a_mixed_criterion_is_refused_with_its_whole_place(load):
    data = shipped()
    data["score"]["weight_stats"]["entrpy"] = data["score"]["weight_stats"].pop("entropy")
    with pytest.raises(ParamsError, match=r"unknown key 'score\.weight_stats\.entrpy'; did you mean 'entropy'\?"):
        load(data)


def test_a_part_of_a_mixed_criterion_is_named_with_its_whole_place(load):
    data = shipped()
    data["score"]["weight_stats"]["entropy"] = "much"
    with pytest.raises(ParamsError, match=r"score\.weight_stats\.entropy: expected a number, found the text 'much'$"):
        load(data)


def test_an_entry_of_a_list_is_named_with_its_number(load):
    data = shipped()
    data["evaluate"]["tasks"] = ["piqa", 3]
    with pytest.raises(ParamsError, match=r"params\.yaml, line \d+: evaluate\.tasks\[1\]: expected a text, found 3$"):
        load(data)


def test_the_types_that_were_tried_are_no_part_of_the_place(load):
    data = shipped()
    data["slice"]["damping"] = "much"
    with pytest.raises(ParamsError, match=r": slice\.damping: expected a number or auto, found the text 'much'$"):
        load(data)


def test_a_message_speaks_of_lists_and_keys_as_yaml_does(load):
    data = shipped()
    data["evaluate"]["tasks"] = 3
    data["latency"] = "fast"
    with pytest.raises(ParamsError) as error:
        load(data)
    assert "evaluate.tasks: expected a list, found 3" in str(error.value)
    assert (
        "latency: expected keys with values, found the text 'fast'; the keys are tokens, batch, widths, rounds"
        in str(error.value)
    )


# Sections that need one another


def test_gram_matrices_in_bfloat16_are_refused_where_the_repair_needs_them(load):
    data = untrained()
    data["activations"]["storage_dtype"] = "bfloat16"
    for section, key, value in (
        ("slice", "repair", "local"),
        ("slice", "repair", "block"),
        ("allocate", "method", "search"),
        ("score", "criterion", "obs"),
    ):
        changed = data | {section: data[section] | {key: value}}
        with pytest.raises(
            ParamsError, match=rf"line \d+: {section}.{key}: {value} needs activations.storage_dtype: f"
        ):
            load(changed)
    data["slice"]["repair"] = "none"
    assert load(data).activations.storage_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("key", "value", "repair"),
    [
        ("fisher_share", 0.5, "sequential"),
        ("drift", 0.5, "local"),
        ("drift_cap", 1.5, "local"),
        ("producer_steps", 4, "local"),
        ("producer_steps", 4, "block"),
        ("block_epochs", 3, "sequential"),
        ("block_rate", 1e-4, "local"),
        ("block_ahead", False, "local"),
    ],
)
def test_settings_of_another_repair_are_refused(load, key, value, repair):
    data = shipped()
    data["slice"] |= {"repair": repair, key: value}
    with pytest.raises(ParamsError, match=f"slice.{key} .*, not {repair}"):
        load(data)


@pytest.mark.parametrize("compute", [{"offload": "cpu"}, {"offload": "disk"}, {"gradient_checkpointing": True}])
def test_probes_need_the_whole_graph_in_one_place(load, compute):
    data = shipped()
    data["hessian"]["estimator"] = "hutchinson"
    load(data)
    data["compute"] |= compute
    with pytest.raises(ParamsError, match=rf"hutchinson cannot be used with compute\.{next(iter(compute))}"):
        load(data)
    data["hessian"]["estimator"] = "fisher"
    load(data)


def test_whole_plans_are_measured_by_the_preset_best_unless_every_layer_is_to_have_one_shape(load):
    data = shipped() | {"preset": "best"}
    assert load(data).allocate.evaluations == PRESETS["best"]["allocate"]["evaluations"] > len(RIVALS)
    data["allocate"]["shape"] = "uniform"
    assert load(data).allocate.evaluations == 0
    data["allocate"]["evaluations"] = 3
    with pytest.raises(ParamsError, match=r"allocate.evaluations changes single layers.*shape: uniform"):
        load(data)
    data["allocate"]["method"] = "global"
    load(data)


def test_whole_plans_are_not_measured_with_fewer_columns_unless_asked_for(load):
    data = shipped() | {"preset": "best"}
    data["allocate"]["width"] = "auto"
    assert load(data).allocate.evaluations == 0
    data["allocate"]["evaluations"] = 3
    with pytest.raises(ParamsError, match=r"allocate.evaluations measures plans that keep the whole width"):
        load(data)


def test_states_are_not_compared_with_those_of_fewer_columns(load):
    data = shipped()
    data["allocate"]["width"] = 256
    data["recover"] |= {"method": "none", "hidden_states": 1.0}
    assert load(data).recover.hidden_states
    data["recover"]["method"] = "full"
    with pytest.raises(ParamsError, match=r"recover\.hidden_states compares states of the whole width; set it to 0"):
        load(data)


# The file


def test_every_problem_is_told_at_once(load):
    data = shipped()
    data["allocate"]["ratio"] = 2
    data["slice"]["repiar"] = "none"
    data["prepare"].pop("model")
    with pytest.raises(ParamsError) as error:
        load(data)
    assert all(place in str(error.value) for place in ("allocate.ratio", "slice.repiar", "prepare.model"))


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(
        ParamsError, match=r"nowhere\.yaml does not exist; run from the project folder or name another file"
    ):
        load_params(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["prepare: [", "a: b: c", "\tprepare: 1", "prepare: &x *y"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(load, text):
    with pytest.raises(ParamsError, match=r"params\.yaml is not valid YAML: .*line 1") as error:
        load(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", sections())
@pytest.mark.parametrize("value", ["null", "3", "[a, b]"])
def test_a_section_that_is_no_mapping_is_refused_by_name(load, section, value):
    data = {name: content for name, content in shipped().items() if name != section}
    with pytest.raises(ParamsError, match=rf"params\.yaml, line \d+: {section}: "):
        load(yaml.safe_dump(data) + f"{section}: {value}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "params.yaml holds nothing, not sections of keys"),
        (b"- a\n- b\n", "params.yaml holds list, not sections of keys"),
        (b"preset: \xff\n", "params.yaml is not UTF-8 text: byte 8 is 0xff"),
        (b"score: {seed: 1}\nallocate: {}\nscore: {}\n", "key 'score' is in line 1 and again in line 3"),
        (b"score:\n  seed: 1\n  seed: 1\n", "key 'seed' is in line 2 and again in line 3"),
        (b"score: {\n", "params.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_not_one_mapping_said_once_is_refused(content, message, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=message):
        load_params(path)
