"""Mistakes that the params alone show: they are found, and what would run is let alone."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.foresight import settings as foresight
from libprune.foresight.settings import setting_faults
from libprune.pipeline.methods import METHODS, allocation_reads
from libprune.pipeline.params import PRESETS, Params, validate_params
from libprune.scoring.criteria import CRITERIA
from tests.support.params import untrained

SECTIONS = ("gradients", "hessian", "activations", "ablation", "sensitivity", "levels", "width", "slice")


def params(**changes: dict[str, Any]) -> Params:
    """The shipped params, without training, with changes by section."""
    data = untrained()
    return validate_params({k: v | changes.get(k, {}) if isinstance(v, dict) else v for k, v in data.items()}, "")


def told(**changes: dict[str, Any]) -> list[str]:
    """The texts of the faults of changed params."""
    return [fault.text for fault in setting_faults(params(**changes))]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_presets_choose_has_no_fault(preset):
    assert list(setting_faults(validate_params(untrained() | {"preset": preset}, ""))) == []


ODD = [
    *("", " ", "taylor,", "taylor, wanda", "taylor wanda", "taylor & wanda", "taylor and wanda", "taylor/wanda"),
    *("taylor+", "+taylor", "taylor++wanda", "taylor - wanda", "-taylor", "-0.5*taylor", "0.5 taylor", "0.5taylor"),
    *("taylor*0.5", "0.5**taylor", "1e-1*taylor", "0,5*taylor + wanda", "50%*taylor", "(taylor + wanda)", "[taylor]"),
    *("'taylor'", "Taylor", "TAYLOR", "taylor_", "tailor", "unit-fisher", "unit fisher", "unitfisher", "none", "null"),
    *("auto", "taylor + taylor", "0*taylor", "nan*taylor", "inf*taylor", "٣*taylor", f"{'9' * 400}*taylor", "taylor;"),
    *("score.taylor", "taylor\n+", "0.5*", "*", "+", "0.5", "taylor = 1", "taylor: 1", "0.5*taylor*2"),
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("key", ["criterion", "attention", "mlp"])
def test_an_odd_spelling_of_criteria_is_found_under_its_key(text, key):
    faults = [fault for fault in setting_faults(params(score={key: text})) if "allocate" not in fault.text]
    if key == "criterion" and text == "auto":  # the word for what the preset chooses
        assert faults == []
        return
    assert faults and all(fault.place == ("score", key) for fault in faults)
    assert len(faults) == len({fault.text for fault in faults}) <= text.count("+") + 1


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("Taylor", "taylor"),
        ("tailor", "taylor"),
        ("0.5*wnada", "wanda"),
        ("unit-fisher", "unit_fisher"),
        ("-taylor", "taylor"),
    ],
)
def test_the_nearest_criterion_is_told(text, near):
    (fault,) = told(score={"criterion": text})
    assert f"did you mean '{near}'?" in fault


def test_every_fault_of_an_expression_is_told():
    assert len(told(score={"criterion": "tailor + 0.5*wnada + Obs", "scaling": "rank"})) == 3


@given(
    names=st.lists(st.sampled_from(sorted(CRITERIA)), min_size=1, max_size=3, unique=True),
    weights=st.lists(st.floats(0.01, 9).map(lambda weight: f"{weight:.3f}"), min_size=3, max_size=3),
)
@settings(max_examples=40)
def test_what_reads_as_criteria_is_no_fault(names, weights):
    text = " + ".join(f"{weight}*{name}" for weight, name in zip(weights, names, strict=False))
    assert told(score={"criterion": text, "scaling": "rank"}, hessian={"estimator": "fisher"}) == []


@pytest.mark.parametrize("name", [name for name, record in CRITERIA.items() if "hessian" in record.stages])
@pytest.mark.parametrize("key", ["criterion", "attention", "mlp"])
def test_a_criterion_whose_statistics_are_switched_off_is_found(name, key):
    faults = told(score={key: name})
    assert [f"score.{key}: {name} needs the hessian stage" in fault for fault in faults] == [True]
    assert told(score={key: name}, hessian={"estimator": "hutchinson"}) == []


@pytest.mark.parametrize("fusion", ["learned", "best"])
def test_a_fusion_by_measured_losses_needs_some(fusion):
    score = {"criterion": "taylor + wanda", "fusion": fusion}
    assert ["ablation.units: 0 measures none" in fault for fault in told(score=score)] == [True]
    assert told(score=score, ablation={"units": 400}) == []
    assert told(score=score | {"criterion": "taylor"}) == [], "one criterion is not fused"


def test_criteria_that_do_not_add_up_and_methods_that_do_not_take_them_are_found():
    assert ["adds unlike things" in fault for fault in told(score={"criterion": "taylor + wanda"})] == [True]
    (fault,) = told(score={"criterion": "wanda"}, allocate={"method": "global"})
    assert "compares only within a layer and part" in fault
    split = {"method": "uniform", "split": "importance"}
    (fault,) = told(score={"criterion": "wanda"}, allocate=split)
    assert "allocate.split: importance would add up unlike things" in fault
    assert told(score={"criterion": "wanda"}, allocate=split | {"split": "auto"}) == []
    assert told(score={"criterion": "unit_fisher"}, allocate=split) == []
    (fault,) = told(score={"criterion": "wanda", "scaling": "zscore"}, allocate={"method": "retention"})
    assert "retention" in fault and "zscore" in fault
    assert len(told(allocate={"worth": "functional"})) == 1
    assert len(told(score={"criterion": "wanda"}, allocate={"gradient_fix": "adaptive"})) == 1
    assert told(score={"criterion": "wanda", "scaling": "rank"}, allocate={"method": "global"}) == []


@given(
    stored=st.integers(8, 40),
    fitted=st.none() | st.integers(8, 60),
    asked=st.fixed_dictionaries({section: st.none() | st.integers(8, 60) for section in SECTIONS}),
    method=st.sampled_from(sorted(METHODS)),
    on=st.booleans(),
)
@settings(max_examples=60)
def test_sequences_beyond_those_tokenized_are_found_where_they_are_used(stored, fitted, asked, method, on):
    changes: dict[str, dict[str, Any]] = {section: {"sequences": number} for section, number in asked.items()}
    changes["hessian"]["estimator"], changes["ablation"]["units"] = ("fisher", 9) if on else ("none", 0)
    changes |= {"allocate": {"method": method}, "tokenize": {"calibration_sequences": stored}}
    changes["tokenize"]["repair_sequences"] = fitted
    used = {"gradients", "activations", "slice", *allocation_reads(method)} | ({"hessian", "ablation"} if on else set())
    found = {fault.place[0] for fault in setting_faults(params(**changes)) if fault.place[1] == "sequences"}
    most = dict.fromkeys(SECTIONS, stored) | {"slice": fitted or stored}
    assert found == {section for section in used & set(SECTIONS) if (asked[section] or 0) > most[section]}


@pytest.mark.parametrize("repair", ["local", "sequential", "bias", "none"])
@pytest.mark.parametrize("number", [7, 8])
def test_too_few_sequences_to_choose_a_damping_are_found(repair, number):
    used = {section: {"sequences": number} for section in ("gradients", "sensitivity", "levels")}
    changes = used | {"slice": {"repair": repair}, "tokenize": {"calibration_sequences": number}}
    found = told(**changes)
    assert bool(found) == (number == 7 and repair in {"local", "sequential"})
    assert told(**(changes | {"slice": {"repair": repair, "damping": 0.01}})) == []


@pytest.mark.parametrize("method", METHODS)
def test_one_width_is_refused_where_each_layer_has_its_own(method):
    found = told(allocate={"method": method, "shape": "uniform"})
    assert bool(found) == (method not in {"uniform", "search"})
    frozen = told(allocate={"method": "uniform", "shape": "uniform", "freeze_first": 1})
    assert ["freeze_first keeps layers wider" in fault for fault in frozen] == [True]


def test_packages_that_are_not_installed_are_named_with_their_command(monkeypatch):
    changes: dict[str, Any] = {
        "recover": {"method": "lora", "optimizer": "adamw_bnb_8bit"},
        "evaluate": {"tasks": ["piqa"]},
        "export": {"formats": ["gguf", "onnx", "openvino"]},
    }
    for module in (foresight, pytest.importorskip("libprune.export.packages")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = told(**changes)
    for package in (
        "'libprune[lora]'",
        "bitsandbytes",
        "'libprune[tasks]'",
        "'libprune[onnx]'",
        "'libprune[openvino]'",
    ):
        assert sum(f"pip install {package}" in fault for fault in found) == 1
    assert len(found) == 5
    for module in (foresight, pytest.importorskip("libprune.export.packages")):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert told(**changes) == []
