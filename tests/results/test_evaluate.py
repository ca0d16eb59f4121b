"""Evaluations: every figure of both models is what a direct count or measurement gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from libprune.engine.errors import ArtifactError
from libprune.engine.plan import Plan
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Evaluate, Slice
from libprune.results.evaluate import evaluate_result, headline_metrics
from libprune.results.prune import prune
from tests.support.models import random_plan
from tests.support.sliced import random_windows, write_plan, write_project

COMPUTE = Compute(device="cpu", dtype="float32")
WINDOWS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def layout(tmp_path_factory, python) -> Layout:
    """A project with a pruned model and evaluation windows."""
    layout = write_project(tmp_path_factory.mktemp("project"))
    architecture = read_architecture(layout)
    write_plan(layout.plan, architecture, random_plan(architecture, "uniform"), "uniform")
    layout.pruned.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(python))
        prune(layout, layout.pruned, COMPUTE, Slice(repair="none"))
    origin = {"model": architecture.fingerprint, "source": "made up"}
    write_tokens(layout.evaluation_tokens, random_windows(architecture, WINDOWS, LENGTH), origin)
    return layout


@pytest.fixture(scope="module")
def evaluation(layout) -> dict:
    params = Evaluate(prompt_tokens=8, decode_tokens=2, rounds=1, continuations=2, continuation_tokens=4)
    return evaluate_result(layout, COMPUTE, params)


def folder_of(layout: Layout, name: str) -> Path:
    return {"dense": layout.model, "pruned": layout.pruned}[name]


@pytest.mark.parametrize("name", ["dense", "pruned"])
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
