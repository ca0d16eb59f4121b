"""A whole run on a smaller vocabulary, and what it costs in tokens."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_json
from libprune.pipeline.layout import Layout
from libprune.vocabulary.price import vocabulary_figures
from tests.support.tiny import run_stages, write_params
from tests.support.vocabularies import ENGLISH, GREEK, trained

ROWS = 544
RATIO = 0.25


@pytest.fixture(scope="module")
def project(tmp_path_factory, by_forks) -> Path:
    """A model for several languages, pruned for English, and judged on a text with some Greek."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6}
    ids = {"bos_token_id": 0, "eos_token_id": [1, 520], "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, **sizes, **ids, num_key_value_heads=3, head_dim=8))
    model.save_pretrained(folder / "model")
    trained("byte_level").save_pretrained(folder / "model")
    words, rng = " ".join([*ENGLISH, *GREEK]).split(), random.Random(0)
    text = "\n".join(" ".join(rng.choices(words, k=24)) for _ in range(60))
    (folder / "text.txt").write_text(text)
    (folder / "english.txt").write_text("\n".join(ENGLISH))
    write_params(
        folder / "params.yaml",
        str(folder / "model"),
        str(folder / "text.txt"),
        prepare={"vocabulary": {"text": str(folder / "english.txt"), "multiple": 8}},
        allocate={"ratio": RATIO, "ratio_of": "total", "method": "uniform"},
        score={"criterion": "magnitude"},
        slice={"repair": "none"},
        hessian={"estimator": "none"},
    )
    run_stages(folder, ["sources", "prepare", "tokenize", "gradients", "activations", "score", "allocate"])
    with by_forks():
        run_stages(folder, ["slice", "recover", "evaluate"])
    return folder


@pytest.fixture
def layout(project) -> Layout:
    return Layout(project / "artifacts")


@pytest.fixture
def architecture(layout) -> Architecture:
    return read_architecture(layout)


def test_everything_after_prepare_sees_one_vocabulary(layout, architecture):
    rows = architecture.sizes["vocab"]
    assert rows < ROWS
    assert rows % 8 == 0
    windows, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    assert int(windows.ids.max()) < rows
    model = AutoModelForCausalLM.from_pretrained(layout.pruned)
    tokenizer = AutoTokenizer.from_pretrained(layout.pruned)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(layout.model).get_vocab()
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [1, image]
    given = trained("byte_level")
    for text in ENGLISH:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert tokens == given.convert_ids_to_tokens(given(text)["input_ids"])


def test_what_went_with_the_vocabulary_counts_toward_a_share_of_the_whole_model(project, layout, architecture):
    given = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(project / "model").parameters())
    left = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(layout.pruned).parameters())
    assert architecture.given_parameters == given
    assert 1 - left / given == pytest.approx(RATIO, abs=0.01)
    allocation = json.loads((project / "metrics/allocation.json").read_text())
    evaluation = read_json(layout.evaluation, "evaluate")
    for share in (allocation["share_removed"], allocation["total_share_removed"]):
        assert share == pytest.approx(1 - left / given)
    assert evaluation["pruned"]["total_share_removed"] == pytest.approx(1 - left / given)
    assert allocation["decoder_share_removed"] < RATIO


def test_the_evaluation_tells_sizes_and_tokens_before_and_after(project, layout, architecture):
    found = read_json(layout.evaluation, "evaluate")["vocabulary"]
    given, now = trained("byte_level"), AutoTokenizer.from_pretrained(layout.model)
    assert found["tokens"] == {"before": len(given), "after": len(now)}
    assert found["rows"] == {"before": ROWS, "after": architecture.sizes["vocab"]}
    assert found["bytes"]["before"] == 4 * architecture.given_parameters
    windows, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    texts = [now.decode(row, skip_special_tokens=True) for row in windows.ids]
    for tokenizer, when in ((given, "before"), (now, "after")):
        number = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert found["evaluation"]["tokens"][when] == number
        assert found["per_1000_characters"][when] == pytest.approx(1000 * number / sum(map(len, texts)))
    assert found["per_1000_characters"]["after"] > found["per_1000_characters"]["before"]


def test_the_card_tells_of_it(layout, architecture):
    card = (layout.pruned / "README.md").read_text()
    assert f"of {ROWS:,} rows for tokens {architecture.sizes['vocab']:,} stay" in card


def test_a_vocabulary_of_another_model_is_refused(layout, architecture, tmp_path):
    other = Layout(tmp_path)
    text = layout.vocabulary.read_text().replace(architecture.fingerprint, "0" * 16)
    other.vocabulary.write_text(text)
    windows, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    with pytest.raises(ArtifactError):
        vocabulary_figures(other, architecture, windows, AutoTokenizer.from_pretrained(layout.model))
