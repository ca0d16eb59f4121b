"""Learned positions end somewhere, and what is longer is refused before a model fails at it."""

from importlib import import_module

import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.errors import ParamsError
from libprune.models.folder import require_positions
from tests.support import tiny
from tests.support.models import ENCODERS, FAMILIES

POSITIONS = 50
"""Of the tiny models that have learned ones."""


LEARNED = ("gpt2", "opt", *(name for name in ENCODERS if name != "modernbert"))


@pytest.mark.parametrize("name", LEARNED)
def test_the_limit_is_where_the_model_itself_fails(name):
    model = FAMILIES[name](0)
    architecture, ids = describe(model), torch.zeros((1, POSITIONS + 1), dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids[:, :POSITIONS])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)
    require_positions(model.config, architecture, {"here": POSITIONS})
    with pytest.raises(
        ParamsError, match=rf"^there = 51, but this {model.config.model_type} model has learned positions for 50 tokens"
    ):
        require_positions(model.config, architecture, {"here": POSITIONS, "there": POSITIONS + 1})


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(LEARNED)))
def test_rotary_positions_have_no_limit(name):
    model = FAMILIES[name](0)
    require_positions(model.config, describe(model), {"anywhere": 10 * model.config.max_position_embeddings})


def test_the_stages_refuse_what_is_too_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tiny.write_model(tmp_path / "source")
    FAMILIES["gpt2"](0).save_pretrained(source)
    text, params = tiny.write_text(tmp_path / "text.txt"), tmp_path / "params.yaml"
    tiny.write_params(params, str(source), str(text), tokenize={"evaluation_length": 51})
    import_module("stages.prepare").main()
    with pytest.raises(ParamsError, match=r"^tokenize\.evaluation_length = 51"):
        import_module("stages.tokenize").main()
    tiny.write_params(params, str(source), str(text), latency={"tokens": 51}, allocate={"objective": "latency"})
    with pytest.raises(ParamsError, match=r"^latency\.tokens = 51"):
        import_module("stages.latency").main()
