"""Fixes of vanishing gradients: their factors, and that cached sums under them are those of scaled gradients."""

from contextlib import contextmanager
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.allocation.gradient_fix import adaptive, depth, factors_of, normalize, require_defined, rescaled, resolve
from libprune.collection.accumulator import Accumulator
from libprune.collection.backward import watching
from libprune.engine.architecture import Architecture
from libprune.engine.cost import unit_parameters
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.tables import Columns, unit_index
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import CRITERIA, score_units
from libprune.statistics.gradient_health import MILD, SEVERE, gradient_ratio
from libprune.statistics.gradients import gradient_columns, layer_rows, tensor_rows
from libprune.statistics.hessian import hessian_columns
from tests.support.collected import architecture, gradients, hessian, model
from tests.support.models import FAMILIES, tokens

__all__ = ["architecture", "model"]

FROM_GRADIENTS = {
    "taylor": Score(criterion="taylor"),
    "taylor_group": Score(criterion="taylor_group"),
    "taylor_2nd": Score(criterion="taylor_2nd"),
    "fisher": Score(criterion="fisher"),
    "hessian_trace": Score(criterion="hessian_trace"),
    "unit_fisher": Score(criterion="unit_fisher"),
    "unit_fisher, token": Score(criterion="unit_fisher", fisher_over="token"),
    "fisher_obs": Score(criterion="fisher_obs"),
    "gradient_flow": Score(criterion="gradient_flow"),
}
FACTORS = np.array([3.0, 0.25, 1.0, 7.5])


# Cached sums


@contextmanager
def scaled_gradients(factors: np.ndarray):
    """Inside the context every gradient of a layer, wherever it is collected, is multiplied by the layer's factor."""

    def scaled(model, architecture, on_output, on_input=None, *given, **named):
        def taking(take):
            return take and (lambda entry, x, delta: take(entry, x, delta * float(factors[entry.layer])))

        return watching(model, architecture, taking(on_output), taking(on_input), *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        for stage in ("gradients", "hessian"):
            patch.setattr(import_module(f"libprune.statistics.{stage}"), "watching", scaled)
        yield


def table_of(model, architecture: Architecture) -> Columns:
    """All per-unit columns that the criteria from gradients read."""
    weights = dict(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in weights.items()}
    first: Accumulator = gradients(model)
    second: Accumulator = hessian(model)
    blocks = []
    for layer, part in architecture.blocks():
        units, cost = architecture.units(part), unit_parameters(architecture, layer, part)
        block = {"cost": np.full(units, cost), "magnitude_l2": np.arange(1.0, units + 1)}
        block |= {"obs_share": np.linspace(0.1, 1, units)}
        block |= gradient_columns(architecture, first.finish(layer), weights, layer, part)
        blocks.append(block | hessian_columns(architecture, second.finish(layer), weights, layer, part))
    return unit_index(architecture) | {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def test_scores_under_a_fix_are_those_of_gradients_times_the_factors(model, architecture):
    plain = table_of(model, architecture)
    with scaled_gradients(FACTORS):
        scaled = table_of(model, architecture)
    assert not np.allclose(plain["taylor"], scaled["taylor"])
    for params in FROM_GRADIENTS.values():
        orders = CRITERIA[params.criterion].orders
        found, expected = rescaled(score_units(plain, params), orders, FACTORS), score_units(scaled, params)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if values.dtype.kind == "f":
                finite = np.abs(values[np.isfinite(values)])
                least = 1e-6 * finite.max(initial=0)  # where sums cancel, rounding is left
                about = f"{params.criterion}, {name}"
                np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=least, err_msg=about)


def test_the_squares_that_weigh_obs_fisher_grow_with_the_square_of_the_factor(model, architecture):
    plain = gradients(model)
    with scaled_gradients(FACTORS):
        scaled = gradients(model)
    order = CRITERIA["obs_fisher"].orders["obs_fisher"]
    for layer in range(architecture.layers):
        one, two = plain.finish(layer), scaled.finish(layer)
        names = [name for name in one if name.endswith("output_gradient_square")]
        assert names
        for name in names:
            np.testing.assert_allclose(two[name], one[name] * FACTORS[layer] ** order, rtol=1e-5)


def test_every_component_of_a_criterion_from_gradients_has_an_order():
    without = {name for name, criterion in CRITERIA.items() if not criterion.orders}
    assert without == {
        *("magnitude", "weight_stats", "wanda", "fluctuation", "activation_stats"),
        *("obs", "obs_share", "cooperative", "random", "reap", "routed_frequency"),
    }
    assert {
        name for name in CRITERIA if {"gradients", "hessian"} & set(CRITERIA[name].stages)
    } == CRITERIA.keys() - without


def test_the_norms_are_those_of_the_mean_gradients(model, architecture):
    sums = gradients(model)
    for layer in range(architecture.layers):
        tensors = sums.finish(layer)
        rows = tensor_rows(architecture, tensors, layer)
        assert len(rows["norm"]) == sum(len(architecture.parameters_of(layer, part)) for part in architecture.parts)
        for kind, norm in zip(rows["parameter"], rows["norm"], strict=True):
            flat = tensors[f"model.layers.{layer}.{kind}"].double().flatten().tolist()
            assert norm == pytest.approx(sum(value**2 for value in flat) ** 0.5)


# The factors

NORMS = st.lists(st.floats(1e-6, 1e6), min_size=6, max_size=30)


def tensors_of(norms: list[float], each: int = 3) -> Columns:
    norms = norms[: len(norms) // each * each]
    return {"layer_idx": np.arange(len(norms)) // each, "norm": np.array(norms)}


def means(tensors: Columns) -> np.ndarray:
    return tensors["norm"].reshape(-1, 3).mean(1)


@given(NORMS)
def test_normalize_gives_every_layer_a_mean_norm_of_one(norms):
    tensors = tensors_of(norms)
    np.testing.assert_allclose(normalize(tensors) * means(tensors), 1)


@given(NORMS, st.floats(1e-3, 1e3))
def test_adaptive_stays_in_its_bounds_whatever_the_scale_and_brings_layers_to_the_median(norms, scale):
    tensors = tensors_of(norms)
    factors = adaptive(tensors)
    assert ((factors >= 0.1) & (factors <= 10)).all()
    np.testing.assert_allclose(adaptive(tensors | {"norm": tensors["norm"] * scale}), factors, rtol=1e-9)
    inside = (factors > 0.1) & (factors < 10)
    np.testing.assert_allclose((factors * means(tensors))[inside], np.median(tensors["norm"]))


@given(NORMS)
def test_adaptive_never_widens_the_distance_of_layers(norms):
    tensors = tensors_of(norms)
    after = means(tensors) * adaptive(tensors)
    assert after.max() / after.min() <= means(tensors).max() / means(tensors).min() * (1 + 1e-9)


@pytest.mark.parametrize("weights", ["linear", "sqrt", "log"])
@given(layers=st.integers(1, 100))
def test_depth_falls_from_one_and_a_half_towards_a_half(weights, layers):
    factors = depth(layers, weights)
    assert factors[0] == pytest.approx(1.5)
    assert (np.diff(factors) < 0).all()
    assert factors[-1] > 0.5


def test_depth_by_its_formulas():
    np.testing.assert_allclose(depth(4, "linear"), [1.5, 1.25, 1.0, 0.75])
    np.testing.assert_allclose(depth(4, "sqrt"), np.sqrt([1, 0.75, 0.5, 0.25]) + 0.5)
    np.testing.assert_allclose(depth(4, "log"), np.log([5, 4, 3, 2]) / np.log(5) + 0.5)


def test_the_product_is_the_product_and_none_is_one():
    tensors = tensors_of([1.0, 2.0, 9.0, 4.0, 5.0, 0.5])
    np.testing.assert_allclose(factors_of("adaptive+depth", tensors, 2, "log"), adaptive(tensors) * depth(2, "log"))
    np.testing.assert_allclose(factors_of("normalize", tensors, 2, "log"), normalize(tensors))
    assert factors_of("none", tensors, 2, "log").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("ratio", "fix"),
    [(1.0, "none"), (99.9, "none"), (100.0, "adaptive"), (1000.0, "adaptive+depth"), (np.inf, "adaptive+depth")],
)
def test_auto_goes_by_the_gradient_ratio(ratio, fix):
    assert resolve("auto", float(ratio)) == fix
    assert resolve("depth", float(ratio)) == "depth"


# Where it is not defined


def test_a_layer_without_gradient_has_no_norm_but_a_bounded_adaptive_factor():
    tensors = tensors_of([0.0, 0.0, 0.0, 4.0, 5.0, 6.0, 4.0, 5.0, 6.0])
    with pytest.raises(StatisticsError, match="layer 0 has no gradient at all"):
        normalize(tensors)
    assert adaptive(tensors)[0] == 10
    with pytest.raises(StatisticsError, match="half of all parameters have no gradient"):
        adaptive(tensors_of([0.0, 0.0, 0.0, 0.0, 5.0, 6.0]))


@pytest.mark.parametrize(
    ("orders", "scaling", "method", "message"),
    [
        ({}, "none", "global", "from which wanda does not come"),
        ({"gradient_flow_snr": 0}, "none", "global", "wanda compares each unit's gradient with those of its own layer"),
        ({"taylor": 1}, "rank", "global", "gives every layer the same scale"),
        ({"taylor": 1}, "none", "search", "measures what layers are worth"),
    ],
)
def test_a_fix_that_would_mean_nothing_is_refused(orders, scaling, method, message):
    with pytest.raises(LibpruneError, match=message):
        require_defined("adaptive", "wanda", orders, scaling, method)
    require_defined("none", "wanda", orders, scaling, method)


# What a gradient ratio says of scores


def rescale(model, layers: range, scale: float) -> None:
    """The same function: the norms before the parts are divided by a number, the maps behind them multiplied by it."""
    for number in layers:
        layer = model.model.layers[number]
        maps = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        for norm, behind in (
            (layer.input_layernorm, maps),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data.div_(scale)
            for module in behind:
                module.weight.data.mul_(scale)


def test_weights_in_other_units_change_the_gradient_ratio_but_no_score():
    """The gradients at the norms of layers 2 and 3 are 65,536 times larger: severe by the ratio, nothing to mend."""
    plain, other = FAMILIES["llama"](0), FAMILIES["llama"](0)
    rescale(other, range(2, 4), 65536.0)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-6)
    ratios, scores = [], []
    for one in (plain, other):
        found, sums = describe(one), gradients(one)
        rows = [layer_rows(found, sums.finish(layer), layer, 3) for layer in range(found.layers)]
        ratios.append(gradient_ratio({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}))
        table = table_of(one, found)
        scores.append({name: score_units(table, params)["importance"] for name, params in FROM_GRADIENTS.items()})
    assert ratios[0] < MILD
    assert ratios[1] > SEVERE
    for name in ("taylor", "taylor_2nd", "fisher", "unit_fisher"):
        np.testing.assert_allclose(scores[1][name], scores[0][name], rtol=1e-3, err_msg=name)
