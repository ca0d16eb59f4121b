"""Encoders without a head through the whole pipeline: what is measured, written and shown of their embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import ParamsError
from libprune.engine.family import families
from libprune.engine.surgery import masked
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.results.check import check_folder
from libprune.statistics.sensitivity import removal_plans
from tests.support import tiny
from tests.support.models import FAMILIES
from tests.support.stages import STAGES, run


def write_project(folder: Path, name: str = "bert_embedding", **changes: dict) -> None:
    source = tiny.write_encoder(folder / "source", FAMILIES[name])
    modules = [{"path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"} for path in PATHS]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    text = tiny.write_text(folder / "text.txt")
    tiny.write_params(folder / "params.yaml", str(source), str(text), **changes)


PATHS = ("", "1_Pooling", "2_Normalize")


@pytest.fixture(scope="module")
def project(tmp_path_factory, by_forks) -> Path:
    """A project in which every stage has run; its attention is cut too."""
    folder = tmp_path_factory.mktemp("embeddings")
    with pytest.MonkeyPatch.context() as patch, by_forks():
        patch.chdir(folder)
        write_project(
            folder,
            ablation={"units": 4, "sequences": 4},
            allocate={"ratio": 0.1, "shape": "per_layer", "method": "hgsp"},
            slice={"repair": "sequential"},
            recover={"method": "full", "hidden_states": 0.1},
        )
        run(*STAGES)
    return folder


def test_the_result_is_what_it_says(project):
    found = json.loads((project / "artifacts/evaluation.json").read_text())
    assert found["model"]["head"] == "embedding"
    assert found["pruned"]["decoder_share_removed"] == pytest.approx(0.1, abs=0.02)
    assert found["perplexity_ratio"] is None
    for model in ("pruned", "recovered"):
        assert 0 < found[model]["cosine"] < 1
        assert -1 < found[model]["rank_correlation"] < 1
    metrics = json.loads((project / "metrics/evaluation.json").read_text())
    assert metrics["pruned"]["cosine"] == found["pruned"]["cosine"]
    assert "dense" not in metrics
    report = (project / "report/report.md").read_text()
    assert "cosine to the dense embedding" in report
    assert "rank correlation of similarities, recovered" in report
    assert "AutoModel.from_pretrained" in report
    assert "its hidden states differ" in report
    assert "perplexity" not in report.replace("curve of perplexity", "").lower()
    card = (project / "artifacts/model_card.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "| model | cosine to the dense embedding | rank correlation of similarities |" in card


@pytest.mark.parametrize("folder", ["pruned", "recovered"])
def test_the_files_of_sentence_transformers_stay_and_the_folder_is_whole(project, folder, quick_proof):
    where = project / "artifacts" / folder
    assert json.loads((where / "1_Pooling/config.json").read_text()) == {"pooling_mode_cls_token": True}
    assert (where / "modules.json").read_text() == (project / "source/modules.json").read_text()
    findings = list(check_folder(where, trust_remote_code=True))
    assert {one.kind for one in findings} <= {"ok", "note"}
    assert "hidden states" in {one.about for one in findings}


def test_the_pooling_of_the_files_is_in_the_description_and_with_the_tokens(project):
    layout = Layout(project / "artifacts")
    architecture = read_architecture(layout)
    assert architecture.pooling == "cls"
    assert read_tokens(layout.calibration_tokens, architecture.fingerprint)[0].pooling == "cls"


def test_measured_losses_are_the_real_distances(project):
    """One minus the cosine to the dense embedding, of the first token as the files say."""
    layout = Layout(project / "artifacts")
    architecture, model = read_architecture(layout), FAMILIES["bert_embedding"](0)
    sequences, _ = read_tokens(layout.calibration_tokens, architecture.fingerprint)
    table, meta = read_table(layout.sensitivity, "sensitivity")
    ids = sequences.ids[-meta["sequences"] :]
    with torch.no_grad():
        dense = model(ids).last_hidden_state[:, 0]
        for number, plan in enumerate(removal_plans(architecture).values()):
            with masked(model, architecture, plan):
                found = torch.nn.functional.cosine_similarity(model(ids).last_hidden_state[:, 0], dense)
            assert table["loss_increase"][number] == pytest.approx(float((1 - found).mean()), abs=1e-6)
    assert meta["loss"] == 0


def test_first_order_criteria_and_unit_fisher_do_not_vanish(project):
    layout = Layout(project / "artifacts")
    columns, _ = read_table(layout.gradients / "units.parquet", "gradients")
    assert (columns["unit_fisher_sequence"] > 0).all()
    assert (columns["taylor"] > 0).all()


# What is refused


@pytest.mark.parametrize(
    ("changes", "stages", "message"),
    [
        ({"recover": {"method": "full", "top_k": 3}}, ("teacher",), "recover.top_k is of predicted tokens or labels"),
        ({"recover": {"cross_entropy": 0.5}}, ("recover",), "recover.cross_entropy is of predicted tokens or labels"),
    ],
)
def test_what_only_predictions_have_is_refused(tmp_path, monkeypatch, changes, stages, message):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, recover={"method": "full", **changes["recover"]})
    run("prepare", "tokenize")
    with pytest.raises(ParamsError, match=message):
        run(*stages)


def test_too_few_texts_for_a_correlation_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "distilbert", tokenize={"evaluation_windows": 3})
    run("prepare")
    with pytest.raises(ParamsError, match=r"tokenize\.evaluation_windows: 3 are too few for embeddings.*take 4"):
        run("tokenize")


def test_a_pooling_of_a_model_with_a_head_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, text = tiny.write_encoder(tmp_path / "source", FAMILIES["bert"]), tiny.write_text(tmp_path / "text.txt")
    tiny.write_params(tmp_path / "params.yaml", str(source), str(text), prepare={"pooling": "cls"})
    with pytest.raises(ParamsError, match=r"prepare\.pooling: cls is for models without a head, but this one has the"):
        run("prepare")


# Heads beside the embedding


HEADED = [
    (kind, head)
    for kind in ("roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert")
    for head in ("ForMaskedLM", "ForSequenceClassification")
]


@pytest.mark.parametrize(("kind", "head"), HEADED)
def test_every_parameter_of_a_model_with_a_head_is_described(kind, head):
    small = {"vocab_size": 37, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **small, max_position_embeddings=52, pad_token_id=1)
    name = {"xlm-roberta": "XLMRoberta", "distilbert": "DistilBert", "mpnet": "MPNet", "modernbert": "ModernBert"}
    config.architectures = [name.get(kind, "Roberta") + head]
    model = without_weights(config)
    architecture = describe(model)
    assert architecture.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert architecture.layers_path == families()[architecture.family].layers


def test_heads_of_mpnet_are_coupled_by_what_its_layers_share():
    architecture = describe(FAMILIES["mpnet"](0))
    assert architecture.parts["attention"].coupled == ("encoder.relative_attention_bias",)
    assert architecture.parts["mlp"].coupled == ()
    units = [p for p, _, _ in architecture.carriers(0, "attention")]
    assert units
    assert not any(np.isin(p.name, ["encoder.relative_attention_bias.weight"]) for p in units)
