"""The windows of a layout as one call: what is written, what is said, and what is refused before anything is drawn."""

from pathlib import Path

import pytest

from libprune.engine.errors import LibpruneError
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Tokenize
from libprune.texts.tokenize import tokenize_layout
from tests.support.measured import write_project
from tests.support.models import FAMILIES
from tests.support.tiny import write_model, write_text

SIZES = {"calibration_sequences": 4, "calibration_length": 8, "evaluation_windows": 3, "evaluation_length": 6}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A described GPT-2, whose positions end, with the tokenizer of the tiny Llama."""
    layout = Layout(write_project(FAMILIES["gpt2"](0), tmp_path) / "artifacts")
    write_model(tmp_path / "other")
    for path in (tmp_path / "other").glob("tokenizer*"):
        path.rename(layout.model / path.name)
    return layout


def test_both_texts_are_written_for_the_model_and_described(layout, tmp_path):
    text = str(write_text(tmp_path / "text.txt"))
    said = tokenize_layout(layout, Tokenize(text=text, **SIZES), "cpu", "float32")
    model = read_architecture(layout).fingerprint
    for path, shape in ((layout.calibration_tokens, (4, 8)), (layout.evaluation_tokens, (3, 6))):
        sequences, meta = read_tokens(path, model)
        assert tuple(sequences.ids.shape) == shape
        assert meta["model"] == model
    assert said[0].startswith("calibration")
    assert said[1].startswith("evaluation")


def test_windows_longer_than_the_models_positions_are_refused_and_nothing_is_written(layout, tmp_path):
    layout.calibration_tokens.unlink()
    text = str(write_text(tmp_path / "text.txt"))
    with pytest.raises(LibpruneError, match=r"tokenize\.evaluation_length"):
        tokenize_layout(layout, Tokenize(text=text, **SIZES | {"evaluation_length": 51}), "cpu", "float32")
    assert not layout.calibration_tokens.exists()
