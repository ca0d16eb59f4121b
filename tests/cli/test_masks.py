"""The `libprune masks` commands: masked units are shown, plans become masks, and no folder is overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from libprune.cli import masks
from libprune.cli.main import app
from libprune.engine.describe import describe, without_weights
from libprune.engine.tables import unit_index
from libprune.models.folder import fingerprint, load_config
from libprune.pipeline.artifacts import write_table
from tests.support import tiny

CHANNELS = [1, 5, 6]
DOWN = "model.layers.2.mlp.down_proj.weight"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["masks", *map(str, words)])


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """A model whose third layer does not read three of its channels."""
    folder = tiny.write_model(tmp_path_factory.mktemp("masked") / "model")
    weights = load_file(folder / "model.safetensors")
    weights[DOWN][:, CHANNELS] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_units_that_nothing_reads_are_shown_as_removable(masked):
    done = run("inspect", masked, "--json")
    assert done.exit_code == 0, done.output
    blocks = json.loads(done.stdout)["blocks"]
    removable = {(block["layer"], block["part"]): block["removable"] for block in blocks if block["removable"]}
    assert removable == {(2, "mlp"): CHANNELS}
    assert "slicing removes 3 units" in run("inspect", masked).stdout
    assert CliRunner().invoke(masks.app, ["inspect", str(masked), "--json"]).stdout == done.stdout


def test_an_extraction_is_not_written_over_a_folder_nor_half(masked, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    for out, model in ((tmp_path / "there", masked), (tmp_path / "new", tmp_path / "nowhere")):
        done = run("extract", model, out)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine.txt"]


def test_a_plan_is_exported_as_masks_of_the_maps_that_carry_its_units(masked, tmp_path):
    config = load_config(masked)
    architecture = describe(without_weights(config), fingerprint(masked), accept=tuple(config.to_dict()))
    rows = unit_index(architecture)
    gone = (rows["layer_idx"] == 2) & (rows["group_type"] == "mlp") & np.isin(rows["group_idx"], CHANNELS)
    write_table(tmp_path / "plan.parquet", rows | {"keep": ~gone}, {"model": architecture.fingerprint})
    done = run("export", tmp_path / "plan.parquet", tmp_path / "masks.safetensors", "--model", masked)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'masks.safetensors'}: 3 masks\n")
    for name, mask in load_file(tmp_path / "masks.safetensors").items():
        removed = (~mask).all(dim=0 if name == f"{DOWN}_mask" else 1)
        assert removed.nonzero().flatten().tolist() == CHANNELS
