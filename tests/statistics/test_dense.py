"""The dense model of a layout: its folder, its description and its table of weights belong together."""

import numpy as np
import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.models.folder import fingerprint, load_model
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare
from libprune.statistics.dense import prepare_layout
from libprune.statistics.weights import weight_columns
from tests.support.tiny import write_model


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


def test_a_model_that_is_not_there_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(LibpruneError):
        prepare_layout(Layout(tmp_path / "artifacts"), Prepare(model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "artifacts").exists()
