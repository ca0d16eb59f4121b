"""What masks have left of units, as numbers and as text."""

import pytest
from torch.nn.utils import prune

from libprune import masks
from libprune.engine.errors import LibpruneError
from libprune.masks.inspection import nothing_to_remove
from tests.support.masked_models import DOWN, UP, V, assert_outputs_stay, run, unstructured, zero
from tests.support.models import FAMILIES


def test_scattered_zeros_are_told_and_not_extracted():
    model = FAMILIES["mistral"](0)
    unstructured(model)
    found = masks.inspect(model)
    assert found.removable == 0
    assert 0.24 < found.zeros < 0.26
    assert all(len(block.partly) == block.units for block in found.blocks)
    with pytest.raises(
        LibpruneError, match=r"no unit is wholly masked: 2\d\.\d % of the weights are zero, spread over"
    ):
        masks.extract(model)
    assert nothing_to_remove(found).startswith("no unit is wholly masked: 2")


def test_the_share_of_zeros_in_a_partly_masked_unit_is_counted_over_its_weights():
    model = FAMILIES["llama"](0)
    zero(model, {V: slice(8, 12), UP: 4})
    attention, mlp = (b for b in masks.inspect(model).blocks if b.layer == 2)
    assert attention.partly == {1: pytest.approx(4 / 48)}  # of 2·8 query, 8 key, 8 value rows and 2·8 columns
    assert mlp.partly == {4: pytest.approx(1 / 3)}


def test_masks_of_what_no_unit_carries_are_multiplied_in_and_noted():
    model = FAMILIES["mistral"](0)
    prune.random_unstructured(model.lm_head, "weight", 0.5)
    zero(model, {DOWN: 4})
    found = masks.extract(model)
    assert masks.inspect(model).outside == ["lm_head.weight"]
    assert_outputs_stay(found, model)


def test_scattered_zeros_get_a_plain_answer_and_no_folder(tmp_path):
    model = FAMILIES["mistral"](0)
    unstructured(model)
    model.save_pretrained(tmp_path / "model")
    done = run("inspect", tmp_path / "model")
    assert done.exit_code == 0, done.output
    assert "no unit is wholly masked: 25.0 % of the weights are zero" in done.output
    done = run("extract", tmp_path / "model", tmp_path / "out")
    assert done.exit_code == 1
    assert "slicing needs whole units" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_table_says_per_layer_and_part_what_is_masked(tmp_path):
    model = FAMILIES["llama"](0)
    zero(model, {V: slice(8, 16), UP: 4, DOWN: 7})
    model.save_pretrained(tmp_path / "model")
    lines = run("inspect", tmp_path / "model").output.splitlines()
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines if line[:1].isdigit()}
    assert rows["2", "mlp"] == ["13", "1", "0", "0", "1", "33.3", "to", "33.3", "%"]
    assert rows["2", "attention"] == ["3", "1", "1", "0", "0", "-"]
    assert rows["0", "mlp"] == ["13", "0", "0", "0", "0", "-"]
    assert any("slicing removes 2 units" in line for line in lines)
