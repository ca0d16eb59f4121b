"""The levels of blocks: which are measured, in which order units go, and the stage against a direct computation."""

import json
from copy import deepcopy
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import ArtifactError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import split_blocks
from libprune.models.folder import load_model
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.repair.repairs import local_repair
from libprune.statistics.levels import choose_levels, empty_table, level_plans, level_table, order_digest, unit_orders
from tests.support import tiny
from tests.support.closure import run_without_torch
from tests.support.predictions import kl, logits_of
from tests.support.shapes import Shape, ladders_of, shapes
from tests.support.tiny import change_params

# Which levels

TALL = st.builds(Shape, layers=st.integers(1, 3), kv=st.integers(1, 9), ffn=st.integers(1, 99))


@given(TALL, st.integers(1, 120))
def test_every_block_has_as_many_levels_as_asked_for_or_all_of_them_up_to_the_whole_block(shape, number):
    architecture = shape.architecture()
    levels = choose_levels(architecture, number)
    assert len(set(levels)) == len(levels)
    assert list(dict.fromkeys((layer, part) for layer, part, _ in levels)) == list(architecture.blocks())
    for layer, part in architecture.blocks():
        counts = [removed for *block, removed in levels if block == [layer, part]]
        assert len(counts) == min(number, architecture.units(part))
        assert counts == sorted(counts)
        assert counts[-1] == architecture.units(part)
        gaps = np.diff([0, *counts])
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1, "the distances are even"


@given(shapes(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_levels_plan_removes_the_lowest_scores_of_its_block_alone(shape, number, seed):
    architecture = shape.architecture()
    scores = shape.table(1.0 + np.random.default_rng(seed).permutation(len(shape.unit_costs())))
    levels = choose_levels(architecture, number)
    plans = level_plans(architecture, unit_orders(architecture, scores), levels)
    assert len(plans) == len(levels)
    for (name, plan), (layer, part, removed) in zip(plans.items(), levels, strict=True):
        assert name == f"{removed} {part} units of layer {layer}"
        assert list(plan.keep) == list(architecture.blocks())
        for block, score in split_blocks(architecture, scores["score"]):
            expected = sorted(score)[:removed] if block == (layer, part) else []
            assert sorted(score[~plan.keep[block]]) == expected


# The order of units


@given(shapes(), st.data())
def test_units_go_in_the_order_of_the_ladders_ties_included(shape, data):
    count = len(shape.unit_costs())
    scores = shape.table(np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))) / 4)
    multiple = data.draw(st.integers(1, 3))
    params = Allocate(min_groups=0, min_channels=0, channel_multiple=multiple)
    architecture = shape.architecture()
    ladders = ladders_of(architecture, scores, params)
    orders = unit_orders(architecture, scores)
    assert list(orders) == list(architecture.blocks())
    for block, steps in ladders.items():
        assert orders[block].tolist() == [unit for step in steps for unit in step.units]


@given(st.permutations(range(12)), st.permutations(range(12)))
def test_the_digest_names_the_order_and_not_the_scores(one, two):
    shape = Shape(layers=1, kv=4, ffn=8)
    architecture = shape.architecture()

    def digest(order, factor: float = 1.0) -> str:
        return order_digest(unit_orders(architecture, shape.table(factor * np.array(order))))

    def ranks(order) -> list[int]:
        return [*np.argsort(order[:4]), *np.argsort(order[4:])]

    assert digest(one) == digest(one, 3.0)
    assert (digest(one) == digest(two)) == (ranks(one) == ranks(two))


# The table


def test_a_row_holds_the_mean_over_sequences_and_its_error():
    levels = [(0, "mlp", 2), (1, "attention", 1)]
    table = level_table(levels, np.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]]))
    assert list(zip(*(table[name] for name in ("layer_idx", "group_type", "removed")), strict=True)) == levels
    assert table["divergence"].tolist() == [3, 2]
    assert table["standard_error"].tolist() == [pytest.approx(2 / 3**0.5), 0]


def test_one_sequence_has_no_standard_error_and_no_level_gives_no_row():
    assert np.isnan(level_table([(0, "mlp", 2)], np.array([[1.0]]))["standard_error"]).all()
    assert all(len(values) == 0 for values in empty_table().values())


# The stage

NUMBER, USED = 3, 4
SETTINGS = {
    "score": {"criterion": "random"},
    "levels": {"number": NUMBER, "sequences": USED},
    "allocate": {"method": "search", "evaluations": 0, "ratio": 0.3},
    "slice": {"repair": "local"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model with its scores and measured levels."""
    folder = tmp_path_factory.mktemp("project")
    model, text = str(tiny.write_model(folder / "model")), str(tiny.write_text(folder / "text.txt"))
    tiny.write_params(folder / "params.yaml", model, text, **SETTINGS)
    for name in ("prepare", "tokenize", "gradients", "activations", "score", "levels"):
        stage(name, folder)
    return folder


@pytest.fixture
def place(project, tmp_path) -> Path:
    """A project of its own, whose artifacts are links to those of the first."""
    (tmp_path / "artifacts").mkdir()
    for path in (project / "artifacts").iterdir():
        (tmp_path / "artifacts" / path.name).symlink_to(path)
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    return tmp_path


def stage(name: str, folder: Path) -> None:
    more = [folder / "metrics"] if name == "allocate" else []
    import_module(f"stages.{name}").main(folder / "params.yaml", folder / "artifacts", *more)


def levels_of(folder: Path) -> list[tuple[int, str, int, float, float]]:
    table, _ = read_table(Layout(folder / "artifacts").levels, "levels")
    return list(zip(*table.values(), strict=True))


def test_the_table_has_a_row_for_every_block_and_level(project):
    layout = Layout(project / "artifacts")
    architecture = read_architecture(layout)
    assert [row[:3] for row in levels_of(project)] == choose_levels(architecture, NUMBER)
    assert len(levels_of(project)) == sum(min(NUMBER, architecture.units(part)) for _, part in architecture.blocks())
    table, meta = read_table(layout.levels, "levels")
    assert list(table) == ["layer_idx", "group_type", "removed", "divergence", "standard_error"]
    scores = read_table(layout.scores, "score")[0]
    assert meta["order"] == order_digest(unit_orders(architecture, scores))
    assert (meta["model"], meta["levels"], meta["sequences"]) == (architecture.fingerprint, NUMBER, USED)


def test_the_measured_divergence_is_that_of_a_direct_computation(project):
    """The last sequences through a copy that is masked and carries the weights of the local repair."""
    layout = Layout(project / "artifacts")
    architecture, scores = read_architecture(layout), read_table(layout.scores, "score")[0]
    dense = load_model(layout.model, torch.float32)
    ids = read_tokens(layout.calibration_tokens, architecture.fingerprint)[0].ids[-USED:]
    repair = local_repair(layout, architecture)
    score = dict(split_blocks(architecture, scores["score"]))
    for layer, part, removed, divergence, error in levels_of(project)[::4]:
        keep = np.ones(architecture.units(part), dtype=bool)
        keep[np.argsort(score[layer, part])[:removed]] = False
        plan = Plan({**Plan.dense(architecture).keep, (layer, part): keep})
        changed = deepcopy(dense)
        for name, tensor in repair(plan).items():
            changed.get_parameter(name).data.copy_(tensor)
        with masked(changed, architecture, plan):
            expected = kl(logits_of(dense, ids), logits_of(changed, ids))
        assert divergence == pytest.approx(expected.mean(), rel=1e-3)
        assert error == pytest.approx(expected.std(ddof=1) / USED**0.5, rel=1e-3)


def test_with_another_method_the_table_is_empty_and_no_model_is_loaded(place):
    """Nor is torch imported: the stage's place in the pipeline costs next to nothing."""
    change_params(place, "allocate", method="uniform")
    (place / "artifacts/levels.parquet").unlink()
    assert run_without_torch("levels", place) == ["allocate.method is uniform: no level is measured"]
    table, meta = read_table(Layout(place / "artifacts").levels, "levels")
    assert all(len(values) == 0 for values in table.values())
    assert meta["levels"] == 0
    stage("allocate", place)


# Allocation by levels


def test_a_search_keeps_the_target_and_reports_what_it_measured(place):
    change_params(place, "allocate", evaluations=3)
    stage("allocate", place)
    told = json.loads((place / "metrics/allocation.json").read_text())
    assert told["trials"] == 3
    assert list(told["divergence_of"]) == ["search", "functional", "global", "uniform"]
    assert told["divergence"] == min(told["divergence_of"].values())
    assert told["removed"] <= told["target"]
    layout = Layout(place / "artifacts")
    architecture = read_architecture(layout)
    plan, meta = read_plan(layout, architecture)
    assert (meta["method"], meta["evaluations"]) == ("search", 3)
    assert plan.layers == tuple(range(architecture.layers))
    assert plan.keep.keys() == dict.fromkeys(product(range(architecture.layers), architecture.parts)).keys()


def test_global_is_no_rival_where_scores_do_not_compare(place):
    change_params(place, "score", criterion="magnitude")
    change_params(place, "allocate", evaluations=3)
    for name in ("score", "levels", "allocate"):
        stage(name, place)
    told = json.loads((place / "metrics/allocation.json").read_text())
    assert list(told["divergence_of"]) == ["search", "functional", "uniform"]


def test_without_evaluations_nothing_is_run_and_nothing_reported(place, monkeypatch):
    monkeypatch.setattr("libprune.collection.calibration.load_model", lambda *args: pytest.fail("a model was loaded"))
    stage("allocate", place)
    assert "divergence" not in json.loads((place / "metrics/allocation.json").read_text())


def test_levels_measured_with_units_in_another_order_are_refused(place):
    change_params(place, "score", seed=1)
    stage("score", place)
    with pytest.raises(
        ArtifactError, match=r"levels\.parquet belongs to order '.*', but the current order is .*`dvc repro`"
    ):
        stage("allocate", place)


def test_levels_that_were_never_measured_are_refused(place):
    change_params(place, "allocate", method="global")
    stage("levels", place)
    change_params(place, "allocate", method="search")
    with pytest.raises(ArtifactError, match=r"levels\.parquet belongs to tokens None.*`dvc repro`"):
        stage("allocate", place)
