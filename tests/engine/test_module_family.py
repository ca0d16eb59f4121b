"""Family files of networks: patterns, and what cannot be read."""

import re

import pytest
from torch import nn

from libprune.engine.errors import FamilyError
from libprune.engine.module_family import NetworkFamily


def test_a_star_stands_for_the_same_name_in_path_and_expression():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    described = NetworkFamily(family="f", prunable=["a_*"], modules={"*": "a_* -> b_*"}).described(network)
    assert {path: str(entry) for path, entry in described.items()} == {"0": "a_0 -> b_0", "1": "a_1 -> b_1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: f\nprunable: [h]\n", "modules"),
        ("family: f\nprunable: []\nmodules: {}\n", "prunable"),
        ("family: f\nprunable: [h]\nmodules: {a: h -> k3}\n", "axis 'k3' in 'h -> k3': such names stand for the sides"),
        ("family: f\nprunable: [h]\nmodules: {a: h -> -> b}\n", "more than one '->'"),
        ("family: f\nprunable: [h]\nmodules: {0: h -> b}\n", "modules.0: write this key in quotes"),
        ("family: f\nprunable: [h]\nmodule: {}\n", "unknown key 'module'; did you mean 'modules'?"),
        ("- a list\n", "not sections of keys"),
    ],
)
def test_a_file_that_is_no_family_is_refused_with_the_place(text, message, tmp_path):
    (tmp_path / "family.yaml").write_text(text)
    with pytest.raises(FamilyError, match=f"family file .*family.yaml:? .*{re.escape(message)}[^\n]*$"):
        NetworkFamily.of(tmp_path / "family.yaml")


def test_a_module_that_two_patterns_describe_is_refused():
    described = NetworkFamily(family="f", prunable=["h"], modules={"*": "a -> h", "0": "a -> h"})
    with pytest.raises(FamilyError, match="describes module '0' twice"):
        described.described(nn.Sequential(nn.Linear(3, 4)))
