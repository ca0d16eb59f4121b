"""Evaluations: every figure of all models is what a direct count or measurement gives."""

import shutil
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from libprune.collection.calibration import place
from libprune.engine.architecture import STAND_IN
from libprune.engine.errors import ArtifactError, StatisticsError
from libprune.engine.plan import Plan
from libprune.models.folder import load_model
from libprune.models.tokens import read_tokens, write_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Evaluate, Slice
from libprune.recovery.idle import write_no_model
from libprune.results.draft import expected_speedup
from libprune.results.evaluate import evaluate_result, headline_metrics
from libprune.results.prune import prune
from libprune.results.record import PROVENANCE
from tests.support import tiny
from tests.support.evaluated import RECOVERY
from tests.support.models import FAMILIES, random_plan
from tests.support.sealing import edit_json
from tests.support.sliced import random_windows, write_plan, write_project, write_trained

COMPUTE = Compute(device="cpu", dtype="float32")
WINDOWS, LENGTH = 3, 16
SHORT = Evaluate(prompt_tokens=8, decode_tokens=2, rounds=1, continuations=2, continuation_tokens=4)


@pytest.fixture(scope="module")
def layout(tmp_path_factory, by_forks) -> Layout:
    """A project with a pruned model, a recovered one, and evaluation windows."""
    layout = write_project(tmp_path_factory.mktemp("project"))
    architecture = read_architecture(layout)
    write_plan(layout.plan, architecture, random_plan(architecture, "uniform"), "uniform")
    layout.pruned.mkdir()
    with by_forks():
        prune(layout, layout.pruned, COMPUTE, Slice(repair="none"))
    write_trained(layout.pruned, layout.recovered)
    text = read_tokens(layout.calibration_tokens, architecture.fingerprint)[1]["tokens"]
    origin = {"model": architecture.fingerprint, "source": "made up", "calibration": text}
    write_tokens(layout.evaluation_tokens, random_windows(architecture, WINDOWS, LENGTH), origin)
    return layout


@pytest.fixture(scope="module")
def evaluation(layout) -> dict:
    return evaluate_result(layout, COMPUTE, SHORT)


def folder_of(layout: Layout, name: str) -> Path:
    return {"dense": layout.model, "pruned": layout.pruned, "recovered": layout.recovered}[name]


@pytest.mark.parametrize("name", ["dense", "pruned", "recovered"])
def test_perplexity_is_that_of_transformers_own_loss(layout, evaluation, name):
    model = AutoModelForCausalLM.from_pretrained(folder_of(layout, name))
    ids = random_windows(read_architecture(layout), WINDOWS, LENGTH).ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert evaluation[name]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_parameters_and_bytes_are_those_of_the_weight_files(layout, evaluation, name):
    tensors = load_file(folder_of(layout, name) / "model.safetensors")
    figures = evaluation[name]
    assert figures["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert figures["bytes"] == 4 * figures["total_parameters"]
    decoder = [tensor.numel() for key, tensor in tensors.items() if ".layers." in key]
    assert figures["decoder_parameters"] == sum(decoder)


def test_shares_ratio_and_kept_units_follow_from_the_two_models_and_the_plan(layout, evaluation):
    architecture = read_architecture(layout)
    plan, _ = read_plan(layout, architecture)
    dense, pruned = evaluation["dense"], evaluation["pruned"]
    for kind in ("decoder", "total"):
        share = 1 - pruned[f"{kind}_parameters"] / dense[f"{kind}_parameters"]
        assert pruned[f"{kind}_share_removed"] == pytest.approx(share)
    assert pruned["macs_share_removed"] == pytest.approx(1 - pruned["macs_per_token"] / dense["macs_per_token"])
    assert evaluation["perplexity_ratio"]["value"] == pytest.approx(pruned["perplexity"] / dense["perplexity"])
    kept = [{part: plan.kept(layer, part) for part in architecture.parts} for layer in range(architecture.layers)]
    assert evaluation["kept"] == kept
    assert evaluation["model"]["biases"] == []
    assert [entry["window"] for entry in evaluation["continuations"]] == [0, WINDOWS - 1]


def test_the_headline_is_a_part_of_the_whole(evaluation):
    headline = headline_metrics(evaluation)
    assert "tasks" not in headline
    assert headline["recovered"] == evaluation["recovered"] | {
        name: RECOVERY[name] for name in ("tokens", "seconds", "trained_parameters")
    }
    for section in ("dense", "pruned", "perplexity_ratio", "speed"):
        assert headline[section].items() <= evaluation[section].items()


def test_a_pruned_model_of_another_plan_is_refused(layout):
    """The plan in `artifacts` has changed since slice ran."""
    architecture = read_architecture(layout)
    before = layout.plan.read_bytes()
    write_plan(layout.plan, architecture, Plan.dense(architecture), "per_layer")
    try:
        with pytest.raises(ArtifactError, match="run `dvc repro`"):
            evaluate_result(layout, COMPUTE, Evaluate())
    finally:
        layout.plan.write_bytes(before)


@pytest.mark.parametrize("name", ["pruned", "recovered"])
def test_a_model_is_measured_as_a_draft_for_the_dense_one(layout, evaluation, name):
    ids = random_windows(read_architecture(layout), WINDOWS, LENGTH).ids
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(folder_of(layout, one))(input_ids=ids).logits.double().softmax(-1)
            for one in ("dense", name)
        )
    draft, windows = evaluation[name]["draft"], torch.minimum(p, q).sum(-1).mean(1)
    assert draft["acceptance"] == pytest.approx(float(windows.mean()), rel=1e-5)
    assert draft["acceptance_se"] == pytest.approx(float(windows.std()) / WINDOWS**0.5, rel=1e-4)
    assert draft["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert draft["step_ratio"] == 1 / evaluation["speed"]["decode_ratio"]
    assert draft["speedup"] == expected_speedup(draft["acceptance"], draft["step_ratio"], draft["tokens"])


# With and without a recovered model


def test_the_recovered_model_is_compared_with_the_dense_one_beside_the_pruned(evaluation):
    recovered, dense = evaluation["recovered"], evaluation["dense"]
    assert recovered["perplexity_ratio"]["value"] == pytest.approx(recovered["perplexity"] / dense["perplexity"])
    assert recovered["perplexity"] != evaluation["pruned"]["perplexity"]
    assert evaluation["recovery"] == RECOVERY | {"proof": {"logit_difference": 0.0, "logit_scale": 1.0}}
    for entry in evaluation["continuations"]:
        assert {"dense", "pruned", "recovered", "agree", "agree_recovered"} <= entry.keys()


def test_the_figures_of_the_dense_and_the_pruned_model_do_not_depend_on_a_recovered_one(layout, evaluation, tmp_path):
    alone = evaluate_result(idle(layout, tmp_path), COMPUTE, SHORT)
    assert alone["recovered"] is alone["recovery"] is None
    assert "recovered" not in headline_metrics(alone)
    timed = {"prefill", "decode", "draft"}
    for name in ("dense", "pruned"):
        assert {k: v for k, v in alone[name].items() if k not in timed} == {
            k: v for k, v in evaluation[name].items() if k not in timed
        }
    measured = ("acceptance", "acceptance_se", "agreement", "agreement_se")
    assert [alone["pruned"]["draft"][key] for key in measured] == [
        evaluation["pruned"]["draft"][key] for key in measured
    ]
    assert alone["perplexity_ratio"] == evaluation["perplexity_ratio"]
    for mine, other in zip(alone["continuations"], evaluation["continuations"], strict=True):
        assert mine == {key: value for key, value in other.items() if "recovered" not in key}


def idle(layout: Layout, folder: Path) -> Layout:
    """A copy of a layout in which nothing was recovered."""
    copied = Layout(folder / "artifacts")
    shutil.copytree(layout.root, copied.root)
    shutil.rmtree(copied.recovered)
    write_no_model(copied)
    return copied


def test_no_more_than_two_models_are_in_memory_at_once(layout, monkeypatch):
    alive, before = WeakSet(), {}

    def loaded(folder: Path, *given: object, **more: object) -> torch.nn.Module:
        before[folder.name] = len(alive)
        model = load_model(folder, *given, **more)
        alive.add(model)
        return model

    monkeypatch.setattr("libprune.results.evaluate.load_model", loaded)
    evaluate_result(layout, COMPUTE, SHORT)
    assert before == {"model": 0, "pruned": 1, "recovered": 1}


def test_where_weights_visit_their_device_experts_run_by_modules_in_every_layer_that_is_left(
    tmp_path, quick_proof, monkeypatch
):
    """Also in the place of a layer that had no experts, and has gone."""
    source, layout = tmp_path / "source", Layout(tmp_path / "artifacts")
    FAMILIES["deepseek_v3"](0).save_pretrained(source)
    tiny.write_tokenizer(source)
    text, settings = tiny.write_text(tmp_path / "text.txt", documents=60), {"repair": "none", "rescale": "none"}
    tiny.write_params(tmp_path / "params.yaml", str(source), str(text), slice=settings, compute={"offload": "cpu"})
    tiny.run_stages(tmp_path, ("prepare", "tokenize"))
    architecture = read_architecture(layout)
    keep = {block: units & (block[0] > 0) for block, units in Plan.dense(architecture).keep.items()}
    write_plan(layout.plan, architecture, Plan(keep), "uniform")
    tiny.run_stages(tmp_path, ("slice", "teacher", "recover"))
    numbers = []

    def placed(*given: object) -> torch.nn.Module:
        model = place(*given)
        experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
        exposed = [[name for name, _ in one.named_children() if f".{name}".startswith(STAND_IN)] for one in experts]
        numbers.append((len(experts), list(map(len, exposed))))
        return model

    monkeypatch.setattr("libprune.results.evaluate.place", placed)
    tiny.run_stages(tmp_path, ("evaluate",))
    assert numbers == [(2, [2, 2])] * 2


ORIGINS = {"plan": "method", "slice": "repair", "proof": "logit_scale"}
"""By a section of the record, a key of it."""


@pytest.mark.parametrize("section", ORIGINS)
def test_a_model_that_was_recovered_from_another_pruned_model_is_refused(layout, tmp_path, section):
    """The model was pruned by another plan, repaired otherwise, or of other weights."""
    changed = Layout(tmp_path / "artifacts")
    shutil.copytree(layout.root, changed.root)
    path = changed.recovered / PROVENANCE
    edit_json(path, lambda made: made[section].update({ORIGINS[section]: "other"}))
    with pytest.raises(ArtifactError, match=r"recovered belongs to .*'other'.*run `dvc repro` to make them agree"):
        evaluate_result(changed, COMPUTE, SHORT)


def test_without_a_folder_of_the_recovered_model_the_stage_is_named(layout, tmp_path):
    copied = idle(layout, tmp_path)
    shutil.rmtree(copied.recovered)
    with pytest.raises(ArtifactError, match=r"recovered does not exist; run `dvc repro recover` first"):
        evaluate_result(copied, COMPUTE, SHORT)


def test_a_loss_that_is_no_number_is_no_worse_text(layout, monkeypatch):
    """Such as of a dense model in float16 that overflows: no ratio of it means anything."""
    one = torch.tensor([1.0, torch.nan, 1.0])
    monkeypatch.setattr("libprune.results.draft.logits_losses", lambda *_: one)
    with pytest.raises(StatisticsError, match=r"loss of the dense model is not finite in window 1; .*float32"):
        evaluate_result(layout, COMPUTE, SHORT)
