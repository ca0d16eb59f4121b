"""The dense model of a layout: its folder, its description and its table of weights belong together."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.models.folder import fingerprint, load_model
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare, Vocabulary
from libprune.statistics.dense import prepare_layout
from libprune.statistics.weights import weight_columns
from tests.support.tiny import write_model
from tests.support.vocabularies import trained


def test_folder_description_and_weights_are_of_one_model(tmp_path):
    source, layout = write_model(tmp_path / "source"), Layout(tmp_path / "artifacts")
    prepare_layout(layout, Prepare(model=str(source)))
    architecture = read_architecture(layout)
    model = load_model(layout.model, torch.float32)
    assert architecture == describe(model, fingerprint=fingerprint(layout.model))
    table, meta = read_table(layout.weights, "prepare")
    assert meta == {"model": architecture.fingerprint, "source": str(source)}
    rows = (table["layer_idx"] == 1) & (table["group_type"] == "mlp")
    expected = weight_columns(architecture, dict(model.named_parameters()), 1, "mlp")
    for name, values in expected.items():
        np.testing.assert_allclose(table[name][rows], values)


def test_without_unused_tokens_the_units_are_still_query_heads(tmp_path):
    source, text, tokenizer = tmp_path / "source", tmp_path / "text.txt", trained("byte_level")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    text.write_text("The river runs slowly past the old houses.")
    layout = Layout(tmp_path / "artifacts")
    prepare_layout(layout, Prepare(model=str(source), heads="queries", vocabulary=Vocabulary(text=str(text))))
    architecture = read_architecture(layout)
    assert architecture.units("attention") == 4
    assert architecture.trimmed is not None
    assert architecture.sizes["vocab"] < len(tokenizer)


def test_a_model_that_is_not_there_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(LibpruneError):
        prepare_layout(Layout(tmp_path / "artifacts"), Prepare(model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "artifacts").exists()
