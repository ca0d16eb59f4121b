"""Mixtures of experts through every stage: whole experts go, and the folder is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.results.check import check_folder
from tests.support import tiny
from tests.support.models import FAMILIES
from tests.support.stages import STAGES, run


def write_project(folder: Path, name: str, **changes: dict) -> None:
    FAMILIES[name](0).save_pretrained(folder / "source")
    tiny.write_tokenizer(folder / "source")
    text = tiny.write_text(folder / "text.txt", documents=120)
    tokenize = {"calibration_sequences": 16}
    tiny.write_params(folder / "params.yaml", str(folder / "source"), str(text), tokenize=tokenize, **changes)


@pytest.mark.parametrize("repair", ["local", "sequential"])
def test_every_stage_runs_and_the_result_is_what_it_says(repair, tmp_path, monkeypatch, quick_proof):
    monkeypatch.chdir(tmp_path)
    shape = "uniform" if repair == "local" else "per_layer"
    write_project(
        tmp_path,
        "qwen3_moe",
        score={"experts": "reap"},
        ablation={"units": 6, "sequences": 4},
        allocate={"ratio": 0.25, "shape": shape, "method": "uniform", "split": "proportional", "worth": "none"},
        slice={"repair": repair},
    )
    run(*STAGES)
    found = json.loads(Path("artifacts/evaluation.json").read_text())
    assert found["pruned"]["decoder_share_removed"] == pytest.approx(0.25, abs=0.08)
    assert found["perplexity_ratio"]["value"] != 1
    routing = found["routing"]
    assert [row["layer"] for row in routing["mixtures"]] == [0, 2, 3]
    assert json.loads(Path("metrics/evaluation.json").read_text())["routing"].items() <= routing.items()
    assert "## What routing does after the cut" in Path("report/report.md").read_text()
    assert {one.kind for one in check_folder(Path("artifacts/pruned"), shape == "per_layer")} == {"ok"}
    table, _ = read_table(Layout(Path("artifacts")).plan, "allocate")
    experts = table["group_type"] == "experts"
    kept = np.array([table["keep"][experts & (table["layer_idx"] == layer)].sum() for layer in (0, 2, 3)])
    assert (kept >= 2).all(), "a token goes through two experts"
    assert (kept < 6).any()
    assert [row["kept"] for row in routing["mixtures"]] == list(kept)
    assert 0 < routing["removed_weight"] < 1
    assert routing["changed"]["pruned"] > 0
    if shape == "uniform":
        assert len(set(kept)) == 1
        model = AutoModelForCausalLM.from_pretrained("artifacts/pruned", dtype=torch.float32)
        assert model.config.num_local_experts == kept[0]
        assert model.model.layers[0].mlp.gate.weight.shape[0] == kept[0]
