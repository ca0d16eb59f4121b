"""The loss increase of removing layers and blocks: against a model whose weights are zeroed, and what it costs."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.surgery import masked
from libprune.models.compute import sequence_losses
from libprune.models.layers import layers_of
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.statistics.sensitivity import (
    LAYER,
    block_increase,
    empty_table,
    increases_of,
    print_sensitivity,
    removal_plans,
    removals,
    sensitivity_table,
)
from stages.sensitivity import main
from tests.support import tiny
from tests.support.closure import run_without_torch
from tests.support.measured import AT_ONCE, LENGTH, PASSES, SEQUENCES, USED, interrupt, patch_losses, write_project
from tests.support.models import FAMILIES, KINDS, outputs, tiny_exposed, tokens


def params(folder: Path, method: str = "hgsp", sequences: int | None = USED) -> Path:
    return tiny.write_params(
        folder / "params.yaml",
        "none",
        "none",
        allocate={"method": method},
        sensitivity={"sequences": sequences},
        compute={"device": "cpu", "dtype": "float32", "batch_tokens": AT_ONCE * LENGTH},
    )


def run_stage(folder: Path, **settings: int) -> tuple[dict, dict]:
    layout = Layout(folder / "artifacts")
    main(params(folder, **settings), layout.root)
    return read_table(layout.sensitivity, "sensitivity")


@pytest.fixture
def llama(tmp_path) -> Path:
    """With biases everywhere."""
    return write_project(FAMILIES["llama"](0), tmp_path)


def zeroed(model: PreTrainedModel, architecture: Architecture, layer: int, parts: list[str]) -> nn.Module:
    """A copy whose consumers in some parts of a layer have zero weights and biases."""
    copy = deepcopy(model)
    for part in parts:
        for consumer in architecture.consumers(layer, part):
            for name in (consumer.weight, consumer.bias):
                if name in dict(copy.named_parameters()):
                    copy.get_parameter(name).data.zero_()
    return copy


@pytest.mark.parametrize("family", KINDS)
def test_what_is_removed_contributes_what_zero_weights_and_biases_do(family):
    model, ids = tiny_exposed(family), tokens(2, LENGTH)
    architecture = describe(model)
    plans = list(removal_plans(architecture).values())
    with torch.no_grad():
        for (layer, what), plan in zip(removals(architecture), plans, strict=True):
            parts = architecture.parts_of(layer) if what == LAYER else [what]
            with masked(model, architecture, plan):
                found = outputs(model, ids)
            assert torch.equal(found, outputs(zeroed(model, architecture, layer, parts), ids))


def test_the_increases_are_those_of_models_with_zeroed_weights(llama, capsys):
    table, meta = run_stage(llama)
    model, ids = FAMILIES["llama"](0), tokens(SEQUENCES, LENGTH)[-USED:]
    architecture = describe(model)
    assert list(zip(table["layer_idx"], table["removed"], strict=True)) == removals(architecture)

    def losses(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([sequence_losses(model, Sequences(some)) for some in ids.split(AT_ONCE)]).double().numpy()

    dense = losses(model)
    for layer, what, increase, error in zip(*table.values(), strict=True):
        parts = list(architecture.parts) if what == LAYER else [what]
        differences = losses(zeroed(model, architecture, int(layer), parts)) - dense
        assert increase == pytest.approx(differences.mean(), rel=1e-6)
        assert error == pytest.approx(differences.std(ddof=1) / USED**0.5, rel=1e-6)
    assert meta["loss"] == pytest.approx(dense.mean())
    assert f"dense loss {meta['loss']:.4f}" in capsys.readouterr().out


def test_increases_are_sorted_by_what_is_removed_and_by_layer(llama):
    table, _ = run_stage(llama)
    increases = increases_of(table)
    assert list(increases) == [LAYER, "attention", "mlp"]
    for what, values in increases.items():
        rows = {int(i): v for i, w, v in zip(*list(table.values())[:3], strict=True) if w == what}
        assert values.tolist() == [rows[layer] for layer in range(4)]


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe", "nemotron_h"])
def test_a_block_has_the_increase_of_its_own_removal_or_that_of_its_layer(family, capsys):
    """Also where only some layers have a part, and where a part, such as all experts, cannot go alone."""
    architecture = describe(FAMILIES[family](0))
    measured = removals(architecture)
    table = sensitivity_table(measured, np.arange(1.0, 1 + len(measured))[:, None].repeat(2, 1), np.zeros(2))
    increases = increases_of(table)
    for layer, part in architecture.blocks():
        row = measured.index((layer, part) if (layer, part) in measured else (layer, LAYER))
        assert block_increase(increases, layer, part) == 1 + row
    print_sensitivity(table, 1.0)
    told = capsys.readouterr().out
    assert all(f" {1 + row}.0000" in told for row in range(len(measured)))


def test_a_removal_runs_only_the_layers_from_its_own_on(llama):
    """N layers take N (N + 1) / 2 runs of one for each kind of removal and pass, beside the dense run's N a pass."""
    from libprune.statistics import losses as prefix

    ran = 0
    make = prefix.Prefix.__init__

    def counted(self, model, architecture, *rest, **more):
        def count(module, args, output):
            nonlocal ran
            ran += 1

        for block in layers_of(model, architecture):
            block.mlp.register_forward_hook(count)
        make(self, model, architecture, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix.Prefix, "__init__", counted)
        run_stage(llama)
    layers = 4
    assert ran == PASSES * (layers + 3 * layers * (layers + 1) // 2)


def test_a_run_that_was_interrupted_goes_on_where_it_stopped(llama, monkeypatch, capsys):
    expected, expected_meta = run_stage(llama)
    interrupt(monkeypatch, 7, lambda: run_stage(llama))
    passes = patch_losses(monkeypatch, lambda number, losses: losses)
    capsys.readouterr()
    table, meta = run_stage(llama)
    assert "7 of 12 are done" in capsys.readouterr().out
    assert len(passes) == PASSES * (1 + 5)
    assert meta == expected_meta
    assert all(np.array_equal(table[name], values) for name, values in expected.items())


def test_for_another_method_nothing_is_measured_and_no_model_is_loaded(llama):
    params(llama, method="global")
    assert run_without_torch("sensitivity", llama) == ["allocate.method is global: no layer is measured"]
    table, _ = read_table(Layout(llama / "artifacts").sensitivity, "sensitivity")
    assert list(table) == list(empty_table())
    assert all(len(values) == 0 for values in table.values())
