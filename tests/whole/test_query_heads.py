"""Query heads as units: ladders, levels and plans, and all stages of the pipeline with them."""

import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import result_shape
from libprune.allocation.ladders import Ladders, build_ladders, plan_of
from libprune.allocation.programme import Limit, Programme
from libprune.allocation.widths import tensor_parallel_sizes
from libprune.cli.main import app
from libprune.engine.architecture import Architecture
from libprune.engine.cost import prices, unit_parameters
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import require_sliceable
from libprune.engine.tables import Columns, unit_index
from libprune.masks.export import export_masks
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.results.check import check_folder
from libprune.statistics.latency import Timing, fit_lines, measured_widths
from libprune.statistics.levels import choose_levels, level_plans, unit_orders
from tests.support import tiny
from tests.support.models import FAMILIES, plan_of_heads

OBJECTIVES = ["parameters", "macs", "cache"]
SEEDS = st.integers(0, 2**32 - 1)


@cache
def architecture(name: str = "qwen3") -> Architecture:
    return describe(FAMILIES[name](0), heads="queries")


def table(importance: np.ndarray, name: str = "qwen3") -> Columns:
    index = unit_index(architecture(name))
    blocks = zip(index["layer_idx"].tolist(), index["group_type"].tolist(), strict=True)
    costs = np.array([unit_parameters(architecture(name), layer, part) for layer, part in blocks])
    return index | {"importance": importance, "cost": costs, "score": importance / costs}


def drawn(seed: int, name: str = "qwen3") -> Columns:
    return table(np.random.default_rng(seed).lognormal(0, 2, len(unit_index(architecture(name))["layer_idx"])), name)


def ladders_of(scores: Columns, name: str = "qwen3", **params) -> Ladders:
    asked = Allocate(channel_multiple=1, **params)
    return build_ladders(architecture(name), scores, asked, prices(architecture(name), asked.objective))


def shape_path(ladders: Ladders, layer: int, name: str = "qwen3") -> list[tuple[int, int]]:
    """Groups and heads that are left after each step."""
    shape, steps = architecture(name).parts["attention"], ladders[layer, "attention"]
    keeps = [plan_of(architecture(name), ladders, {(layer, "attention"): n}).keep for n in range(len(steps) + 1)]
    left = [keep[layer, "attention"] for keep in keeps]
    return [(int(shape.groups_left(keep).sum()), int(keep.sum())) for keep in left]


@settings(max_examples=25)
@given(
    SEEDS, st.sampled_from(["global", "uniform"]), st.integers(0, 3), st.sampled_from(["parameters", "macs", "cache"])
)
def test_every_prefix_of_a_ladder_can_be_sliced_and_costs_what_its_steps_say(seed, method, floor, objective):
    ladders = ladders_of(drawn(seed), method=method, min_groups=floor, objective=objective)
    own = prices(architecture(), objective)
    for layer in range(architecture().layers):
        block, steps = (layer, "attention"), ladders[layer, "attention"]
        assert (np.diff([step.rank for step in steps]) >= 0).all()
        for number in range(len(steps) + 1):
            plan = plan_of(architecture(), ladders, {block: number})
            require_sliceable(architecture(), plan)
            assert sum(step.cost for step in steps[:number]) == own.removed(plan)
        groups, heads = shape_path(ladders, layer)[-1]
        assert groups == floor
        assert heads == groups * (3 if objective == "cache" else 1), "heads alone gain no cache"


@given(SEEDS, st.sampled_from([{"method": "uniform"}, {"method": "search"}, {"method": "global", "shape": "uniform"}]))
@settings(max_examples=15)
def test_layers_that_must_be_alike_go_through_the_same_numbers(seed, params):
    ladders = ladders_of(drawn(seed), **params)
    paths = [shape_path(ladders, layer) for layer in range(architecture().layers)]
    assert all(path == paths[0] for path in paths)


def test_what_loses_less_for_its_cost_goes_first():
    """Layer 0 has a group of no importance, layer 1 a head of none in each group."""
    importance = np.ones(len(unit_index(architecture())["layer_idx"]))
    units = architecture().units("attention") + architecture().units("mlp")
    importance[3:6] = 1e-6
    importance[[units, units + 4, units + 8]] = 1e-6
    ladders = ladders_of(table(importance), method="global")
    assert ladders[0, "attention"][0].units == (3, 4, 5)
    assert sorted(ladders[1, "attention"][0].units) == [0, 4, 8]


def test_a_floor_of_all_groups_leaves_query_heads_alone_to_go():
    assert shape_path(ladders_of(drawn(0), method="global", min_groups=3), 0) == [(3, 9), (3, 6), (3, 3)]


def test_layers_with_as_many_heads_in_other_numbers_of_groups_are_not_alike():
    for first, shape in (((1, 2), "uniform"), ((2, 1), "per_layer")):
        plan = plan_of_heads(architecture("llama"), lambda layer, first=first: (1, 2) if layer else first)
        assert plan.uniform
        assert result_shape(architecture("llama"), plan, Allocate()) == shape


@given(SEEDS, st.sampled_from(["global", "uniform", "retention"]), st.floats(0.1, 0.5))
@settings(max_examples=15)
def test_plans_meet_their_target_and_can_be_written(seed, method, ratio):
    scores = drawn(seed, "llama")
    params = Allocate(method=method, ratio=ratio, split="importance", channel_multiple=1)
    plan = allocate(architecture("llama"), scores, params)
    require_sliceable(architecture("llama"), plan)
    if method == "uniform":
        assert result_shape(architecture("llama"), plan, params) == "uniform"
        shape, keep = architecture("llama").parts["attention"], plan.keep[0, "attention"]
        assert (int(shape.groups_left(keep).sum()), int(keep.sum())) in (shape.pairs or ())


@given(SEEDS, st.floats(0.05, 0.4))
@settings(max_examples=10)
def test_the_programme_counts_groups_as_the_plan_does(seed, share):
    """Under budgets of parameters and of the cache, which falls with groups alone."""
    ladders = ladders_of(drawn(seed), method="search", min_groups=0, min_channels=0)
    rng = np.random.default_rng(seed)
    rises = {block: rng.exponential(size=architecture().units(block[1])) for block in ladders}
    curves = {block: np.concatenate([[0.0], np.cumsum(rise)]) for block, rise in rises.items()}
    limits = [
        Limit(name, own := prices(architecture(), name), round(share * own.decoder)) for name in ("parameters", "cache")
    ]
    found = Programme(architecture(), ladders, curves, limits, may_empty=False).solve()
    assert found is not None
    plan = plan_of(architecture(), ladders, found.depth)
    require_sliceable(architecture(), plan)
    assert found.removed == tuple(limit.prices.removed(plan) for limit in limits)
    assert all(value >= limit.least for value, limit in zip(found.removed, limits, strict=True))


def test_single_heads_gain_no_cache_so_that_measured_levels_do_not_fit():
    with pytest.raises(LibpruneError, match=r"gains nothing by single query heads.*set prepare.heads to groups"):
        ladders_of(drawn(0), method="search", objective="cache")


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=15)
def test_levels_are_plans_that_can_be_sliced_and_those_of_the_ladders_of_search(seed, number):
    scores = drawn(seed)
    orders = unit_orders(architecture(), scores)
    levels = choose_levels(architecture(), number, scores["importance"])
    ladders = ladders_of(scores, method="search", min_groups=0, min_channels=0)
    alike = choose_levels(architecture(), number)
    assert len(levels) == len(alike), "so many whatever the scores"
    for (layer, part, removed), plan in zip(levels, level_plans(architecture(), orders, levels).values(), strict=True):
        require_sliceable(architecture(), plan)
        gone = np.cumsum([0, *(len(step.units) for step in ladders[layer, part])])
        depth = int(np.flatnonzero(gone == removed)[0])
        same = plan_of(architecture(), ladders, {(layer, part): depth})
        np.testing.assert_array_equal(same.keep[layer, part], plan.keep[layer, part])


def test_devices_divide_the_heads_that_are_left():
    plan = plan_of_heads(architecture("llama"), lambda _: (2, 1))
    keep = {block: np.arange(len(k)) < 12 if block[1] == "mlp" else k for block, k in plan.keep.items()}
    assert tensor_parallel_sizes(architecture("llama"), Plan(keep)) == [1, 2]


def test_latency_tells_the_time_of_heads_from_that_of_groups():
    widths = measured_widths(architecture("llama"), 6)
    assert {(width["kv"], width["attention"]) for width in widths} == {(3, 6), (3, 3), (1, 2)}
    seconds = np.array([1 + 2 * w["attention"] + 5 * w["kv"] + 0.5 * w["mlp"] for w in widths])
    lines = fit_lines(architecture("llama"), Timing(tuple(widths), seconds, 0.0))
    assert lines["unit"] == pytest.approx({"attention": 2, "kv": 5, "mlp": 0.5})
    assert lines["fixed"] == pytest.approx(1)


# The pipeline

MEASURING = ("prepare", "tokenize", "gradients", "activations", "latency", "score")


def run(folder: Path, *stages: str, **changes: dict) -> None:
    """Stages on the tiny model, of 3 groups of 2 heads."""
    source, text = tiny.write_model(folder / "source"), tiny.write_text(folder / "text.txt")
    prepare = {"model": str(source), "heads": "queries"}
    tiny.write_params(folder / "params.yaml", str(source), str(text), prepare=prepare, **changes)
    for stage in stages:
        import_module(f"stages.{stage}").main()


def test_a_plan_by_time_is_sliced_and_a_stock_config_says_heads_and_groups(tmp_path, monkeypatch, quick_proof):
    monkeypatch.chdir(tmp_path)
    allocate = {"ratio": 0.18, "method": "uniform", "min_groups": 3, "min_channels": 40, "objective": "latency"}
    with patch("libprune.statistics.latency._seconds", tiny.by_parameters):
        run(tmp_path, *MEASURING, "allocate", "slice", score={"criterion": "taylor"}, allocate=allocate)
    config = AutoConfig.from_pretrained("artifacts/pruned")
    assert (config.num_key_value_heads, config.num_attention_heads) == (3, 3)
    assert {one.kind for one in check_folder(Path("artifacts/pruned"), False)} == {"ok"}
    assert "query heads, as many in each group that stays" in Path("artifacts/pruned/README.md").read_text()
    assert export_masks(Path("artifacts/pruned"), Path("artifacts/model"), tmp_path / "masks.safetensors", False) > 0
    masks = load_file(tmp_path / "masks.safetensors")
    assert not any("k_proj" in name or "v_proj" in name for name in masks), "all keys and values stay"
    assert int(masks["model.layers.0.self_attn.q_proj.weight_mask"].any(1).sum()) == 3 * 8


def test_search_measures_levels_of_heads_and_layers_get_numbers_of_their_own(tmp_path, monkeypatch, quick_proof):
    monkeypatch.chdir(tmp_path)
    allocate = {"ratio": 0.15, "method": "search", "evaluations": 2, "shape": "per_layer", "min_channels": 40}
    stages = (*MEASURING, "levels", "allocate", "slice")
    run(tmp_path, *stages, allocate=allocate, slice={"repair": "none"})
    found = check_folder(Path("artifacts/pruned"), True, Path("artifacts/model"))
    assert {one.kind for one in found} == {"ok"}
    levels, _ = read_table(Layout(Path("artifacts")).levels, "levels")
    heads = levels["removed"][(levels["layer_idx"] == 0) & (levels["group_type"] == "attention")]
    assert heads[-1] == 6
    own = json.loads(Path("artifacts/pruned/config.json").read_text())["per_layer_config"].values()
    assert all(one["num_attention_heads"] % one["num_key_value_heads"] == 0 for one in own)


def test_inspect_shows_heads_in_their_groups(tmp_path):
    source = tiny.write_model(tmp_path / "source")
    found = CliRunner().invoke(app, ["inspect", str(source), "--heads", "queries"])
    assert found.exit_code == 0, found.output
    assert "6 query heads a layer in 3 groups (axes head, kv; 768 parameters more go with a group)" in found.output
    assert re.search(r"20 % +mlp +4 in 2 +38 ", found.output)
    refused = CliRunner().invoke(app, ["inspect", str(write_mha(tmp_path / "mha")), "--heads", "queries"])
    assert "this model has one query head per key-value head" in " ".join(refused.output.split())


def write_mha(folder: Path) -> Path:
    FAMILIES["llama_mha"](0).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder
