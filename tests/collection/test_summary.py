"""The lines at the end of a collecting stage."""

import numpy as np
from safetensors.numpy import save_file

from libprune.collection.summary import print_keys, print_units

PARTS = np.array(["attention", "attention", "mlp", "mlp", "mlp"] * 2)
UNITS = {"layer_idx": np.repeat([0, 3], 5), "group_type": PARTS, "size": np.arange(10.0)}


def test_means_are_printed_by_layer_and_part(tmp_path, capsys):
    print_units(UNITS, ("size",), tmp_path)
    head, *layers, keys = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["layer", "size", "attention", "size", "mlp"]
    assert [[float(value) for value in line] for line in layers] == [[0, 0.5, 3], [3, 5.5, 8]]
    assert keys[0] == "0"


def test_the_tensors_of_all_shards_are_counted_and_the_first_three_named(tmp_path, capsys):
    for layer in (1, 0):
        save_file({f"{name}{layer}": np.zeros(1) for name in "ab"}, tmp_path / f"layer-{layer:03d}.safetensors")
    save_file({"c": np.zeros(1)}, tmp_path / "other.safetensors")
    print_keys(tmp_path)
    assert capsys.readouterr().out == "4 tensors, the first: a0, b0, a1\n"
