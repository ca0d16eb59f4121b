"""Options of `libprune masks` for networks: what does not go together is refused, and nothing is written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libprune.masks.options import extraction_of
from tests.support.masked_networks import here, run

__all__ = ["here"]

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


@pytest.mark.parametrize("shape", [None, "3"])
def test_inputs_may_be_a_file_or_a_shape(here, shape):
    inputs = None if shape else Path(here["--inputs"])
    found = extraction_of(Path("masked.safetensors"), None, Path(here["--family"]), here["--network"], inputs, shape)
    assert found.plan.keep[0, "h"].tolist() == [True, False, False, True]


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
