"""YAML files that people write: one mapping, each key once, and faults with their place."""

import pytest

from libprune.engine.errors import ParamsError
from libprune.engine.family import FOLDER
from libprune.engine.yaml_file import parsed, read_shipped, read_yaml


def test_a_mapping_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: {c: [x, 2.5]}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": {"c": ["x", 2.5]}}


@pytest.mark.parametrize(("text", "number"), [("1e-05", 1e-05), ("2E+3", 2e3), ("-1.5e3", -1.5e3), (".5e-4", 5e-05)])
def test_a_number_with_an_exponent_needs_neither_point_nor_sign(text, number, tmp_path):
    """DVC writes 0.00001 as 1e-05, which is a text by the rules that PyYAML keeps to."""
    (tmp_path / "a.yaml").write_text(f"a: {text}\nb: '{text}'\nc: {text}x\n")
    expected = {"a": number, "b": text, "c": f"{text}x"}
    assert read_yaml(tmp_path / "a.yaml") == parsed((tmp_path / "a.yaml").read_text()) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "key 'a' is in line 1 and again in line 3"),
        (b"s:\n  a: 1\n  a: 2\n", "key 'a' is in line 2 and again in line 3"),
        (b"a: [1\n", "is not valid YAML"),
        (b"- 1\n", "holds list, not sections of keys"),
        (b"", "holds nothing, not sections of keys"),
        (b"a:\n  - 2024-13-45\n", "line 2: '2024-13-45' cannot be read as timestamp: month must be in 1..12"),
        (b"a: !!float x\n", "line 1: 'x' cannot be read as float: could not convert"),
        (b"a: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"a: " + b"9" * 5000, "line 1: '9+' cannot be read as int: Exceeds the limit"),
        (b"a: 1\nb: " + b"[" * 3000, "is not valid YAML: what begins in or before line 2 nests too deep"),
        (b"? [a, b]\n: 1\n", "the key in line 1 is no single word"),
        (b"a: &a [*a]\n", "it holds more than 20,000 entries, counting what is repeated by reference"),
        (b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [" + b"*b, " * 3000 + b"]\n", "more than 20,000 entries"),
        (b"#" * (1 << 20) + b"\na: 1\n", "a.yaml has 1,048,582 bytes; a file of settings has at most 1,048,576"),
        (b"a: \xff\n", "is not UTF-8 text: byte 3 is 0xff"),
    ],
)
def test_what_is_no_mapping_of_keys_is_refused(content, message, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_what_ships_is_read_as_what_people_write():
    paths = sorted(FOLDER.glob("*.yaml"))
    assert paths
    assert [read_shipped(path) for path in paths] == [read_yaml(path) for path in paths]


@pytest.mark.parametrize("content", ["a: 1\nb: 2\na: 3\n", "a: [1\n", "- 1\n", "", "a: !!float x\n", None])
def test_a_fault_in_what_ships_is_told_alike(content, tmp_path):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    told = []
    for read in (read_yaml, read_shipped):
        with pytest.raises(ParamsError) as raised:
            read(path)
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_a_folder_is_told(tmp_path):
    with pytest.raises(ParamsError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ParamsError, match=r"a\.yaml does not exist"):
        read_yaml(tmp_path / "a.yaml")
