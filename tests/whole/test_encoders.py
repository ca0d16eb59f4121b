"""Models that read all tokens at once: masked tokens, labels, sequences of several lengths, norms that stay."""

import json
import random
import shutil
from contextlib import nullcontext
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from libprune.collection.accumulator import Accumulator
from libprune.collection.calibration import require_equal_passes, set_up
from libprune.collection.resumable import Collection, collecting
from libprune.engine import cost
from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, LibpruneError, SourceError
from libprune.models.compute import sequence_losses
from libprune.models.parallel import World
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Compute, Gradients
from libprune.pipeline.shards import read_tensor
from libprune.results.check import check_folder
from libprune.statistics.activations import activation_groups, collect_activations
from libprune.statistics.gradients import collect_gradients, gradient_groups
from tests.support import tiny
from tests.support.models import FAMILIES, VOCAB
from tests.support.stages import STAGES, run

KINDS = {"bert": "masked_lm", "bert_classifier": "sequence_classification"}


def write_examples(path: Path, number: int = 90) -> Path:
    """Documents of 1 to 20 words with one of three labels, in the order of their labels."""
    rng = random.Random(1)
    rows = [{"text": " ".join(rng.choices(tiny.WORDS, k=1 + i % 20)), "label": 3 * i // number} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_project(folder: Path, name: str, **changes: dict) -> Path:
    """Params for a tiny model of the family and a text of the kind that it needs."""
    source = tiny.write_encoder(folder / "source", FAMILIES[name])
    labelled = KINDS[name] == "sequence_classification"
    text = write_examples(folder / "data.jsonl") if labelled else tiny.write_text(folder / "text.txt")
    return tiny.write_params(folder / "params.yaml", str(source), str(text), **changes)


# The whole pipeline


@pytest.mark.parametrize(("name", "shape"), [("bert", "per_layer"), ("bert_classifier", "uniform")])
def test_every_stage_runs_and_the_result_is_what_it_says(name, shape, tmp_path, monkeypatch, quick_proof):
    monkeypatch.chdir(tmp_path)
    method = "hgsp" if shape == "per_layer" else "uniform"
    changes = {"allocate": {"ratio": 0.1, "shape": shape, "method": method}}
    write_project(tmp_path, name, ablation={"units": 4, "sequences": 4}, **changes)
    run(*STAGES)
    found = json.loads(Path("artifacts/evaluation.json").read_text())
    assert found["model"]["head"] == KINDS[name]
    assert found["pruned"]["decoder_share_removed"] == pytest.approx(0.1, abs=0.02)
    assert found["dense"]["decode"] is None
    assert found["pruned"]["draft"] is None
    assert found["pruned"]["cache_bytes"] == 0
    assert found["continuations"] == []
    assert ("labels" in found["tasks"]) is (name == "bert_classifier")
    report = Path("report/report.md").read_text()
    assert ("perplexity of masked tokens" in report) is (name == "bert")
    assert "decode ×" not in report
    assert "tokens decoded" not in report
    assert found["perplexity_ratio"]["value"] != 1
    trusted = shape == "per_layer"
    assert {one.kind for one in check_folder(Path("artifacts/pruned"), trusted)} == {"ok"}


def test_the_accuracy_is_the_share_of_right_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert_classifier", tokenize={"evaluation_windows": 20})
    run("prepare", "tokenize")
    layout = Layout(Path("artifacts"))
    windows, _ = read_tokens(layout.evaluation_tokens, read_architecture(layout).fingerprint)
    model, evaluation = FAMILIES["bert_classifier"](0), import_module("libprune.results.perplexity")
    mask = torch.arange(windows.ids.shape[1]) < windows.lengths[:, None]
    with torch.no_grad():
        expected = model(windows.ids, attention_mask=mask.long()).logits.argmax(1) == windows.targets
    hits = evaluation.label_hits(model, windows, 64, "test")
    np.testing.assert_array_equal(hits, expected.numpy())
    assert evaluation.accuracy(hits)["acc"] == expected.double().mean()
    assert set(windows.targets.tolist()) == {0, 1, 2}, "the text is in the order of its labels"


def test_windows_have_the_tokenizers_frame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert")
    run("prepare", "tokenize")
    layout = Layout(Path("artifacts"))
    windows, _ = read_tokens(layout.calibration_tokens, read_architecture(layout).fingerprint)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert windows.ids.shape == (8, 16)
    assert set(windows.ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(windows.ids[:, -1].tolist()) == {tokenizer.sep_token_id}


# Losses and statistics


def masked_lm_sequences(number: int = 5, length: int = 12) -> Sequences:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (number, length), generator=generator)
    targets = torch.full_like(ids, NO_TARGET)
    targets[:, 2:4] = torch.randint(VOCAB, (number, 2), generator=generator)
    return Sequences(ids, targets)


def labelled_sequences(number: int = 5, length: int = 12) -> Sequences:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCAB, (number, length), generator=generator)
    return Sequences(ids, torch.arange(number) % 3, torch.tensor([3, 12, 5, 5, 7][:number]))


MAKERS = {"bert": masked_lm_sequences, "bert_classifier": labelled_sequences}


def transformers_losses(model, sequences: Sequences) -> torch.Tensor:
    """Sequence by sequence, filled up, with the attention mask, by transformers' own loss."""
    width = sequences.ids.shape[1]
    lengths = torch.full((len(sequences),), width) if sequences.lengths is None else sequences.lengths
    mask = (torch.arange(width) < lengths[:, None]).long()
    rows = [slice(i, i + 1) for i in range(len(sequences))]
    return torch.stack(
        [model(sequences.ids[r], attention_mask=mask[r], labels=sequences.targets[r]).loss for r in rows]
    )


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_transformers_own(name):
    model, sequences = FAMILIES[name](0), MAKERS[name]()
    with torch.no_grad():
        found = torch.cat([sequence_losses(model, one) for one in sequences.passes(2)])
        torch.testing.assert_close(found, transformers_losses(model, sequences))


@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_transformers_own_loss(name, at_once):
    model, sequences = FAMILIES[name](0), MAKERS[name]().shortest_first()
    architecture = describe(model)
    groups = gradient_groups(architecture, sequences.counted, 1, Gradients(storage_dtype="float32"), in_pieces=True)
    sums = Accumulator(groups)
    collect_gradients(model, architecture, [(0, 0, sequences)], sums, at_once)
    names = [p.name for p in architecture.parameters_of(1, "attention")]
    expected = torch.autograd.grad(
        transformers_losses(model, sequences).mean(), [model.get_parameter(n) for n in names]
    )
    found = sums.finish(1)
    for parameter, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [16, 1024])
def test_the_stages_mean_gradient_is_that_of_all_sequences_of_a_batch(batch_tokens, tmp_path, monkeypatch):
    """However many passes a batch takes: sequences of several lengths take several, even where all would fit in one."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "compute": {"device": "cpu", "dtype": "float32", "batch_tokens": batch_tokens},
        "gradients": {"sequences": 8, "batch_sequences": 8, "storage_dtype": "float32"},
    }
    write_project(tmp_path, "bert_classifier", **settings)
    run("prepare", "tokenize", "gradients")
    layout = Layout(Path("artifacts"))
    architecture = read_architecture(layout)
    sequences, _ = read_tokens(layout.calibration_tokens, architecture.fingerprint)
    assert len(set(sequences.lengths.tolist())) > 1
    model = FAMILIES["bert_classifier"](0)
    names = [p.name for p in architecture.parameters_of(1, "mlp")]
    expected = torch.autograd.grad(
        transformers_losses(model, sequences).mean(), [model.get_parameter(n) for n in names]
    )
    for name, gradient in zip(names, expected, strict=True):
        found = read_tensor(layout.gradients, 1, name, "gradients")
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_statistics_of_activations_see_no_token_behind_the_end():
    model, sequences = FAMILIES["bert_classifier"](0), labelled_sequences().shortest_first()
    architecture, section = describe(model), Activations()
    junk = Sequences(sequences.ids.clone(), sequences.targets, sequences.lengths)
    for row, length in zip(junk.ids, junk.lengths, strict=True):
        row[length:] = 0
    found = []
    for some in (sequences, junk):
        sums = Accumulator(activation_groups(architecture, section))
        first = 0
        for number, one in enumerate(some.passes(2)):
            collect_activations(model, architecture, [(number, first, one)], sums)
            first += len(one)
        found.append(sums.finish(0))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


class Killed(BaseException):
    pass


def test_what_a_killed_run_left_is_not_taken_for_the_sums_of_fewer_labelled_sequences(tmp_path, monkeypatch):
    """The shortest of eight are others than the shortest of six, in whose order they run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "0")
    compute = {"device": "cpu", "dtype": "float32", "batch_tokens": 16}
    write_project(tmp_path, "bert_classifier", compute=compute, tokenize={"seed": 1}, activations={"sequences": 6})
    run("prepare", "tokenize")
    layout = Layout(Path("artifacts"))
    calibration = set_up(layout, Compute(**compute), 8)
    fewer = set_up(layout, Compute(**compute), 6)
    assert not torch.equal(calibration.sequences[:5].lengths, fewer.sequences[:5].lengths)
    groups = activation_groups(calibration.architecture, Activations())

    def killed(work: Collection):
        yield from islice(work.passes(), 6)
        raise Killed

    with pytest.raises(Killed), collecting(calibration, "activations", layout.activations, groups, 1, {}) as work:
        collect_activations(calibration.model, calibration.architecture, killed(work), work.accumulator)
    assert list(Path(".work/activations").glob("*/process-*/*"))
    tables = []
    for left in (True, False):
        if not left:
            shutil.rmtree(".work")
        run("activations")
        tables.append(read_table(layout.activations / "units.parquet", "activations")[0])
    for name, values in tables[0].items():
        np.testing.assert_array_equal(values, tables[1][name])


# What is refused


def refuses(tmp_path: Path, message: str, **tokenize) -> None:
    write_project(tmp_path, "bert_classifier", tokenize=tokenize)
    run("prepare")
    with pytest.raises(SourceError, match=message):
        run("tokenize")


def test_a_text_without_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(tmp_path, r"has no column 'stars'; it has text, label", label_column="stars")
    text = tiny.write_text(tmp_path / "plain.txt")
    refuses(tmp_path, r"has no column 'label'", text=str(text))
    refuses(tmp_path, r"the text 'self' has no labels", text="self")
    refuses(tmp_path, r"is streamed; a model that tells classes apart", streaming=True)


def test_a_text_is_no_label_of_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(tmp_path, r"column 'text' of text .* holds the documents; name another", label_column="text")


@pytest.mark.parametrize("length", ["calibration_length", "evaluation_length"])
def test_windows_without_room_for_a_token_in_their_frame_are_refused(length, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert", tokenize={length: 2})
    run("prepare")
    with pytest.raises(SourceError, match="windows of 2 tokens have no room beside the 2 that the tokenizer"):
        run("tokenize")


@pytest.mark.parametrize("value", [-1, 3, "good", 1.5, None, "²", "--1"])
def test_a_label_that_the_model_does_not_know_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat", "label": value}) + "\n" for _ in range(20)))
    refuses(tmp_path, r"which is no label|no label of the model \(0 to 2", text=str(path))


@pytest.mark.parametrize("written", ["LABEL_{}".format, str, float])
def test_labels_by_name_and_as_other_types_write_them_are_the_models_own(written, tmp_path, monkeypatch):
    """Tables with a missing value elsewhere hold whole numbers as floats."""
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path / "numbers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    other = [row | {"label": written(row["label"])} for row in rows]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    drawn = []
    for kind in ("numbers", "others"):
        write_project(tmp_path, "bert_classifier", tokenize={"text": str(tmp_path / f"{kind}.jsonl")})
        run("prepare", "tokenize")
        layout = Layout(Path("artifacts"))
        drawn.append(read_tokens(layout.calibration_tokens, read_architecture(layout).fingerprint)[0].targets)
    assert torch.equal(*drawn)


def test_no_layer_of_a_model_whose_norms_stay_can_be_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert", allocate={"depth": "units"})
    run("prepare", "tokenize", "gradients", "hessian", "activations", "score", "sensitivity")
    with pytest.raises(LibpruneError, match="no layer of family 'bert' can be deleted"):
        run("allocate")


def test_a_cache_that_a_model_does_not_have_cannot_be_saved_on():
    with pytest.raises(LibpruneError, match=r"or a budget is cache, but a model of family 'bert' keeps no KV"):
        cost.prices(describe(FAMILIES["bert"](0)), "cache")


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 4])])
def test_processes_that_share_weights_need_sequences_of_one_length(lengths):
    """Each would run another number of passes, and wait for the others' weights for ever."""
    sequences = Sequences(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long), lengths)
    for world in (World(), World(size=2), World(size=2, sharded=True)):
        refused = lengths is not None and world.sharded
        with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD") if refused else nullcontext():
            require_equal_passes(sequences, world)


def test_a_head_that_the_family_does_not_have_is_refused():
    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(FamilyError, match="of head sequence_classification; family 'llama' describes causal_lm"):
        describe(LlamaForSequenceClassification(config))


def test_a_decoder_without_a_head_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert")
    LlamaModel(LlamaConfig(vocab_size=22, hidden_size=24, num_attention_heads=4, **SMALL)).save_pretrained(
        tmp_path / "source"
    )
    with pytest.raises(FamilyError, match="is a LlamaModel, of head embedding; family 'llama' describes causal_lm"):
        run("prepare")


def test_a_pooler_that_the_files_lack_is_not_made_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert")
    config = BertConfig(vocab_size=22, hidden_size=24, num_attention_heads=4, **SMALL)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=r"has no weights for 2 parameters of a BertModel, the first 'pooler\.dense"):
        run("prepare")


SMALL = {"intermediate_size": 13, "num_hidden_layers": 1}


def changed_config(folder: Path, **changes) -> None:
    path = folder / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_a_folder_lacks_are_not_made_up(tmp_path, monkeypatch):
    """Transformers fills them with random numbers and warns."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert")
    changed_config(tmp_path, architectures=["BertForSequenceClassification"])
    message = r"has no weights for 4 parameters of a BertForSequenceClassification, the first 'bert.pooler.dense.bias'"
    with pytest.raises(SourceError, match=message):
        run("prepare")


def test_weights_of_other_shapes_than_the_config_says_are_an_error_in_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, "bert_classifier")
    changed_config(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(SourceError, match=r"prepare\.model = .* holds 2 tensors of other shapes"):
        run("prepare")


def test_a_single_label_is_no_class():
    """Its cross entropy is 0 whatever the model computes; transformers takes such a model for a regression."""
    config = BertConfig(vocab_size=22, hidden_size=24, intermediate_size=13, num_hidden_layers=1, num_attention_heads=4)
    config.num_labels = 1
    with pytest.raises(FamilyError, match="has 1 label; a model that tells classes apart needs two"):
        describe(BertForSequenceClassification(config))


def test_masked_tokens_need_a_mask_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tiny.write_model(tmp_path / "causal")
    write_project(tmp_path, "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_bytes((source / name).read_bytes())
    run("prepare")
    with pytest.raises(SourceError, match="its tokenizer has no mask token"):
        run("tokenize")
