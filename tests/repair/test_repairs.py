"""Repairs from the artifacts: what the collecting stages store is what a repair reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import oriented
from libprune.models.folder import fingerprint, load_model
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Slice
from libprune.pipeline.shards import write_shard
from libprune.repair.least_squares import pruned_consumers
from libprune.repair.repairs import Repairing, bias_fits, discard_fits, local_fits
from libprune.repair.sequential import SequentialRepair
from libprune.results.prune import prune
from tests.support.collected import activations, captured
from tests.support.models import FAMILIES, plan_of, tokens
from tests.support.sealing import edit_json
from tests.support.sliced import write_collected

FITS: dict[str, Repairing] = {"local": local_fits, "bias": bias_fits}


@pytest.mark.parametrize("length", [12, 32, 64])
@pytest.mark.parametrize("how", FITS)
def test_a_repair_is_judged_by_the_inputs_of_the_held_out_sequences(tmp_path, how, length):
    """Against the inputs themselves, at every position or every second one, of sequences 7 and 15."""
    layout, model, ids = Layout(tmp_path), FAMILIES["llama"](0), tokens(17, length)
    model.save_pretrained(layout.model)
    origin = fingerprint(layout.model)
    architecture = describe(model, fingerprint=origin)
    plan = plan_of(architecture, lambda layer, part: 2 * architecture.units(part) // 3)
    text = write_tokens(layout.calibration_tokens, Sequences(ids), {"model": origin})
    layout.activations.mkdir()
    sums = activations(model, 4, ids)
    for layer in range(architecture.layers):
        write_shard(layout.activations, layer, sums.finish(layer), {"model": origin, "tokens": text})
    consumers = list(pruned_consumers(architecture, plan))
    with captured(model, [consumer.module for consumer, _ in consumers]) as table, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    fits = FITS[how](layout, architecture, plan, Compute(), Slice(repair=how, damping=0.01))
    assert len(fits) == len(consumers) == 8
    for fit, (consumer, kept) in zip(fits, consumers, strict=True):
        x = table[consumer.module].view(17, length, -1)
        old = oriented(consumer, model.get_parameter(consumer.weight).detach()).double()
        new, shift = old * kept, torch.zeros(len(old), dtype=torch.float64)
        if fit.weight is not None:
            new = oriented(consumer, fit.weight).double()
        else:
            shift = fit.bias.double() - model.get_parameter(consumer.bias).detach().double()
        held = torch.arange(17) % 8 == 7
        apart = x[held][:, :: max(1, length // 32)].flatten(0, 1)
        for rows, found in (
            (x[~held].flatten(0, 1), (fit.before, fit.after)),
            (apart, (fit.held_out_before, fit.held_out_after)),
        ):
            y = rows @ old.T
            lost = [(y - rows @ (old * kept).T).square().sum(), (y - rows @ new.T - shift).square().sum()]
            np.testing.assert_allclose(found, np.array(lost) / float(y.square().sum()), rtol=1e-3)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_bias_is_refused_where_the_config_cannot_say_it(tmp_path, name):
    def finish(folder: Path) -> None:  # a key that nothing reads says nothing
        edit_json(folder / "config.json", lambda config: config.update(attention_bias=False, mlp_bias=False))

    layout, _ = write_collected(tmp_path, name, "uniform", finish)
    with pytest.raises(LibpruneError, match=r"bias on model\.layers\.0\.(self_attn\.o|mlp\.down)_proj.*cannot say one"):
        prune(layout, tmp_path, Compute(), Slice(repair="bias"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sequential_repair_that_is_interrupted_goes_on_with_the_layers_that_are_fitted(
    tmp_path, quick_proof, monkeypatch, name
):
    """Also where what computes the channels is fitted; the proof in `prune` compares the sliced model with it."""
    step, params = SequentialRepair.step, Slice(repair="sequential", producer_steps=6)

    def run(layout: Layout) -> tuple[dict[str, torch.Tensor], list[int]]:
        fresh = []

        def watched(repair, layer, known=None):
            if layer == 2 and not layout.root.with_suffix(".on").exists():
                layout.root.with_suffix(".on").touch()
                raise KeyboardInterrupt
            fresh.extend([layer] * (known is None))
            return step(repair, layer, known)

        monkeypatch.setattr(SequentialRepair, "step", watched)
        folder = layout.root.with_suffix(".pruned")
        folder.mkdir(exist_ok=True)
        proof, fits = prune(layout, folder, Compute(), params)
        assert proof["logit_difference"] < 1e-4 * proof["logit_scale"]
        assert any(fit.others for fit in fits)
        return load_model(folder, torch.float32, trust_remote_code=True).state_dict(), fresh

    whole, _ = write_collected(tmp_path / "whole" / "artifacts", name, "holes")
    whole.root.with_suffix(".on").touch()
    broken, _ = write_collected(tmp_path / "broken" / "artifacts", name, "holes")
    expected, _ = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    found, fresh = run(broken)
    assert fresh == [2, 3]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("repair", ["sequential", "block"])
def test_fits_stay_saved_until_the_pruned_model_is_there(tmp_path, quick_proof, monkeypatch, capsys, repair):
    """A run that is stopped while it writes or proves the model has lost none of them."""
    layout, _ = write_collected(tmp_path / "artifacts", "llama", "holes")
    params, folders = Slice(repair=repair, block_rate=1e-3), [tmp_path / name for name in ("stopped", "whole")]
    for folder in folders:
        folder.mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("libprune.results.prune.write_pruned", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(layout, folders[0], Compute(), params)
    monkeypatch.setattr(SequentialRepair, "__init__", interrupt)
    capsys.readouterr()
    _, fits = prune(layout, folders[1], Compute(), params)
    assert "continues from a saved state: 4 of 4 layers are repaired" in capsys.readouterr().out
    assert len(fits) == sum(1 for _ in pruned_consumers(*described(layout)))
    assert (layout.work / "slice").exists()
    discard_fits(layout)
    assert not (layout.work / "slice").exists()


def described(layout: Layout) -> tuple[Architecture, Plan]:
    """The dense model, and what is removed."""
    architecture = read_architecture(layout)
    return architecture, read_plan(layout, architecture)[0]
