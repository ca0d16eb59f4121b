"""A model with Mamba mixers, attention, MLPs and experts through the stages, to a folder that is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.results.check import check_folder
from tests.support import tiny
from tests.support.models import FAMILIES

STAGES = ("prepare", "tokenize", "gradients", "activations", "score", "sensitivity", "levels", "allocate", "slice")


def test_what_is_pruned_across_kinds_of_layers_keeps_as_many_heads_in_each_group(tmp_path, quick_proof):
    FAMILIES["nemotron_h"](0).save_pretrained(tmp_path / "source")
    tiny.write_tokenizer(tmp_path / "source")
    text = tiny.write_text(tmp_path / "text.txt", documents=120)
    allocate = {"ratio": 0.25, "shape": "per_layer", "method": "global"}
    changes = {"tokenize": {"calibration_sequences": 16}, "allocate": allocate, "slice": {"repair": "sequential"}}
    tiny.write_params(tmp_path / "params.yaml", str(tmp_path / "source"), str(text), **changes)
    tiny.run_stages(tmp_path, [*STAGES, "teacher", "recover", "evaluate"])
    layout = Layout(tmp_path / "artifacts")
    assert {one.kind for one in check_folder(layout.root / "pruned", True)} == {"ok"}
    plan, _ = read_plan(layout, read_architecture(layout))
    heads = [keep.reshape(2, 3).sum(1) for (_, part), keep in plan.keep.items() if part == "mamba"]
    assert all(first == second for first, second in heads)
    assert np.sum(heads) < 18, "heads of some mixer have gone"
    tiny.change_params(tmp_path, "allocate", method="hgsp")
    tiny.run_stages(tmp_path, ["sensitivity", "allocate"])
    assert json.loads((tmp_path / "metrics/allocation.json").read_text())["share_removed"] == pytest.approx(
        0.25, abs=0.1
    )
    found = json.loads(Path(layout.root / "evaluation.json").read_text())
    assert found["pruned"]["decoder_share_removed"] == pytest.approx(0.25, abs=0.08)
    assert 0 < found["pruned"]["state_bytes"] < found["dense"]["state_bytes"]
