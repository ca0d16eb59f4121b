"""Times of layers: which widths are built, the lines through them, and budgets counted in them."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune import cost, latency
from libprune.allocation import decide, summary
from libprune.describe import describe
from libprune.errors import ArtifactError, LibpruneError
from libprune.latency import Timing, fit_lines, measured_widths, time_layers
from libprune.methods import Evidence
from libprune.params import Allocate, Latency
from libprune.plan import Plan
from tests import tiny
from tests.models import FAMILIES, random_plan
from tests.shapes import Shape, shapes

META = {"criterion": "random", "comparable": True, "scaling": "none"}
seconds = st.floats(1e-6, 1e-2)


@given(shapes(), st.integers(2, 6))
def test_one_part_at_a_time_is_measured_at_counts_that_the_config_can_say(shape, number):
    architecture = shape.architecture()
    if any(not any(entry.says(n) for n in range(1, shape.units[part])) for part, entry in architecture.parts.items()):
        with pytest.raises(LibpruneError, match="cannot say fewer than"):
            measured_widths(architecture, number)
        return
    dense, *others = measured_widths(architecture, number)
    assert dense == shape.units
    for part, entry in architecture.parts.items():
        counts = [width[part] for width in others if width[part] < dense[part]]
        sayable = [n for n in range(1, dense[part]) if entry.says(n)]
        assert len(counts) == len(set(counts)) == min(number - 1, len(sayable))
        assert set(counts) <= set(sayable)
        assert sayable[0] in counts
    assert all(sum(width[part] < dense[part] for part in dense) == 1 for width in others)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_that_are_timed_have_the_widths(name, monkeypatch):
    """With the number of parameters in place of the time, the lines are the costs that the axes give."""
    monkeypatch.setattr(latency, "_seconds", lambda model, ids: float(sum(p.numel() for p in model.parameters())))
    model = FAMILIES[name](0)
    architecture = describe(model)
    timing = time_layers(model.config, architecture, torch.device("cpu"), torch.float32, Latency(widths=4, rounds=1))
    found = fit_lines(architecture, timing)
    for part in architecture.parts:
        assert found["unit"][part] == pytest.approx(cost.unit_parameters(architecture, 0, part))
    overhead = sum(cost.part_overhead(architecture, 0, part) for part in architecture.parts)
    assert found["fixed"] == pytest.approx(overhead)
    assert found["outside"] == architecture.total_parameters - architecture.decoder_parameters
    assert found["misfit"] == pytest.approx(0, abs=1e-9)


@given(shapes(), seconds, seconds, seconds, seconds)
def test_a_budget_of_time_counts_what_the_lines_say(shape, fixed, group, channel, outside):
    architecture = shape.architecture()
    lines = {"unit": {"attention": group, "mlp": channel}, "fixed": fixed, "outside": outside}
    prices = cost.prices(architecture, "latency", lines)
    plan = random_plan(architecture, "holes" if shape.layers > 2 else "per_layer")

    def expected(plan: Plan) -> float:
        units = [(group if part == "attention" else channel) * keep.sum() for (_, part), keep in plan.keep.items()]
        return shape.layers * fixed + float(sum(units))

    dense = Plan.dense(architecture)
    assert prices.decoder == pytest.approx(1e12 * expected(dense), rel=1e-5)
    assert prices.total == pytest.approx(prices.decoder + 1e12 * outside, rel=1e-5)
    assert prices.decoder - prices.removed(plan) == pytest.approx(1e12 * expected(plan), rel=1e-5)


@pytest.mark.parametrize("method", ["uniform", "global", "search"])
def test_the_budget_of_time_is_met_and_what_is_slow_goes_first(method):
    """A group takes as long as six channels here, and has 48 of 180 parameters of a layer's four."""
    shape = Shape(layers=4, kv=6, ffn=24)
    architecture = shape.architecture()
    lines = {"unit": {"attention": 6e-6, "mlp": 1e-6}, "fixed": 0.0, "outside": 1e-3}
    given = Evidence(curves=shape.evidence("search").curves, latency=lines)
    scores = shape.table(1.0 + np.random.default_rng(0).permutation(len(shape.unit_costs())))
    params = Allocate(method=method, ratio=0.25, objective="latency", shape="per_layer")
    told = summary(architecture, decide(architecture, scores, META, params, given), params)
    assert told["target"] == round(0.25 * 4 * (6 * 6 + 24) * 1e6)
    assert told["share_removed"] == pytest.approx(0.25, abs=0.03)


def test_a_global_order_is_by_importance_for_the_time_saved():
    """All importances equal: of what saves twice the time the more goes."""
    shape = Shape(layers=1, kv=4, ffn=12)
    architecture = shape.architecture()
    scores = shape.table(1 / shape.unit_costs())
    for dear, other, slow in (("attention", "mlp", (2e-6, 1e-6)), ("mlp", "attention", (1e-6, 2e-6))):
        lines = {"unit": dict(zip(("attention", "mlp"), slow, strict=True)), "fixed": 0.0, "outside": 0.0}
        ratio = 4e-6 / (4 * slow[0] + 12 * slow[1])  # two of what is slow
        params = Allocate(method="global", ratio=ratio, objective="latency", shape="per_layer")
        plan = decide(architecture, scores, META, params, Evidence(latency=lines)).plan
        assert plan.kept(0, dear) < shape.units[dear]
        assert plan.kept(0, other) == shape.units[other]


def test_a_line_never_falls_and_nothing_but_noise_is_refused():
    architecture = Shape().architecture()
    widths = ({"attention": 4, "mlp": 12}, {"attention": 2, "mlp": 12}, {"attention": 4, "mlp": 6})
    found = fit_lines(architecture, Timing(widths, np.array([4.0, 5.0, 1.0]), 1.0))
    assert found["unit"]["attention"] == 0
    assert found["unit"]["mlp"] == pytest.approx(0.5)
    assert found["misfit"] > 0
    with pytest.raises(LibpruneError, match=r"no width changed the time.*latency\.rounds"):
        fit_lines(architecture, Timing(widths, np.array([1.0, 2.0, 2.0]), 1.0))


def stage(name: str, folder: Path) -> None:
    more = [folder / "metrics"] if name == "allocate" else []
    import_module(f"stages.{name}").main(folder / "params.yaml", folder / "artifacts", *more)


def test_the_stages_from_times_to_a_plan(tmp_path):
    model, text = str(tiny.write_model(tmp_path / "model")), str(tiny.write_text(tmp_path / "text.txt"))
    asked = {"objective": "latency", "ratio": 0.2}
    tiny.write_params(tmp_path / "params.yaml", model, text, score={"criterion": "random"}, allocate=asked)
    for name in ("prepare", "score"):
        stage(name, tmp_path)
    with pytest.raises(ArtifactError, match=r"latency\.json does not exist; run `dvc repro latency`"):
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
