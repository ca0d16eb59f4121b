"""YAML files that people write: one mapping, each key once, and faults with their place."""

import pytest

from libprune.engine.errors import ParamsError
from libprune.engine.yaml_file import read_yaml


def test_a_mapping_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: {c: [x, 2.5]}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": {"c": ["x", 2.5]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "key 'a' is in line 1 and again in line 3"),
        (b"s:\n  a: 1\n  a: 2\n", "key 'a' is in line 2 and again in line 3"),
        (b"a: [1\n", "is not valid YAML"),
        (b"- 1\n", "holds list, not sections of keys"),
        (b"", "holds nothing, not sections of keys"),
        (b"a: \xff\n", "is not UTF-8 text: byte 3 is 0xff"),
    ],
)
def test_what_is_no_mapping_of_keys_is_refused(content, message, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ParamsError, match=r"a\.yaml does not exist"):
        read_yaml(tmp_path / "a.yaml")
