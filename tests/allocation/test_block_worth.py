"""What ranks are given back: the worth of a layer or block, shared out among its units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.allocation.block_worth import shared_out, with_worth
from libprune.allocation.decide import decide
from libprune.allocation.evidence import read_evidence
from libprune.allocation.hgsp import HARMLESS
from libprune.engine.errors import LibpruneError
from libprune.engine.tables import split_blocks
from libprune.pipeline.artifacts import Scores, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.pipeline.shards import write_shard
from libprune.scoring.scaling import scale
from libprune.statistics.sensitivity import removals, sensitivity_table
from tests.support.shapes import Shape

SHAPE = Shape()
META = {"criterion": "taylor + wanda", "fusion": "simple", "comparable": False, "scaling": "rank", "model": ""}
RANKED = Allocate(method="global", worth="sensitivity")


def ranks(seed: int = 0):
    table = SHAPE.table(np.random.default_rng(seed).random(len(SHAPE.unit_costs())))
    scaled = scale(table["score"], table, "rank")
    return table | {"importance": scaled, "score": scaled}


@given(st.integers(0, 99), st.booleans())
def test_the_units_of_a_group_share_exactly_its_worth_in_their_order(seed, by_layer):
    architecture, scores = SHAPE.architecture(), ranks(seed)
    count = SHAPE.layers * (1 if by_layer else 2)
    worth = np.random.default_rng(seed).normal(0.2, 0.3, count)
    found = shared_out(Scores(architecture, scores, META), worth, by_layer)
    np.testing.assert_allclose(found["score"], found["importance"] / scores["cost"])
    sums = [values.sum() for _, values in split_blocks(architecture, found["importance"])]
    sums = np.reshape(sums, (count, -1)).sum(axis=1)
    np.testing.assert_allclose(sums, np.maximum(worth, HARMLESS))
    groups = list(np.split(np.arange(len(scores["cost"])), count)) if by_layer else []
    blocks = [rows for _, rows in split_blocks(architecture, np.arange(len(scores["cost"])))]
    for rows in [*groups, *blocks]:
        order = np.argsort(scores["score"][rows], kind="stable")
        assert (np.diff(found["score"][rows][order]) >= -1e-15).all()


def test_a_block_worth_more_loses_less():
    architecture, scores = SHAPE.architecture(), ranks()
    worth = np.array([1.0, 1.0, 9.0, 9.0, 1.0, 1.0])
    found = scores | shared_out(Scores(architecture, scores, META), worth, by_layer=False)
    plan = decide(Scores(architecture, found, META), RANKED.model_copy(update={"ratio": 0.3})).plan
    gone = [int((~plan.keep[layer, "mlp"]).sum()) for layer in range(3)]
    assert gone[1] < min(gone[0], gone[2])


def test_fused_scores_without_a_worth_are_refused_in_global_alone():
    architecture, scores = SHAPE.architecture(), ranks()
    with pytest.raises(LibpruneError, match=r"no layer a level of its own .* set allocate\.worth to sensitivity"):
        decide(Scores(architecture, scores, META), Allocate(method="global"))
    for fusion in ("none", "best"):
        assert decide(Scores(architecture, scores, META | {"fusion": fusion}), Allocate(method="global"))
    for method, evidence in (("uniform", {}), ("hgsp", {"evidence": SHAPE.evidence("hgsp")}), ("retention", {})):
        assert decide(Scores(architecture, scores, META), Allocate(method=method), **evidence)
    assert decide(Scores(architecture, scores, META), RANKED).params.split == "importance"


@pytest.mark.parametrize(
    ("meta", "params", "message"),
    [
        ({"scaling": "none"}, {}, r"score\.scaling is none; set it to rank"),
        ({"scaling": "zscore"}, {}, r"score\.scaling is zscore; set it to rank"),
        ({}, {"method": "hgsp"}, "hgsp weighs blocks by what it measures"),
        ({}, {"method": "search"}, "search weighs blocks by what it measures"),
    ],
)
def test_a_worth_that_would_mean_nothing_is_refused(meta, params, message):
    with pytest.raises(LibpruneError, match=message):
        params = RANKED.model_copy(update=params)
        with_worth(Scores(SHAPE.architecture(), ranks(), META | meta), params, {})


def test_the_worth_of_blocks_is_their_own_measured_loss_and_that_of_layers_how_far_they_change_their_input(tmp_path):
    import torch

    layout, architecture = Layout(tmp_path), SHAPE.architecture()
    scores = Scores(architecture, ranks(), META)

    def worth(params: Allocate) -> Scores:
        return with_worth(scores, params, read_evidence(layout, scores, params))

    measured = removals(architecture)
    losses = np.arange(1.0, len(measured) + 1)[:, None]
    write_table(layout.sensitivity, sensitivity_table(measured, losses, np.zeros(1)), {"model": ""})
    found = worth(RANKED).table
    sums = {block: values.sum() for block, values in split_blocks(architecture, found["importance"])}
    assert sums == pytest.approx({key: i + 1.0 for i, key in enumerate(measured) if key[1] != "layer"})
    layout.activations.mkdir()
    for layer in range(SHAPE.layers):
        cosine = {"block.cosine_mean": torch.tensor(0.1 * layer)}
        write_shard(layout.activations, layer, cosine, {"model": ""})
    found = worth(RANKED.model_copy(update={"worth": "functional"})).table
    layers = [found["importance"][found["layer_idx"] == layer].sum() for layer in range(SHAPE.layers)]
    assert layers == pytest.approx([1.0, 0.9, 0.8])
    assert worth(Allocate()) is scores
