"""The ablation stage: which units are drawn, and their loss increases against a direct computation."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, PartShape
from libprune.engine.axes import parse_expr
from libprune.engine.describe import describe
from libprune.engine.errors import StatisticsError
from libprune.engine.surgery import masked
from libprune.models.compute import sequence_losses
from libprune.models.folder import fingerprint, load_model
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.statistics.ablation import ablation_table, measure_ablation, sample_units, unit_plans
from tests.support.closure import run_without_torch
from tests.support.measured import (
    AT_ONCE,
    LENGTH,
    PASSES,
    SEQUENCES,
    USED,
    interrupt,
    params,
    patch_losses,
    run_stage,
    write_project,
)
from tests.support.models import FAMILIES, tokens
from tests.support.shapes import plan_without

# Which units


def shapes(layers: int, attention: int, mlp: int) -> Architecture:
    """An architecture of which nothing is known but the numbers of units."""
    return Architecture(
        family="made by hand",
        sizes={"kv": attention, "channel": mlp},
        layers=layers,
        layers_path="h",
        parts={"attention": PartShape("kv", "attn", None, units="groups"), "mlp": PartShape("channel", "mlp", None)},
        parameters=(),
        maps=(),
        cache=parse_expr("kv"),
        head="causal_lm",
        head_macs=0,
    )


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 30))


@given(SHAPES, st.integers(0, 400), st.integers(0, 5))
def test_the_sample_is_of_the_size_asked_for_in_order_and_without_doubles(shape, count, seed):
    architecture = shapes(*shape)
    units = sample_units(architecture, count, seed)
    every = [(i, part, unit) for i, part in architecture.blocks() for unit in range(architecture.units(part))]
    assert len(units) == min(count, len(every))
    assert units == [unit for unit in every if unit in set(units)]
    assert units == sample_units(architecture, count, seed)


@given(SHAPES, st.integers(0, 400), st.integers(0, 5))
def test_parts_and_their_layers_give_alike_unless_they_have_no_more(shape, count, seed):
    architecture = shapes(*shape)
    drawn = Counter((layer, part) for layer, part, _ in sample_units(architecture, count, seed))
    by_part = {part: sum(drawn[i, part] for i in range(architecture.layers)) for part in architecture.parts}
    left = [part for part in by_part if by_part[part] < architecture.layers * architecture.units(part)]
    assert all(by_part[part] + 1 >= max(by_part.values()) for part in left)
    for part in architecture.parts:
        numbers = [drawn[layer, part] for layer in range(architecture.layers)]
        assert max(numbers) - min(numbers) <= 1


@given(st.integers(1, 12), st.integers(0, 99))
def test_a_sample_smaller_than_the_layers_is_at_even_distances(count, seed):
    units = sample_units(shapes(12, 3, 30), 2 * count, seed)
    for part in ("attention", "mlp"):
        layers = [layer for layer, name, _ in units if name == part]
        gaps = np.diff([*layers, layers[0] + 12])
        assert len(layers) == count
        assert gaps.max() - gaps.min() <= 1


def test_what_a_small_part_lacks_the_other_gives():
    drawn = Counter(part for _, part, _ in sample_units(shapes(3, 1, 30), 40, 0))
    assert drawn == {"attention": 3, "mlp": 37}


def test_every_unit_can_be_drawn_and_seeds_differ():
    architecture = shapes(4, 3, 13)
    samples = [sample_units(architecture, 8, seed) for seed in range(150)]
    assert len({unit for sample in samples for unit in sample}) == 4 * (3 + 13)
    assert samples[0] != samples[1]


# The measurement


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def project(request, tmp_path_factory) -> Path:
    """A folder with a model, its description, calibration tokens and params."""
    return write_project(FAMILIES[request.param](0), tmp_path_factory.mktemp("project"))


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_project(FAMILIES["llama"](0), tmp_path)


def direct(model: PreTrainedModel, architecture: Architecture, table: dict) -> np.ndarray:
    """Loss differences ``[units, sequences]`` of full passes, in the batches that the stage runs."""
    ids = tokens(SEQUENCES, LENGTH)[-USED:]

    def losses() -> np.ndarray:
        with torch.no_grad():
            return torch.cat([sequence_losses(model, Sequences(some)) for some in ids.split(AT_ONCE)]).double().numpy()

    rows = []
    for unit in zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True):
        with masked(model, architecture, plan_without(architecture, *unit)):
            rows.append(losses())
    return np.array(rows) - losses()


def test_the_increase_is_that_of_a_direct_computation(project, capsys):
    table, meta = run_stage(project)
    model = load_model(Layout(project / "artifacts").model, torch.float32)
    architecture = describe(model)
    units = list(zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True))
    assert units == sample_units(architecture, 12, 0)
    differences = direct(model, architecture, table)
    np.testing.assert_allclose(table["loss_increase"], differences.mean(1), rtol=1e-12)
    deviation = np.sqrt(((differences - differences.mean(1, keepdims=True)) ** 2).sum(1) / (USED - 1))
    np.testing.assert_allclose(table["standard_error"], deviation / np.sqrt(USED), rtol=1e-12)
    assert table["loss_increase"].all()
    assert (meta["units"], meta["seed"], meta["sequences"], meta["length"]) == (12, 0, USED, LENGTH)
    with torch.no_grad():
        used = Sequences(tokens(SEQUENCES, LENGTH)[-USED:])
        assert meta["loss"] == pytest.approx(float(sequence_losses(model, used).mean()))
    printed = capsys.readouterr().out
    assert "loss_increase attention" in printed
    assert f"12 units measured; dense loss {meta['loss']:.4f}" in printed


def test_a_program_gets_the_table_and_the_dense_loss_that_are_written(llama):
    layout, settings = Layout(llama / "artifacts"), load_params(llama / "params.yaml")
    table, loss = measure_ablation(layout, settings.compute, settings.ablation)
    written, meta = read_table(layout.ablation, "ablation")
    assert_same(table, written)
    assert loss == meta["loss"]


def test_one_sequence_has_no_standard_error(llama):
    table, _ = run_stage(llama, sequences=1)
    assert np.isnan(table["standard_error"]).all()
    assert np.isfinite(table["loss_increase"]).all()


def test_more_units_than_there_are_means_all(llama, capsys):
    table, meta = run_stage(llama, units=1000)
    assert meta["units"] == len(table["group_idx"]) == 4 * (3 + 13)
    assert "ablation.units is 1000, the model has 64 units: all are measured" in capsys.readouterr().out


def test_layers_without_a_measured_unit_of_a_part_are_printed_with_a_dash(llama, capsys):
    run_stage(llama, units=3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert all(len(line) == 3 for line in lines)
    assert any("-" in line for line in lines)


def test_the_order_and_number_of_rows_are_those_of_the_units():
    units = [(0, "mlp", 2), (1, "attention", 0)]
    table = ablation_table(units, np.array([[2.0, 4.0], [1.0, 1.0]]), np.array([1.0, 1.0]))
    assert table["loss_increase"].tolist() == [2.0, 0.0]
    assert table["standard_error"].tolist() == [1.0, 0.0]
    assert list(zip(*(table[name] for name in ("layer_idx", "group_type", "group_idx")), strict=True)) == units


def test_every_units_plan_removes_it_alone():
    architecture = shapes(3, 1, 4)
    plans = unit_plans(architecture, [(2, "mlp", 1), (0, "attention", 0)])
    assert list(plans) == ["mlp unit 1 of layer 2", "attention unit 0 of layer 0"]
    for plan, (layer, part, unit) in zip(plans.values(), [(2, "mlp", 1), (0, "attention", 0)], strict=True):
        gone = [(*block, int(i)) for block, keep in plan.keep.items() for i in np.flatnonzero(~keep)]
        assert gone == [(layer, part, unit)]
    assert plans["attention unit 0 of layer 0"].gone(0, "attention")


# Interruptions, processes, faults


def assert_same(table: dict, expected: dict) -> None:
    assert table.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name], values)


def test_a_run_that_was_interrupted_goes_on_where_it_stopped(llama, monkeypatch, capsys):
    expected, expected_meta = run_stage(llama)
    (llama / "artifacts/ablation.parquet").unlink()
    interrupt(monkeypatch, 7, lambda: run_stage(llama))
    assert not (llama / "artifacts/ablation.parquet").exists()
    passes = patch_losses(monkeypatch, lambda number, losses: losses)
    capsys.readouterr()
    table, meta = run_stage(llama)
    assert "7 of 12 are done" in capsys.readouterr().out
    assert len(passes) == PASSES * (1 + 5)
    assert meta == expected_meta
    assert_same(table, expected)
    assert not list((llama / ".work/ablation").glob("*"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"units": 11}, {"sequences": 3}])
def test_sums_of_another_sample_or_text_are_not_taken_up(llama, monkeypatch, change):
    expected, _ = run_stage(llama, **change)
    interrupt(monkeypatch, 4, lambda: run_stage(llama))
    assert_same(run_stage(llama, **change)[0], expected)


def test_the_unit_and_sequence_whose_loss_is_not_finite_are_named(llama, monkeypatch):
    layer, part, unit = sample_units(describe(FAMILIES["llama"](0)), 12, 0)[4]
    last = SEQUENCES - 1

    def poison(number, losses):
        return losses * torch.nan if number == PASSES * (1 + 4) + 1 else losses

    patch_losses(monkeypatch, poison)
    message = f"the loss without {part} unit {unit} of layer {layer} is not finite for calibration sequence {last};"
    with pytest.raises(StatisticsError, match=message):
        run_stage(llama)
    assert not (llama / "artifacts/ablation.parquet").exists()


def test_a_dense_loss_that_is_not_finite_is_named(llama, monkeypatch):
    patch_losses(monkeypatch, lambda number, losses: losses * torch.inf)
    first = SEQUENCES - USED
    with pytest.raises(StatisticsError, match=f"the loss of the dense model is not finite.* sequence {first};"):
        run_stage(llama)


def test_without_units_nothing_is_run_and_the_table_is_empty(llama):
    """Nor is torch imported: the stage's place in the pipeline costs next to nothing."""
    params(llama, units=0)
    assert run_without_torch("ablation", llama) == ["ablation.units is 0: nothing measured"]
    table, meta = read_table(Layout(llama / "artifacts").ablation, "ablation")
    assert meta == {"model": fingerprint(llama / "artifacts/model"), "units": 0, "seed": 0}
    assert list(table) == ["layer_idx", "group_type", "group_idx", "loss_increase", "standard_error"]
    assert all(len(values) == 0 for values in table.values())
