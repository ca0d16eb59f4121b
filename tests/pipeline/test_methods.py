"""Records of methods and repairs: they agree with the params, name real functions, and one entry adds a method."""

import inspect
from typing import get_args

import numpy as np
import pytest
import torch

from libprune.allocation.allocate import allocate
from libprune.allocation.block_worth import require_comparable, require_meaningful
from libprune.allocation.evidence import READERS
from libprune.allocation.methods import allocate_uniform
from libprune.cli.footprint import footprints
from libprune.engine.errors import LibpruneError
from libprune.experiments.costs import collecting_stages, pruning_stages
from libprune.pipeline.methods import METHODS, REPAIRS, WORTH_READS, Method, allocation_reads, load, methods_that_read
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Allocate, Score, Slice
from tests.support import tiny
from tests.support.shapes import EQUAL_COSTS


def choices(section: type, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


def test_records_and_params_name_the_same_choices():
    assert choices(Allocate, "method") == METHODS.keys()
    assert choices(Allocate, "worth") == WORTH_READS.keys()
    assert choices(Slice, "repair") == REPAIRS.keys()


def test_every_scaling_that_a_record_accepts_is_one():
    for record in METHODS.values():
        assert set(record.scalings) < choices(Score, "scaling")


def test_every_params_key_that_a_repair_names_is_one():
    assert {key for record in REPAIRS.values() for key in record.params} < Slice.model_fields.keys()


@pytest.mark.parametrize("record", [*METHODS.values(), *REPAIRS.values()], ids=[*METHODS, *REPAIRS])
def test_a_record_names_a_documented_function_of_five_arguments_and_says_what_it_computes(record):
    assert record.computes
    if record.function is not None:
        function = load(record.function)
        assert function.__doc__
        assert len(inspect.signature(function).parameters) == 5
        assert record.source


def test_no_repair_gives_no_fits():
    assert REPAIRS["none"].repair(1, 2, 3, 4, 5) == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_known_to_its_readers_and_in_order(method):
    for worth in WORTH_READS:
        reads = allocation_reads(method, worth, times=True)
        assert list(reads) == sorted({*METHODS[method].reads, *WORTH_READS[worth], "latency"})
        assert READERS.keys() >= set(reads)


def test_the_methods_that_read_an_artifact_are_named():
    assert methods_that_read("sensitivity") == "hgsp"
    assert methods_that_read("activations") == "functional"


def allocate_last(architecture, ladders, target, params, evidence):
    """Empties the last layers first, of which `evidence` must say something."""
    assert len(evidence["sensitivity"]["layer"]) == architecture.layers
    depth, removed = dict.fromkeys(ladders, 0), 0
    for block in reversed(list(ladders)):
        for step in ladders[block]:
            if removed + step.cost <= target:
                depth[block], removed = depth[block] + 1, removed + step.cost
    return depth


def test_one_entry_and_its_function_add_a_method(monkeypatch, tmp_path):
    """The new method allocates; stages, prices, footprints, refusals and search treat it as its record says."""
    record = Method(
        f"{__name__}:allocate_last",
        computes="the last layers go first",
        source="this test",
        reads=("sensitivity",),
        between=True,
        scalings=("rank",),
        weighs=True,
    )
    monkeypatch.setitem(METHODS, "last", record)
    params = Allocate(ratio=0.25).model_copy(update={"method": "last"})
    shape = EQUAL_COSTS
    scores = shape.table(1.0 + np.arange(len(shape.unit_costs())))
    plan = allocate(shape.architecture(), scores, params, shape.evidence("hgsp"))
    kept = [sum(int(plan.keep[layer, part].sum()) for part in shape.units) for layer in range(shape.layers)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0]

    assert allocation_reads("last") == ("sensitivity",)
    assert methods_that_read("sensitivity") == "hgsp or last"
    whole = load_params(tiny.write_params(tmp_path / "params.yaml", "none", "none"))
    asking = whole.model_copy(
        update={"allocate": params, "score": Score(criterion="magnitude"), "slice": Slice(repair="none")}
    )
    assert collecting_stages(asking) == ()
    assert pruning_stages(asking) == ("score", "sensitivity", "allocate", "slice")
    settings = {one.stage: one.settings for one in footprints(shape.architecture(), asking, torch.float32)}
    assert settings["sensitivity"] == "allocate.method: last"

    with pytest.raises(LibpruneError, match="last weighs blocks by what it measures"):
        require_meaningful(params.model_copy(update={"worth": "functional"}), "rank")
    meta = {"criterion": "wanda", "comparable": False, "scaling": "none"}
    with pytest.raises(LibpruneError, match=r"last would rank unlike things; set score\.scaling to rank, or"):
        require_comparable(meta, params)
    with pytest.raises(LibpruneError, match="last multiplies scores"):
        require_comparable(meta | {"scaling": "minmax"}, params)
    assert METHODS["uniform"].allocate is allocate_uniform
