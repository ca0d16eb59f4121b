"""The contract that every repair passes, on what the collecting stages really write of tiny models.

A repair joins by its entry in `REPAIRS`; one with params of its own adds them to `VARIANTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented, slice_state
from libprune.models.folder import WeightFiles, load_model
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.sections import Compute, Slice
from libprune.repair.least_squares import Fit, new_parameters, pruned_consumers
from libprune.repair.repairs import print_fits
from libprune.results.folder import write_pruned
from tests.support.models import FAMILIES, LAYOUTS, MODELS, random_plan, tokens
from tests.support.sliced import write_collected

VARIANTS: dict[str, list[Slice]] = {
    "sequential": [
        Slice(repair="sequential", damping=0.01),
        Slice(repair="sequential", producer_steps=4),
    ],
    "block": [Slice(repair="block", block_epochs=1, block_rate=1e-4)],
}
CASES = {
    "-".join([name, *map(str, params.model_dump(exclude_defaults=True, exclude={"repair"}))]): params
    for name in REPAIRS
    for params in [Slice(repair=name), *VARIANTS.get(name, [])]
}
WITHOUT_BIAS = ("qwen3", "phi3", "gemma2")
"""Families whose config cannot give every consumer a bias; `bias` refuses them."""
COMPUTE = Compute(device="cpu", dtype="float32")


@dataclass(frozen=True)
class Place:
    """The artifacts of a tiny model and of a plan with holes, and the fits that were computed from them."""

    layout: Layout
    plan: Plan
    architecture: Architecture
    dense: WeightFiles
    known: dict[str, list[Fit]] = field(default_factory=dict)

    def compute(self, params: Slice, plan: Plan | None = None) -> list[Fit]:
        return REPAIRS[params.repair].repair(self.layout, self.architecture, plan or self.plan, COMPUTE, params)

    def fits(self, case: str) -> list[Fit]:
        """The fits of a case, computed once."""
        if case not in self.known:
            self.known[case] = self.compute(CASES[case])
        return self.known[case]

    def kept(self) -> dict[str, Tensor]:
        """The input positions that stay of every pruned consumer, by its module."""
        return {consumer.module: kept for consumer, kept in pruned_consumers(self.architecture, self.plan)}

    def behind(self) -> dict[str, Tensor]:
        """All input positions of every consumer that loses none and lies behind a whole part that is gone."""
        found, before = dict[str, Tensor](), False
        for layer, part in self.architecture.blocks():
            before |= self.plan.gone(layer, part)
            for consumer in self.architecture.consumers(layer, part):
                if before and self.plan.keep[layer, part].all():
                    found[consumer.module] = torch.ones(consumer.input.size(self.architecture.sizes), dtype=torch.bool)
        return found


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Callable[[str], Place]:
    """A place for each family, made when it is first asked for."""
    made: dict[str, Place] = {}

    def place(name: str) -> Place:
        if name not in made:
            layout, plan = write_collected(tmp_path_factory.mktemp(name) / "artifacts", name, "holes")
            made[name] = Place(layout, plan, read_architecture(layout), WeightFiles(layout.model))
        return made[name]

    return place


every_case = pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in LAYOUTS for case in CASES if case != "bias" or name not in WITHOUT_BIAS],
)


def rows_changed(new: Tensor, old: Tensor) -> list[int]:
    return (new != old).any(1).nonzero().flatten().tolist()


@every_case
def test_every_pruned_consumer_is_fitted_once_in_its_dense_shape_and_reads_nothing_that_is_removed(places, name, case):
    place = places(name)
    kept, fits, repair = place.kept(), place.fits(case), REPAIRS[CASES[case].repair]
    if repair.function is None:
        assert fits == []
        return
    kept |= place.behind() if repair.layer_by_layer else {}
    assert sorted(fit.consumer.module for fit in fits) == sorted(kept)
    for fit in fits:
        assert (fit.weight is None) is (fit.bias is not None), "a repair of the weights or of the bias"
        for parameter, tensor in new_parameters([fit]).items():
            old = place.dense[parameter]
            assert (tensor.shape, tensor.dtype) == (old.shape, old.dtype)
            assert torch.isfinite(tensor).all()
            assert not torch.equal(tensor, old)
        if fit.weight is not None:
            assert not oriented(fit.consumer, fit.weight)[:, ~kept[fit.consumer.module]].any()


@every_case
def test_only_pruned_consumers_change_and_of_their_producers_the_rows_of_the_units_that_stay(places, name, case):
    place = places(name)
    architecture = place.architecture
    fits = place.fits(case)
    whole = CASES[case].repair == "block"
    assert bool(CASES[case].producer_steps) or whole or not any(fit.others for fit in fits)
    for fit in fits:
        layer, part = fit.consumer.layer, fit.consumer.part
        parts = architecture.parts_of(layer) if whole else [part]
        maps = {entry.weight: entry for one in parts for entry in architecture.maps_of(layer, one)}
        known = {parameter.name for one in parts for parameter in architecture.parameters_of(layer, one)}
        own = {fit.consumer.weight} if fit.bias is None else {fit.consumer.bias}
        assert set(new_parameters([fit])) == own | set(fit.others)
        assert fit.others.keys() <= (known if whole else maps.keys()) - {fit.consumer.weight}
        for parameter in fit.others.keys() & maps.keys():
            entry, tensor = maps[parameter], fit.others[parameter]
            units = entry.output.units(architecture.parts[entry.part].axis, architecture.sizes)
            changed = rows_changed(oriented(entry, tensor), oriented(entry, place.dense[parameter]))
            assert changed
            assert not set(units[changed]) & {*np.flatnonzero(~place.plan.keep[layer, entry.part])}
            assert whole or -1 not in units[changed]


def test_producers_are_fitted_where_each_channel_depends_on_its_own_token_alone(places):
    """So that the test of the producers sees some."""
    case = "sequential-producer_steps"
    assert {name for name in LAYOUTS if any(fit.others for fit in places(name).fits(case))} == set(LAYOUTS)


@every_case
def test_no_consumer_loses_more_than_without_the_repair(places, name, case):
    """On held-out text there is no such bound; but the largest ridge of 100 changes weights by about a hundredth."""
    for fit in places(name).fits(case):
        assert 0 <= fit.after <= fit.before * (1 + 1e-6)
        assert 0 < fit.held_out_after <= fit.held_out_before * 1.01, fit.consumer.module


@pytest.mark.parametrize("case", CASES)
def test_a_map_whose_inputs_that_stay_are_all_zero_keeps_its_weights_and_is_named(case, tmp_path, monkeypatch, capsys):
    """As behind rectifiers that never open; the channels that go are open."""

    def make(seed: int) -> PreTrainedModel:
        model = FAMILIES["opt"](seed)
        model.config.activation_function = "relu"
        for layer in model.model.decoder.layers:
            layer.activation_fn = torch.nn.ReLU()
        stays = torch.from_numpy(random_plan(describe(model), "channels").keep[1, "mlp"])
        first = model.model.decoder.layers[1].fc1
        with torch.no_grad():
            first.weight[stays], first.bias[stays] = 0, -1
        return model

    monkeypatch.setitem(MODELS, "silent", make)
    layout, plan = write_collected(tmp_path / "artifacts", "silent", "channels")
    architecture, dense = read_architecture(layout), WeightFiles(layout.model)
    fits = REPAIRS[CASES[case].repair].repair(layout, architecture, plan, COMPUTE, CASES[case])
    fitted = {fit.consumer.module: fit for fit in fits if fit.weight is not None}
    print_fits(fits)
    said, module = capsys.readouterr().out, "model.decoder.layers.1.fc2"
    assert (f"{module} kept the old weights: all inputs that stay are 0" in said) == (module in fitted)
    if module in fitted:
        assert np.isnan(fitted[module].damping)
        assert not np.isnan([fit.damping for name, fit in fitted.items() if name != module]).any()
        assert torch.equal(fitted[module].weight, dense[f"{module}.weight"] * torch.from_numpy(plan.keep[1, "mlp"]))


@every_case
def test_the_same_plan_gives_the_same_tensors_again(places, name, case):
    one, other = (new_parameters(fits) for fits in (places(name).fits(case), places(name).compute(CASES[case])))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[parameter]) for parameter, tensor in one.items())


@every_case
def test_a_plan_that_removes_nothing_gives_no_fit(places, name, case):
    place = places(name)
    assert place.compute(CASES[case], Plan.dense(place.architecture)) == []


@every_case
def test_the_result_computes_what_the_masked_dense_model_does_under_the_new_weights(places, name, case, tmp_path):
    place = places(name)
    architecture, plan, new = place.architecture, place.plan, new_parameters(place.fits(case))
    weights = {parameter.name: place.dense[parameter.name] for parameter in architecture.parameters} | new
    folder = place.layout.model
    write_pruned(tmp_path, folder, architecture, plan, "per_layer", slice_state(weights, architecture, plan))
    pruned = load_model(tmp_path, torch.float32, trust_remote_code=True)
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        for parameter, tensor in new.items():
            model.get_parameter(parameter).copy_(tensor)
        found = pruned(input_ids=tokens(3, 20), use_cache=False).logits
        with masked(model, architecture, plan):
            expected = model(input_ids=tokens(3, 20), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
