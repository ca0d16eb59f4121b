"""The contract of a narrower residual stream: turned computes the same, sliced equals masked, or it is refused."""

from dataclasses import replace

import pytest
import torch

from libprune.collection.stream import read_stream, require_narrowable
from libprune.collection.stream_axes import Narrowed, choose_kind, turn_model
from libprune.engine import cost
from libprune.engine.architecture import RESIDUAL
from libprune.engine.describe import describe, stored_tensors
from libprune.engine.errors import LibpruneError
from libprune.engine.family import families
from libprune.engine.stacks import exposed
from libprune.engine.surgery import masked, slice_state
from libprune.results.folder import pruned_config
from tests.support.models import FAMILIES, MODELS, outputs, random_plan, tokens
from tests.support.widths import NARROWING, STAY, made_axes, width_of

TOWERS = [name for name in MODELS if name not in FAMILIES]


@pytest.mark.parametrize("name", NARROWING)
def test_sliced_is_masked_under_the_weights_along_the_axes(name):
    model = FAMILIES[name](0)
    architecture, dense = describe(model), {name: p.detach().clone() for name, p in stored_tensors(model).items()}
    exposed(model, architecture)
    width, ids = width_of(architecture), tokens()
    axes = made_axes(model, architecture, choose_kind("auto", read_stream(model, architecture)))
    with torch.no_grad():
        before = outputs(model, ids)
        turn_model(model, architecture, axes)
        after = outputs(model, ids)
    assert torch.allclose(after, before, atol=2e-5 * float(before.abs().max())), "turning changes nothing"
    plan = replace(random_plan(architecture, "channels"), width=width)
    weights = Narrowed(dense, architecture, axes, width, repair=True)
    with torch.no_grad():
        for parameter in architecture.parameters:
            model.get_parameter(parameter.name).copy_(weights[parameter.name])
        with masked(model, architecture, plan):
            expected = outputs(model, ids)
    said = pruned_config(families()[architecture.family], model.config, architecture, plan, "uniform")
    pruned = type(model)(type(model.config).from_dict(said)).eval()
    sliced = slice_state(weights, architecture, plan)
    assert {name: tensor.shape for name, tensor in stored_tensors(pruned).items()} == {
        name: tensor.shape for name, tensor in sliced.items()
    }
    assert sum(p.numel() for p in pruned.parameters()) == cost.size(architecture, plan).total
    pruned.load_state_dict(sliced, strict=False)
    with torch.no_grad():
        given = outputs(pruned, ids)
    assert torch.allclose(given, expected, atol=2e-5 * float(expected.abs().max()))
    assert not torch.allclose(given, before, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*STAY, *TOWERS])
def test_a_stream_that_stays_as_wide_is_refused_by_name(name):
    model = MODELS[name](0)
    architecture = describe(model)
    with pytest.raises(LibpruneError, match=STAY.get(name, "image features enter it")):
        require_narrowable(architecture, model.config, width_of(architecture))
        read_stream(exposed(model, architecture), architecture)


@pytest.mark.parametrize("width", [0, 30, 31])
def test_no_width_but_a_smaller_one_is_taken(width):
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    assert architecture.sizes[RESIDUAL] == 30
    with pytest.raises(LibpruneError, match=f"allocate.width = {width}, but the residual stream of this model has 30"):
        require_narrowable(architecture, model.config, width)
