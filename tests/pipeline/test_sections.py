"""The sections of params.yaml: a value out of range or of another type is refused with its place."""

import re
from functools import partial

import pytest

from libprune.engine.errors import ParamsError
from libprune.pipeline.sections import Allocate, Score
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
    nested = isinstance(data[place[0]][place[1]], dict)
    data[place[0]][place[1]] = 0.5 if nested else {"a": "mapping"}
    with pytest.raises(ParamsError, match=rf"params\.yaml: {re.escape('.'.join(place))}: "):
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
        ("allocate.allow_layer_removal", 1),
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
        ("evaluate.rounds", 0),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused_with_its_place(load, place, value):
    section, key = place.split(".")
    data = shipped()
    data[section][key] = value
    with pytest.raises(ParamsError, match=rf"params\.yaml: {section}\.{key}\S*: "):
        load(data)


def test_an_infinite_damping_is_refused(load):
    data = shipped()
    data["slice"]["damping"] = float("inf")
    with pytest.raises(ParamsError, match=r"slice\.damping"):
        load(data)


@pytest.mark.parametrize(
    ("threshold", "read"),
    [(0.5, 0.5), ("1e-3", 1e-3), ("-2.5E1", -25.0), ("blockwise", "blockwise"), ("percentile:25", "percentile:25")],
)
def test_a_threshold_is_a_number_of_nats_or_one_of_the_words(threshold, read):
    assert Allocate(threshold=threshold).threshold == read


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
