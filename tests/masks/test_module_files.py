"""Masks of networks in files of tensors, with the user's own code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from libprune.masks.module_files import drawn_inputs, read_inputs
from libprune.networks import load
from tests.support.masked_networks import computed, here, run
from tests.support.predictions import assert_same

__all__ = ["here"]


@pytest.mark.parametrize("file", ["masked.safetensors", "zeroed.safetensors"])
def test_a_state_dict_on_disk_is_told_and_extracted(here, file):
    (seen,) = json.loads(run("inspect", file, "--json", **here).output)["blocks"]
    assert seen["removable"] == [1, 2]
    assert 2 not in seen["folded"]
    done = run("extract", file, "out", **here)
    assert done.exit_code == 0, done.output
    assert "removed 2 units: 12 parameters" in done.output
    assert 'libprune.networks.load(Path("out"), Net())' in done.output
    dense = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    small = load(Path("out"), dense)
    dense.load_state_dict(load_file("zeroed.safetensors"))
    x = torch.randn(7, 3)
    assert_same(computed(small, x), computed(dense, x))
    assert "Imports and RUNS that code" in " ".join(run("extract", "--help").output.replace("│", " ").split())


def test_inputs_are_those_of_the_file_or_drawn_alike_in_every_call(here):
    inputs = torch.rand(2, 3)
    save_file({"inputs": inputs}, "own.safetensors")
    assert torch.equal(read_inputs(Path("own.safetensors")), inputs)
    assert drawn_inputs(" 1, 28,3").shape[1:] == (1, 28, 3)
    assert torch.equal(drawn_inputs("4"), drawn_inputs("4"))


def test_tensors_of_another_network_are_named(here):
    tensors = load_file("zeroed.safetensors")
    for change, message in (
        ({"0.weight": torch.zeros(5, 3)}, "0.weight has shape [5, 3], but usernet:Net makes it [4, 3]"),
        ({"3.weight": torch.zeros(2)}, "usernet:Net has no entry '3.weight'"),
    ):
        save_file(tensors | change, "other.safetensors")
        assert message in run("inspect", "other.safetensors", **here).output
    tensors.pop("2.bias")
    save_file(tensors, "other.safetensors")
    assert "other.safetensors has no entry '2.bias'" in run("inspect", "other.safetensors", **here).output
    assert "cannot be read as safetensors" in run("inspect", "net.yaml", **here).output
