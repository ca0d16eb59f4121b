"""Times of layers: which widths are built, the lines through them, and the stages from times to a plan."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine import cost
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.models.folder import fingerprint
from libprune.pipeline.atomic import write_json
from libprune.pipeline.sections import Latency
from libprune.statistics import latency
from libprune.statistics.latency import Timing, fit_lines, measured_widths, time_layers
from tests.support import tiny
from tests.support.models import KINDS, MODELS
from tests.support.shapes import Shape, shapes


@given(shapes(), st.integers(2, 6))
def test_one_part_at_a_time_is_measured_at_counts_that_the_config_can_say(shape, number):
    architecture = shape.architecture()
    if not any(entry.says(n) for part, entry in architecture.parts.items() for n in range(1, shape.units[part])):
        with pytest.raises(LibpruneError, match="cannot say a smaller layer"):
            measured_widths(architecture, number)
        return
    dense, *others = measured_widths(architecture, number)
    assert dense == shape.units
    for part, entry in architecture.parts.items():
        counts = [width[part] for width in others if width[part] < dense[part]]
        sayable = [n for n in range(1, dense[part]) if entry.says(n)]
        assert len(counts) == len(set(counts)) == min(number - 1, len(sayable))
        assert set(counts) <= set(sayable)
        assert sayable[:1] == counts[:1]
    assert all(sum(width[part] < dense[part] for part in dense) == 1 for width in others)


def parameters_of(model: Any, ids: torch.Tensor, **more: Any) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


@pytest.mark.parametrize("name", [*(name for name in KINDS if name != "qwen3_moe"), "qwen3_vl"])
def test_the_layers_that_are_timed_have_the_widths(name, monkeypatch):
    """With the number of parameters in place of the time, the lines are the costs that the axes give."""
    monkeypatch.setattr(latency, "_seconds", parameters_of)
    model = MODELS[name](0)
    architecture = describe(model)
    timing = time_layers(model.config, architecture, torch.device("cpu"), torch.float32, Latency(widths=4, rounds=1))
    found = fit_lines(architecture, timing)
    fixed = sum(
        architecture.numel(p) for p in architecture.parameters if p.layer == 0 and p.part not in architecture.parts
    )
    for part, shape in architecture.parts.items():
        unit, units = cost.unit_parameters(architecture, 0, part), architecture.units(part)
        timed = any(shape.says(count) for count in range(1, units))  # others belong to what every layer takes
        assert found["unit"][part] == pytest.approx(unit if timed else 0)
        fixed += cost.part_overhead(architecture, 0, part) + (0 if timed else unit * units)
    assert found["fixed"] == pytest.approx(fixed)
    unread = sum(map(architecture.numel, (parameter for parameter in architecture.parameters if parameter.whole)))
    assert found["outside"] == architecture.total_parameters - architecture.decoder_parameters - unread
    assert found["misfit"] == pytest.approx(0, abs=1e-9)


def test_layers_of_several_kinds_are_refused_by_the_parts_that_only_some_have():
    model = MODELS["qwen3_moe"](0)
    with pytest.raises(LibpruneError, match="only some have mlp and experts"):
        measured_widths(describe(model), 4)


WIDTHS = tuple({"attention": a, "mlp": m} for a, m in ((4, 12), (2, 12), (1, 12), (4, 8), (4, 4)))


@pytest.mark.parametrize("slope", [-0.3, 1e-4])
def test_a_part_whose_time_is_noise_has_no_price_and_the_other_is_fitted_alone(slope):
    """Otherwise the last gap of a budget would be filled with units that are almost free."""
    noise = np.array([0.01, -0.01, 0.01, -0.01, 0.01])
    times = 3 + 0.5 * np.array([w["mlp"] for w in WIDTHS]) + slope * np.array([w["attention"] for w in WIDTHS]) + noise
    found = fit_lines(Shape().architecture(), Timing(WIDTHS, times, 1.0))
    assert found["unit"]["attention"] == 0
    line = np.polyfit([w["mlp"] for w in WIDTHS], times, 1)
    assert (found["unit"]["mlp"], found["fixed"]) == pytest.approx((line[0], line[1]))
    missed = np.abs(np.polyval(line, [w["mlp"] for w in WIDTHS]) - times).max()
    assert found["misfit"] == pytest.approx(missed / times[0])


def test_times_that_are_nothing_but_noise_are_refused():
    with pytest.raises(LibpruneError, match=r"no width changed the time.*latency\.rounds"):
        fit_lines(Shape().architecture(), Timing(WIDTHS, np.array([1.0, 2.0, 2.0, 1.9, 2.1]), 1.0))


def test_a_part_of_one_unit_is_not_timed():
    architecture = Shape(kv=1, ffn=128).architecture()
    widths = measured_widths(architecture, 5)
    assert [width["mlp"] for width in widths] == [128, 64]
    times = np.array([0.5 + 0.01 * width["mlp"] for width in widths])
    assert fit_lines(architecture, Timing(tuple(widths), times, 0.0))["unit"] == {
        "attention": 0,
        "mlp": pytest.approx(0.01),
    }


def stage(name: str, folder: Path) -> None:
    more = [folder / "metrics"] if name == "allocate" else []
    import_module(f"stages.{name}").main(folder / "params.yaml", folder / "artifacts", *more)


def test_the_stages_from_times_to_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_seconds", parameters_of)
    model, text = str(tiny.write_model(tmp_path / "model")), str(tiny.write_text(tmp_path / "text.txt"))
    asked = {"objective": "latency", "ratio": 0.2}
    tiny.write_params(tmp_path / "params.yaml", model, text, score={"criterion": "random"}, allocate=asked)
    for name in ("prepare", "tokenize", "gradients", "score"):
        stage(name, tmp_path)
    with pytest.raises(ArtifactError, match=r"latency\.json does not exist; run `dvc repro latency`"):
        stage("allocate", tmp_path)
    write_json(tmp_path / "artifacts/latency.json", {"model": fingerprint(tmp_path / "artifacts/model")})
    with pytest.raises(ArtifactError, match="holds no times"):
        stage("allocate", tmp_path)
    for name in ("latency", "allocate"):
        stage(name, tmp_path)
    lines = json.loads((tmp_path / "artifacts/latency.json").read_text())
    assert len(lines["widths"]) == len(lines["seconds"]) == 1 + 2 + 4
    assert (lines["tokens"], lines["device"], lines["dtype"]) == (256, "cpu", "float32")
    told = json.loads((tmp_path / "metrics/allocation.json").read_text())
    assert told["objective"] == "latency"
    dearest = max(lines["unit"].values()) * 4 / (told["target"] / 0.2 / 1e12)
    assert told["share_removed"] == pytest.approx(0.2, abs=dearest)
