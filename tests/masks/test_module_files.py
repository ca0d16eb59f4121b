"""Masks of networks on the command line: files, the user's own code, and options that do not go together."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner, Result

from libprune.cli.main import app
from libprune.networks import load
from tests.support.masked_networks import assert_same, computed, zero

CODE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def broken():
    raise KeyError("no such size")

number = int
"""
YAML = 'family: net\nprunable: [h]\nmodules: {"0": x -> h, "2": h -> y}\n'


@pytest.fixture
def here(tmp_path, monkeypatch) -> dict[str, str]:
    """The current folder with code, family, inputs and weights; and the options that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "usernet", raising=False)
    Path("usernet.py").write_text(CODE)
    Path("net.yaml").write_text(YAML)
    save_file({"inputs": torch.randn(5, 3)}, "inputs.safetensors")
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    zero(network, "0.weight", 0, [1])
    zero(network, "2.weight", 1, [2])
    save_file(network.state_dict(), "masked.safetensors")
    for module in (network[0], network[2]):
        prune.remove(module, "weight")
    save_file(network.state_dict(), "zeroed.safetensors")
    return {"--family": "net.yaml", "--network": "usernet:Net", "--inputs": "inputs.safetensors"}


def run(*words: object, **options: str) -> Result:
    return CliRunner().invoke(app, ["masks", *map(str, words), *(word for pair in options.items() for word in pair)])


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


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "no family": ({"--family": None}, "a network needs --family FILE.yaml"),
    "no code": ({"--network": None}, "a network needs --family FILE.yaml"),
    "no inputs": ({"--inputs": None}, "one of --inputs FILE and --input-shape"),
    "two kinds of inputs": ({"--input-shape": "3"}, "one of --inputs FILE and --input-shape"),
    "masks beside": ({"--masks": "masked.safetensors"}, "leave out --masks"),
    "no options": (dict.fromkeys(("--family", "--network", "--inputs")), "is a file. Name a folder"),
    "no such module": ({"--network": "nothere:Net"}, "nothere:Net makes no network: ModuleNotFoundError"),
    "code that fails": ({"--network": "usernet:broken"}, "usernet:broken makes no network: KeyError"),
    "no module of torch": ({"--network": "usernet:number"}, "usernet:number makes a int, not a torch.nn.Module"),
    "no colon": ({"--network": "usernet.Net"}, "names no code; write package.module:Name"),
    "inputs of another shape": ({"--inputs": None, "--input-shape": "5"}, "does not run on inputs of shape [8, 5]"),
    "no shape": ({"--inputs": None, "--input-shape": "3,x"}, "'3,x' is no shape of a sample"),
    "weights for inputs": ({"--inputs": "zeroed.safetensors"}, "write one tensor named 'inputs'"),
    "a family of other axes": ({"--family": "missing.yaml"}, "missing.yaml does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_refused(here, name):
    changed, message = REFUSED[name]
    options = {key: value for key, value in (here | changed).items() if value is not None}
    done = run("extract", "masked.safetensors", "out", **options)
    assert done.exit_code == 1
    assert message in done.output
    assert not Path("out").exists()


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


def test_scattered_zeros_of_a_file_get_a_plain_answer_and_no_folder(here):
    tensors = load_file("zeroed.safetensors")
    tensors["2.weight"] = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    save_file(tensors | {"0.weight": torch.eye(4, 3) + 1}, "other.safetensors")
    shaped = {key: value for key, value in here.items() if key != "--inputs"} | {"--input-shape": "3"}
    assert (
        "no unit is wholly masked: 20.0 % of the weights are zero"
        in run("inspect", "other.safetensors", **shaped).output
    )
    done = run("extract", "other.safetensors", "out", **shaped)
    assert (done.exit_code, "slicing needs whole units" in done.output, Path("out").exists()) == (1, True, False)
