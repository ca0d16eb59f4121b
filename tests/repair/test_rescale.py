"""Rescaling behind gaps: exact where it is done, refused where it is not, and nothing elsewhere."""

import pytest
import torch
from safetensors.torch import load_file

from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.stacks import exposed
from libprune.engine.surgery import hooked, masked
from libprune.models.layers import layers_of, replaced
from libprune.pipeline.artifacts import read_architecture, read_json
from libprune.pipeline.sections import Compute, Slice
from libprune.repair import rescale
from libprune.repair.rescale import Rescaling, behind_gaps, measure_rescaling, rescales_exactly
from libprune.results.check import _changers
from libprune.results.prune import prune
from libprune.results.record import PROVENANCE, read_record
from tests.support.models import FAMILIES, plan_of, tokens
from tests.support.sliced import write_collected

BEHIND_NORMS = ("gemma2", "olmo2", "glm4", "exaone4", "bert")
"""Families with norms behind their parts."""


def without(architecture, *gone: tuple[int, str] | int) -> Plan:
    """The plan that removes some whole layers, or parts of them."""
    return plan_of(architecture, lambda layer, part: architecture.units(part) * (not {layer, (layer, part)} & {*gone}))


def lengths(model, ids) -> torch.Tensor:
    """Mean length of the stream in front of each layer, without first tokens, ``[layers]``."""
    with torch.no_grad():
        states = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack([state[:, 1:].norm(dim=-1).mean() for state in states[:-1]])


@pytest.mark.parametrize("name", ["llama", "granite", "gpt2"])
def test_behind_every_gap_the_stream_is_in_proportion_as_long_as_the_dense_one(tmp_path, name):
    """Where what is added is divided by alpha the stream is 1 / alpha of the dense one; that is the factor."""
    layout, _ = write_collected(tmp_path, name, "uniform")
    architecture, model, ids = read_architecture(layout), FAMILIES[name](0), tokens(17, 32)[:16]
    first, *_, last = architecture.parts_of(1)
    plan = without(architecture, 0, (1, first), (2, last))
    assert behind_gaps(architecture, plan) == (1, 2, 3)
    found = measure_rescaling(layout, architecture, plan, Compute(), 17)
    assert list(found.factors) == [1, 2, 3]
    dense, weights = lengths(model, ids), dict(model.named_parameters())
    scaled = {n: weights[n] * by for n, by in found.by_name(architecture).items() if n in weights}
    with replaced(model, scaled), masked(model, architecture, plan):
        pruned = lengths(model, ids)
    torch.testing.assert_close(pruned[1:] / dense[1:], torch.tensor([*found.factors.values()]), rtol=2e-3, atol=0)
    assert max(abs(1 - by) for by in found.factors.values()) > 0.02


@pytest.mark.parametrize("name", [*BEHIND_NORMS, "llama", "gpt2", "opt", "granite", "qwen3_moe", "nemotron_h"])
def test_the_other_way_to_write_a_longer_stream_is_taken_where_it_is_the_same_function(name):
    model = FAMILIES[name](0)
    architecture = describe(model)
    plan, ids = without(architecture, (1, architecture.parts_of(1)[0])), tokens()
    exact = rescales_exactly(exposed(model, architecture), architecture, plan, 2, ids)
    assert exact is (name not in BEHIND_NORMS)
    layers, weights = layers_of(model, architecture), dict(model.named_parameters())
    names = Rescaling(dict.fromkeys(range(2, len(layers)), 0.5)).by_name(architecture)
    with torch.no_grad(), masked(model, architecture, plan):
        plain = model(ids)[0]
        with replaced(model, {n: weights[n] * by for n, by in names.items() if n in weights}):
            less = model(ids)[0]
        with hooked(model) as handles:
            handles.append(layers[2].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:])))
            longer = model(ids)[0]
    assert bool((less - longer).norm() < 0.1 * (plain - longer).norm()) is exact


@pytest.mark.parametrize(
    ("name", "repair"), [("llama", "none"), ("llama", "local"), ("llama_mha", "bias"), ("gpt2", "local")]
)
def test_the_pruned_folder_has_the_rescaled_weights(tmp_path, quick_proof, name, repair):
    """The proof in `prune` compares the reloaded folder with the masked dense model under them."""
    layout, _ = write_collected(tmp_path, name, "holes")
    folders = {key: tmp_path / key for key in ("auto", "none")}
    for key, folder in folders.items():
        folder.mkdir()
        result, _ = prune(layout, folder, Compute(), Slice(repair=repair, rescale=key))
        assert result["logit_difference"] < 1e-4 * result["logit_scale"]
        assert ("rescale" in result) == (key == "auto")
        assert ("slice.rescale: auto" in _changers(read_record(folder))) == (key == "auto")
    made = read_json(folders["auto"] / PROVENANCE, "slice")["rescale"]
    architecture = read_architecture(layout)
    given = {int(layer): factor for layer, factor in made["factors"].items()}
    assert sorted(given) == [1, 3]
    assert made["why_not"] == ""
    new, old = (load_file(folders[key] / "model.safetensors") for key in ("auto", "none"))
    assert new.keys() == old.keys()
    moved = [name for name in new if not torch.equal(new[name], old[name])]
    writers = {c.weight for layer in given for c in architecture.consumers_in(layer)}
    assert 0 < len(moved) <= 2 * len(writers)
    for each in moved:
        by = [factor for factor in given.values() if torch.allclose(new[each], old[each] * factor, rtol=1e-5)]
        assert len(by) == 1


@pytest.mark.parametrize(("repair", "kind"), [("none", "uniform"), ("sequential", "holes")])
def test_nothing_is_rescaled_without_gaps_or_behind_a_repair_that_fits_there(
    tmp_path, quick_proof, monkeypatch, repair, kind
):
    monkeypatch.setattr(rescale, "set_up", lambda *_: pytest.fail("measured"))
    layout, _ = write_collected(tmp_path, "llama", kind)
    weights = []
    for key in ("auto", "none"):
        folder = tmp_path / key
        folder.mkdir()
        result, _ = prune(layout, folder, Compute(), Slice(repair=repair, rescale=key, sequences=8))
        assert "rescale" not in result
        assert "rescale" not in read_json(folder / PROVENANCE, "slice")
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_model_whose_stream_has_a_length_of_its_own_is_left_as_it_is(tmp_path, quick_proof, capsys):
    layout, _ = write_collected(tmp_path, "gemma2", "holes")
    folder = tmp_path / "pruned"
    folder.mkdir()
    result, _ = prune(layout, folder, Compute(), Slice(repair="none"))
    assert "rescale" not in result
    made = read_json(folder / PROVENANCE, "slice")["rescale"]
    assert made["factors"] == {}
    assert "length of its residual stream" in made["why_not"]
    assert "slice.rescale: layers behind those that are gone stay as they are" in capsys.readouterr().out
