"""The sections of params.yaml: a value out of range or of another type is refused with its place."""

import re
from functools import partial
from typing import Any

import pytest

from libprune.engine.errors import ParamsError
from libprune.pipeline.sections import Allocate, Recover, Score, Share
from tests.support.params import PLACES, shipped, write_and_load


@pytest.fixture
def load(tmp_path):
    """Writes a text or the given content as a params file and reads it."""
    return partial(write_and_load, tmp_path / "params.yaml")


def test_params_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load(shipped()).allocate.ratio = 0.5


@pytest.mark.parametrize("place", [place for place in PLACES if len(place) == 2], ids=".".join)
def test_a_value_of_another_type_is_refused_with_its_place(load, place):
    data = shipped()
    nested = isinstance(data[place[0]][place[1]], dict) or place == ("prepare", "vocabulary")  # null, or a mapping
    data[place[0]][place[1]] = 0.5 if nested else {"a": "mapping"}
    with pytest.raises(ParamsError, match=rf"params\.yaml, line \d+: {re.escape('.'.join(place))}: "):
        load(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("allocate.ratio", 0),
        ("allocate.ratio", 1),
        ("allocate.ratio", -0.2),
        ("allocate.ratio", float("nan")),
        ("allocate.ratio", "0.2"),
        ("allocate.ratio", True),
        ("allocate.min_groups", -1),
        ("allocate.min_channels", 1.5),
        ("allocate.channel_multiple", 0),
        ("allocate.freeze_first", True),
        ("allocate.depth", True),
        ("allocate.method", "Uniform"),
        ("tokenize.evaluation_share", 1.0),
        ("tokenize.calibration_length", 1),
        ("tokenize.calibration_sequences", 0),
        ("tokenize.seed", None),
        ("prepare.model", 3),
        ("prepare.dtype", "bf16"),
        ("prepare.accept_config", [1]),
        ("compute.batch_tokens", "1024"),
        ("gradients.sequences", 0),
        ("hessian.estimator", None),
        ("score.scaling", "z-score"),
        ("score.cooperative_threshold", 1),
        ("score.gradient_flow", {"snr": -0.1}),
        ("score.cooperative", {"connection": 0, "uniqueness": 0, "centrality": 0, "cooperation": 0}),
        ("slice.damping", 0),
        ("recover.method", "qlora"),
        ("recover.length", 1),
        ("recover.tokens", 0),
        ("recover.held_out", 0),
        ("recover.batch_tokens", 0),
        ("recover.temperature", 0),
        ("recover.temperature", 101),
        ("recover.cross_entropy", 1.1),
        ("recover.hidden_states", -1),
        ("recover.top_k", 0),
        ("recover.optimizer", "sgd"),
        ("recover.learning_rate", 0),
        ("recover.warmup", 1),
        ("recover.schedule", "step"),
        ("recover.clip", -1),
        ("recover.dtype", "float16"),
        ("recover.lora_rank", 0),
        ("recover.lora_targets", []),
        ("recover.seed", -1),
        ("evaluate.rounds", 0),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused_with_its_place(load, place, value):
    section, key = place.split(".")
    data = shipped()
    data[section][key] = value
    with pytest.raises(ParamsError, match=rf"params\.yaml, line \d+: {section}\.{key}\S*: "):
        load(data)


def test_an_infinite_damping_is_refused(load):
    data = shipped()
    data["slice"]["damping"] = float("inf")
    with pytest.raises(ParamsError, match=r"slice\.damping"):
        load(data)


@pytest.mark.parametrize(
    "threshold",
    [0.5, 1e-3, -25.0, "blockwise", "percentile:25"],
)
def test_a_threshold_is_a_number_of_nats_or_one_of_the_words(threshold):
    assert Allocate(threshold=threshold).threshold == threshold


@pytest.mark.parametrize("threshold", ["half", "percentile:101", "percentile:-1", "percentile:", "1e", "layer"])
def test_another_threshold_is_refused_with_the_words(threshold):
    with pytest.raises(
        ValueError, match="is neither a number of nats, nor blockwise, layerwise or percentile:0 to 100"
    ):
        Allocate(threshold=threshold)


def test_criteria_are_listed_by_the_keys_that_apply():
    assert Score(criterion="taylor").expressions == {"criterion": "taylor"}
    assert Score(criterion="taylor", mlp="wanda").expressions == {"criterion": "taylor", "mlp": "wanda"}
    assert Score(attention="snip", mlp="wanda").expressions == {"attention": "snip", "mlp": "wanda"}


# The text to train on


def test_a_text_to_train_on_is_none_one_or_several_with_shares(load):
    data = shipped()
    assert load(data).recover.text is None
    data["recover"]["text"] = "./chat.jsonl"
    assert load(data).recover.text == "./chat.jsonl"
    data["recover"]["text"] = [
        {"text": "c4", "share": 0.75},
        {"text": "chat.jsonl", "share": 0.25, "column": "messages", "streaming": False},
    ]
    texts = (Share(text="c4", share=0.75), Share(text="chat.jsonl", share=0.25, column="messages", streaming=False))
    assert load(data).recover.text == texts
    data["recover"]["text"] = [{"text": "owner/data", "share": 1, "config": "a", "revision": "b", "split": "dev"}]
    assert load(data).recover.text == (Share(text="owner/data", share=1.0, config="a", revision="b", split="dev"),)


FIRST = "recover.text[0]"
KEYS = "text, share, config, revision, split, column, streaming"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "recover.text: Input should be a text, or a list of texts, each with the keys text and share"),
        ({"text": "a", "share": 1}, "recover.text: Input should be a text, or a list of texts, each with the keys"),
        ([], "recover.text lists no text; null trains on the documents of the calibration text"),
        (["a"], f"recover.text[0]: expected keys with values, found the text 'a'; the keys are {KEYS}"),
        (
            [{"text": "a", "share": 2}],
            f"{FIRST}.share: expected a number at most 1, found 2; write 0.02 for 2 %",
        ),
        ([{"text": "a", "share": 0}], "recover.text[0].share: expected a number above 0, found 0"),
        (
            [{"text": "a", "share": "50 %"}],
            f"{FIRST}.share: expected a number, found the text '50 %'; write 0.5",
        ),
        ([{"text": "a", "share": 0.5}, {"text": "b"}], "recover.text[1].share is missing"),
        ([{"share": 1}], "recover.text[0].text is missing"),
        ([{"text": 3, "share": 1}], "recover.text[0].text: expected a text, found 3"),
        (
            [{"text": "a", "share": 1, "colum": "b"}],
            f"unknown key 'recover.text[0].colum'; did you mean 'column'? (known: {KEYS})",
        ),
        ([{"text": "a", "share": 0.5}], "the shares of recover.text make 0.5, not 1"),
        ([{"text": "a", "share": 0.7}, {"text": "b", "share": 0.7}], "the shares of recover.text make 1.4, not 1"),
    ],
    ids=str,
)
def test_a_wrong_text_to_train_on_is_refused_with_its_place_alone(load, text, message):
    data = shipped()
    data["recover"]["text"] = text
    with pytest.raises(ParamsError) as error:
        load(data)
    assert message in str(error.value)
    assert str(error.value).count("recover.text") == message.count("recover.text"), "nothing else is said"


def test_shares_make_one_up_to_rounding():
    third = 1 / 3
    assert Recover(text=tuple(Share(text=name, share=third) for name in "abc")).text is not None
    with pytest.raises(ValueError, match=r"make 0\.99, not 1"):
        Recover(text=tuple(Share(text=name, share=0.33) for name in "abc"))


def test_hidden_states_need_the_dense_model_and_not_its_stored_predictions(load):
    data = shipped()
    data["recover"] |= {"top_k": 8, "hidden_states": 1.0}
    with pytest.raises(ParamsError, match=r"recover\.hidden_states needs the dense model itself; set recover\.top_k"):
        load(data)
    for key, value in (("top_k", None), ("hidden_states", 0.0)):
        assert load(data | {"recover": data["recover"] | {key: value}})


@pytest.mark.parametrize(("key", "value"), [("temperature", 2.0), ("top_k", 8), ("teacher", "other")])
def test_what_only_another_models_predictions_need_is_refused_beside_cross_entropy_alone(load, key, value):
    data = shipped()
    data["recover"] |= {"cross_entropy": 1.0, key: value}
    with pytest.raises(ParamsError, match=rf"compares no predictions .* recover\.{key} changes nothing"):
        load(data)
    assert load(data | {"recover": data["recover"] | {"cross_entropy": 0.5}}).recover.compares


def test_the_learning_rate_is_the_methods_if_none_is_given():
    assert [Recover(method=method).rate for method in ("none", "full", "lora")] == [1e-4, 1e-4, 1e-3]
    assert Recover(method="lora", learning_rate=0.5).rate == 0.5


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_a_cpu_or_a_cuda_gpu(load, name):
    assert load(shipped() | {"compute": {"device": name}}).compute.device == name


@pytest.mark.parametrize(
    "name", ["gpu", "CUDA", "cuda0", "nvidia", "", "mps", "mps:0", "xpu", "meta", "cuda:", "cpu:0"]
)
def test_a_name_of_no_device_that_can_be_used_is_refused(load, name):
    lacks = "; Apple's GPUs have no float64, in which sums are kept" if name.startswith("mps") else ""
    message = f"compute.device: {name!r} is no device that libprune runs on{lacks}; write auto, cpu, cuda or cuda:0"
    with pytest.raises(ParamsError, match=re.escape(message)):
        load(shipped() | {"compute": {"device": name}})


@pytest.mark.parametrize("key", ["prepare.model", "tokenize.text", "tokenize.evaluation_text", "recover.teacher"])
def test_a_source_is_neither_empty_nor_an_address(load, key):
    section, name = key.split(".")
    for value, message in (
        (" ", f"{key}: names no source; null is none, and the folder that libprune runs in is ./"),
        ("https://me:pass@host/t.txt", f"{key}: https://***@host/t.txt is an address; download it"),
    ):
        data = shipped()
        data[section][name] = value
        with pytest.raises(ParamsError, match=re.escape(message)) as caught:
            load(data)
        assert "pass" not in str(caught.value)


def test_at_most_as_many_texts_are_listed_as_dvc_watches(load):
    data = shipped()
    data["recover"]["text"] = [{"text": "a", "share": 1 / 9}] * 9
    with pytest.raises(ParamsError, match=r"recover\.text: .*at most 8"):
        load(data)


# Several texts to calibrate on


def listed(**keys: Any) -> dict[str, Any]:
    """The section tokenize with two texts."""
    data = shipped()
    data["tokenize"] |= {"text": [{"text": "a", "share": 0.5}, {"text": "b", "share": 0.5}]} | keys
    return data


def test_the_calibration_text_may_be_several(load):
    assert load(listed()).tokenize.text == (Share(text="a", share=0.5), Share(text="b", share=0.5))
    judged = {"evaluation_text": "c", "evaluation_split": "dev", "evaluation_config": "en", "evaluation_column": "body"}
    assert load(listed(**judged)).tokenize.evaluation_split == "dev"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": []}, "tokenize.text lists no text; name one"),
        ({"text": 3}, "tokenize.text: Input should be a text, or a list of texts, each with the keys text and share"),
        ({"text": [{"text": "a", "share": 0.4}]}, "the shares of tokenize.text make 0.4, not 1"),
        (
            {"text": [{"text": "a", "share": 0.5}, {"text": "a", "share": 0.5}]},
            "tokenize.text lists the text a twice; list it once, with the sum of its shares",
        ),
        (
            {"column": "body"},
            "tokenize.column is of a single text; with a list, write column into the entries of tokenize.text",
        ),
        ({"streaming": False}, "tokenize.streaming is of a single text"),
        (
            {"evaluation_split": "test"},
            "tokenize.evaluation_split is of a single text, and tokenize.text is a list; name a "
            "tokenize.evaluation_text, or set it to null",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_several_texts_is_refused(load, keys, message):
    with pytest.raises(ParamsError) as error:
        load(listed(**keys))
    assert message in str(error.value)


def test_a_text_may_be_listed_with_other_keys_again(load):
    texts = [{"text": "a", "share": 0.5, "column": "x"}, {"text": "a", "share": 0.5, "column": "y"}]
    assert load(listed(text=texts)).tokenize.text != ()
