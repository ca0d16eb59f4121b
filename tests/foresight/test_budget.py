"""Shares that cannot be removed: found exactly where every choice of units is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.engine.errors import BudgetError
from libprune.foresight.budget import SAFE, budget_faults, removable
from libprune.pipeline.methods import METHODS
from libprune.pipeline.params import validate_params
from libprune.pipeline.sections import Allocate
from tests.support.models import FAMILIES
from tests.support.params import untrained
from tests.support.shapes import Shape
from tests.support.tiny import write_model

shapes = st.builds(
    Shape,
    layers=st.integers(1, 4),
    kv=st.integers(1, 4),
    ffn=st.integers(1, 12),
    expressible=st.none() | st.just((4,)),
)
limits = st.fixed_dictionaries(
    {
        "method": st.sampled_from(sorted(set(METHODS) - {"retention"})),
        "ratio": st.floats(0.02, 0.98),
        "min_groups": st.integers(0, 4),
        "min_channels": st.integers(0, 12),
        "channel_multiple": st.sampled_from([1, 3, "auto"]),
        "freeze_first": st.integers(0, 2),
        "freeze_last": st.integers(0, 2),
        "depth": st.sampled_from(["none", "units"]),
        "shape": st.sampled_from(["auto", "per_layer"]),
        "ratio_of": st.sampled_from(["decoder", "total"]),
    }
)


def refused(*args: object) -> bool:
    try:
        allocate(*args)
    except BudgetError:
        return True
    return False


@settings(max_examples=150)
@given(shapes, limits, st.integers(0, 2**31))
def test_what_is_said_to_be_out_of_reach_is_refused_whatever_the_scores(shape, limits, seed):
    params = Allocate(**limits)
    try:
        removable(shape.architecture(), params)
    except BudgetError:
        scores = shape.table(np.random.default_rng(seed).random(len(shape.unit_costs())))
        assert refused(shape.architecture(), scores, params, shape.evidence(params.method, seed))


@settings(max_examples=60)
@given(shapes, limits, st.integers(0, 2**31))
def test_of_the_plain_method_all_that_is_refused_is_found(shape, limits, seed):
    params = Allocate(**limits | {"method": "uniform"})
    scores = shape.table(np.random.default_rng(seed).random(len(shape.unit_costs())))
    if refused(shape.architecture(), scores, params):
        with pytest.raises(BudgetError):
            removable(shape.architecture(), params)


@pytest.mark.parametrize("kv", [1, 4])
def test_what_is_not_looked_at_can_be_removed(kv):
    shape = Shape(layers=4, kv=kv, d=2, q=2, model=64, ffn=256, gates=1)
    removable(shape.architecture(), Allocate(ratio=SAFE))


def told(model: str, repair: str = "none", criterion: str = "unit_fisher", **allocation: object) -> list[str]:
    data = untrained()
    data["prepare"]["model"], data["slice"]["repair"], data["score"]["criterion"] = model, repair, criterion
    data["allocate"] |= {"method": "uniform"} | allocation
    return [fault.text for fault in budget_faults(validate_params(data, ""))]


def test_a_model_that_lies_here_is_described_where_the_share_is_much(tmp_path):
    model = str(write_model(tmp_path / "model"))
    (fault,) = told(model, ratio=0.9)
    assert "allocate.ratio = 0.9 of the decoder parameters cannot be removed" in fault
    (fault,) = told(model, ratio=0.45, min_channels=40, method="search")
    assert "search removes at most 0." in fault
    assert told(model, ratio=0.45, min_channels=40, method="search", width="auto") == [], "columns may go too"
    assert told(model, ratio=0.6) == []
    assert told(model, "bias") == [], "the config of a Llama can say biases"
    other = FAMILIES["phi3"](0)
    other.save_pretrained(tmp_path / "other")
    (fault,) = told(str(tmp_path / "other"), "bias")
    assert "slice.repair: bias needs a bias on the maps" in fault
    assert told("owner/model", ratio=0.9) == told("owner/model", width=3) == []
    assert told(model, ratio=0.9, objective="latency") == []


def test_a_width_and_a_criterion_that_a_model_cannot_have_are_told(tmp_path):
    for name in ("bert", "mixtral", "llama_mha", "qwen3_moe", "gemma4_text"):
        FAMILIES[name](0).save_pretrained(tmp_path / name)
    for width in (3, "auto"):
        more = {"method": "search", "evaluations": 0} if width == "auto" else {}
        (fault,) = told(str(tmp_path / "bert"), width=width, **more)
        assert "the residual stream of a bert model cannot be narrower" in fault
    (fault,) = told(str(tmp_path / "llama_mha"), width=36)
    assert "the residual stream of this model has 36 columns" in fault
    assert told(str(tmp_path / "llama_mha"), width=24, ratio=0.4) == []
    (fault,) = told(str(tmp_path / "llama_mha"), width=24, ratio=0.1)
    assert "allocate.width = 24 alone takes 0.333 of the decoder parameters" in fault
    (fault,) = told(str(tmp_path / "gemma4_text"), depth="cosine")
    assert "no layer of family 'gemma4_text' can be deleted: some of its layers use the units of others" in fault
    assert told(str(tmp_path / "llama_mha"), depth="cosine") == []
    (fault,) = told(str(tmp_path / "qwen3_moe"), objective="latency")
    assert "the layers of this model are not alike" in fault
    assert told(str(tmp_path / "llama_mha"), objective="latency") == []
    for name, number in (("mixtral", 1), ("llama_mha", 0)):
        faults = told(str(tmp_path / name), criterion="cooperative")
        assert ["cooperative compares inputs" in fault for fault in faults] == [True] * number
