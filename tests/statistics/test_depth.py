"""The order in which layers go: against direct computations, on a model whose single scores choose badly, resumed."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import ArtifactError, BudgetError, LibpruneError, ParamsError
from libprune.engine.surgery import masked
from libprune.models.folder import load_model
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Depth
from libprune.statistics import losses
from libprune.statistics.depth import (
    Joint,
    by_cosine,
    empty_table,
    measurements,
    most_removals,
    name_of,
    order_of,
    plan_without,
    removals,
    why_not,
)
from libprune.statistics.sensitivity import LAYER
from tests.support import tiny
from tests.support.closure import run_without_torch
from tests.support.exported import run_here
from tests.support.predictions import kl, logits_of
from tests.support.shapes import Shape
from tests.support.tiny import change_params

USED = 4


def depth_table(folder: Path):
    return read_table(Layout(folder / "artifacts").depth, "depth")[0]


def order_in(folder: Path) -> list[tuple[int, str]]:
    table = depth_table(folder)
    return list(zip(table["layer_idx"].tolist(), table["removed"].tolist(), strict=True))


def measure(folder: Path, **allocate: object) -> list[tuple[int, str]]:
    change_params(folder, "allocate", **allocate)
    tiny.run_stages(folder, ["depth"])
    return order_in(folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The tiny model with its scores."""
    folder = tmp_path_factory.mktemp("depth")
    stages = ("prepare", "tokenize", "gradients", "activations", "score")
    return tiny.write_project(
        folder,
        stages,
        score={"criterion": "random"},
        depth={"sequences": USED, "removals": 3},
        allocate={"method": "uniform", "depth": "joint", "ratio": 0.5},
        slice={"repair": "none"},
    )


@pytest.fixture
def project(measured, tmp_path) -> Path:
    (tmp_path / "artifacts").mkdir()
    for path in (measured / "artifacts").iterdir():
        (tmp_path / "artifacts" / path.name).symlink_to(path)
    (tmp_path / "params.yaml").write_text((measured / "params.yaml").read_text())
    return tmp_path


# What may go


def test_frozen_layers_and_parts_that_must_stay_are_no_candidates():
    architecture = Shape(layers=4).architecture()
    frozen = (1, 1)
    assert removals(architecture, "layers", frozen) == [(1, LAYER), (2, LAYER)]
    assert removals(architecture, "parts", frozen) == [(i, part) for i in (1, 2) for part in ("attention", "mlp")]


def test_one_layer_stays():
    architecture = Shape(layers=2).architecture()
    assert not why_not(architecture, [(0, LAYER)])
    assert why_not(architecture, [(0, LAYER), (1, LAYER)]) == "one layer must stay"
    order = by_cosine(architecture, [(0, LAYER), (1, LAYER)], np.array([0.4, 0.2]))
    assert order == [(1, LAYER)]


def test_where_nothing_can_go_the_reason_is_told(project):
    change_params(project, "allocate", freeze_first=4)
    with pytest.raises(LibpruneError, match=r"finds nothing that can go as a whole: all layers are frozen"):
        tiny.run_stages(project, ["depth"])


# The joint order


@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.integers(2, 3) | st.none())
def test_every_step_takes_the_least_of_what_it_measures(layers, seed, most):
    """With a made-up divergence of sets, in which pairs of layers matter beside the single ones."""
    architecture, rng = Shape(layers=layers).architecture(), np.random.default_rng(seed)
    alone, pairs = rng.random(layers), rng.random((layers, layers))

    def value(gone) -> float:
        chosen = [layer for layer, _ in gone]
        return sum(alone[i] + sum(pairs[i, j] for j in chosen if j > i) for i in chosen)

    section = Depth(candidates=most, removals=layers - 1)
    wanted = removals(architecture, "layers")
    joint = Joint(architecture, wanted, most)
    asked = 0
    while len(joint.gone) < layers - 1:
        measured = joint.next()
        values = np.array([[value([*joint.gone, one])] for one in measured])
        best = values.min()
        joint.take(measured, values)
        assert value(joint.gone) == pytest.approx(best)
        assert len(measured) == len(set(measured))
        asked += len(measured)
    assert joint.next() == []
    assert joint.single == {one: pytest.approx(value([one])) for one in wanted}
    assert asked == measurements(layers, section)


def test_what_two_layers_do_alike_is_not_taken_twice():
    """Layers 0 and 1 stand in for each other: single scores name both, the joint order only one of them."""
    architecture = Shape(layers=4).architecture()

    def value(gone) -> float:
        layers = {layer for layer, _ in gone}
        return 0.1 * len(layers) + 9.0 * ({0, 1} <= layers) + 0.5 * (2 in layers) + 0.6 * (3 in layers)

    joint = Joint(architecture, removals(architecture, "layers"))
    for _ in range(2):
        measured = joint.next()
        joint.take(measured, np.array([[value([*joint.gone, one])] for one in measured]))
    single = sorted(joint.single, key=lambda removal: joint.single[removal])[:2]
    assert joint.gone == [(0, LAYER), (2, LAYER)]
    assert single == [(0, LAYER), (1, LAYER)]
    assert value(joint.gone) < value(single)


def test_most_removals_is_half_unless_asked():
    assert [most_removals(9, asked) for asked in (None, 2, 20)] == [4, 2, 9]
    assert most_removals(1, None) == 1


# The stage


def direct(folder: Path, gone) -> np.ndarray:
    layout = Layout(folder / "artifacts")
    architecture = read_architecture(layout)
    model = load_model(layout.model, torch.float32)
    ids = read_tokens(layout.calibration_tokens, architecture.fingerprint)[0].ids[-USED:]
    dense = logits_of(model, ids)
    with masked(model, architecture, plan_without(architecture, gone)):
        return kl(dense, logits_of(model, ids))


@pytest.mark.parametrize("of", ["layers", "parts"])
def test_the_joint_order_is_that_of_direct_computations(project, of):
    change_params(project, "depth", of=of)
    order = measure(project, depth="joint")
    architecture = read_architecture(Layout(project / "artifacts"))
    wanted = removals(architecture, of)
    assert len(order) == 3
    for step in range(3):
        left = [one for one in wanted if one not in order[:step]]
        values = {one: direct(project, [*order[:step], one]).mean() for one in left}
        assert order[step] == min(values, key=values.__getitem__)
    table = depth_table(project)
    for step, (value, error, single) in enumerate(
        zip(table["divergence"], table["standard_error"], table["single_divergence"], strict=True)
    ):
        found = direct(project, order[: step + 1])
        assert value == pytest.approx(found.mean(), rel=1e-4)
        assert error == pytest.approx(found.std(ddof=1) / USED**0.5, rel=1e-3)
        assert single == pytest.approx(direct(project, [order[step]]).mean(), rel=1e-4)


def test_the_cosine_order_takes_layers_that_turn_their_input_least(project):
    order = measure(project, depth="cosine")
    table = depth_table(project)
    assert (np.diff(table["change"]) >= 0).all()
    assert len(set(order)) == 3
    assert np.isnan(table["single_divergence"]).all()
    for step, value in enumerate(table["divergence"]):
        assert value == pytest.approx(direct(project, order[: step + 1]).mean(), rel=1e-4)


def test_layers_before_the_first_removal_are_not_run_again(project, monkeypatch):
    """With 4 layers and one pass, the steps start from each layer that is left."""
    started: list[int] = []
    own = losses.Prefix.losses_from
    monkeypatch.setattr(losses.Prefix, "losses_from", lambda self, layer: started.append(layer) or own(self, layer))
    order = measure(project, depth="joint")
    gone = [[layer for layer, _ in order[:step]] for step in range(3)]
    expected = [0]  # the dense model
    for step in range(3):
        expected += [0, *(layer for layer in range(4) if layer not in gone[step])]
    assert started == expected


@pytest.mark.parametrize("stop", [3, 6])
def test_an_interrupted_stage_goes_on_where_it_stopped(project, monkeypatch, stop):
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "0")
    expected = measure(project, depth="joint")
    table = depth_table(project)
    Layout(project / "artifacts").depth.unlink()
    done = 0
    own = losses.Prefix.losses_of

    def counted(self, plan):
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return own(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(losses.Prefix, "losses_of", counted)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_stages(project, ["depth"])
    stop, done = 99, 0
    monkeypatch.setattr(losses.Prefix, "losses_of", counted)
    tiny.run_stages(project, ["depth"])
    assert order_in(project) == expected
    assert done < 9
    assert all(np.array_equal(values, table[name]) for name, values in depth_table(project).items())


def test_without_an_order_nothing_is_measured_and_torch_is_not_loaded(project):
    change_params(project, "allocate", depth="units")
    assert run_without_torch("depth", project) == ["allocate.depth is units: no layer is measured"]
    table = depth_table(project)
    assert list(table) == list(empty_table())
    assert all(len(values) == 0 for values in table.values())


def test_the_order_adds_up_from_nothing(project):
    measure(project, depth="joint")
    architecture = read_architecture(Layout(project / "artifacts"))
    order = order_of(architecture, depth_table(project))
    assert order[0] == (frozenset(), 0.0)
    assert all(before < after for (before, _), (after, _) in pairwise(order))
    assert [len(gone) for gone, _ in order] == [0, 2, 4, 6]
    assert name_of((2, LAYER)) == "layer 2"
    assert name_of((2, "mlp")) == "the mlp of layer 2"


# What allocation makes of it


def test_as_many_layers_go_as_fit_and_widths_fill_the_rest(project):
    order = measure(project, depth="joint", ratio=0.6)
    tiny.run_stages(project, ["allocate"])
    layout = Layout(project / "artifacts")
    architecture = read_architecture(layout)
    plan, meta = read_plan(layout, architecture)
    assert sorted(set(range(4)) - set(plan.layers)) == sorted(layer for layer, _ in order[:2])
    assert plan.uniform
    assert meta["shape"] == "uniform"
    told = json.loads((project / "metrics/allocation.json").read_text())
    assert [one["layer"] for one in told["depth"]["removals"]] == [layer for layer, _ in order[:2]]
    assert told["depth"]["divergence"] == pytest.approx(depth_table(project)["divergence"][1])
    assert abs(told["removed"] - told["target"]) <= 2 * (told["target"] / 0.6) / 4 / 3  # a group in each of two layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("libprune.results.proof.reload", run_here)
        tiny.run_stages(project, ["slice"])
    config = json.loads((layout.pruned / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert "auto_map" not in config


def test_single_parts_go_by_the_order_and_the_result_is_per_layer(project):
    change_params(project, "depth", of="parts")
    order = measure(project, depth="joint", layers=2)
    tiny.run_stages(project, ["allocate"])
    layout = Layout(project / "artifacts")
    plan, meta = read_plan(layout, read_architecture(layout))
    assert {block for block in plan.removed if block[1] != LAYER} == set(order[:2])
    assert meta["shape"] == "per_layer"
    change_params(project, "allocate", shape="uniform")
    with pytest.raises(LibpruneError, match="the layers of this plan differ"):
        tiny.run_stages(project, ["allocate"])


def test_more_layers_than_fit_or_were_measured_are_refused(project):
    measure(project, depth="joint", ratio=0.3, layers=2)
    with pytest.raises(BudgetError, match=r"layers: 2 would take 0\.500 of the decoder parameters.* has room for 1"):
        tiny.run_stages(project, ["allocate"])
    change_params(project, "allocate", layers=4, ratio=0.9)
    change_params(project, "depth", removals=None)
    with pytest.raises(BudgetError, match="the depth stage has put 3 removals into order"):
        tiny.run_stages(project, ["allocate"])


def test_an_order_of_another_kind_is_refused(project):
    measure(project, depth="cosine")
    change_params(project, "allocate", depth="joint")
    with pytest.raises(ArtifactError, match=r"belongs to order 'cosine', but the current order is 'joint'"):
        tiny.run_stages(project, ["allocate"])
    measure(project, depth="joint")
    change_params(project, "allocate", freeze_first=1)
    with pytest.raises(ArtifactError, match=r"frozen \[0, 0\]"):
        tiny.run_stages(project, ["allocate"])


@pytest.mark.parametrize(
    ("allocate", "depth", "message"),
    [
        ({"layers": 2}, {}, "allocate.layers counts removals of allocate.depth: joint or cosine, not none"),
        ({"depth": "cosine"}, {"of": "parts"}, "puts whole layers into order; set depth.of: layers"),
        ({"depth": "joint", "layers": 4}, {"removals": 3}, "is more than depth.removals: 3"),
        ({"allow_layer_removal": True}, {}, "is now allocate.depth; write depth: units instead"),
        ({"allow_layer_removal": False}, {}, "is now allocate.depth; write depth: none instead"),
    ],
)
def test_params_that_do_not_go_together(allocate, depth, message, tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "m", "t", allocate=allocate, depth=depth)
    with pytest.raises(ParamsError, match=message):
        load_params(path)
