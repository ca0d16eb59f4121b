"""Families of the user's own: read from a file or a folder, never in place of another one."""

from pathlib import Path

import pytest

from libprune.engine.architecture import OWN_FAMILIES
from libprune.engine.errors import FamilyError, LibpruneError, SourceError
from libprune.engine.family import FOLDER, families, family_of, shipped
from libprune.models.families import use_families

LLAMA = (FOLDER / "llama.yaml").read_text()


@pytest.fixture(autouse=True)
def _forget():
    yield
    OWN_FAMILIES.clear()


def write(path: Path, family: str, types: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(LLAMA.replace("family: llama", f"family: {family}").replace("[llama, mistral]", f"[{types}]"))
    return path


def test_a_file_and_a_folder_are_read(tmp_path):
    use_families(str(write(tmp_path / "a.yaml", "own", "first")))
    assert family_of("first").family == "own"
    write(tmp_path / "several/b.yaml", "second", "two")
    write(tmp_path / "several/c.yml", "third", "three, four")
    use_families(str(tmp_path / "several"))
    assert families().keys() - shipped().keys() == {"own", "second", "third"}
    assert family_of("four").family == "third"


def test_none_adds_none():
    use_families(None)
    assert families().keys() == shipped().keys()


@pytest.mark.parametrize(
    ("family", "types", "message"),
    [
        ("mine", "llama", r"a\.yaml describes model_type 'llama', and so does family 'llama' of libprune"),
        ("mine", "x, mistral", r"describes model_type 'mistral', and so does family 'llama' of libprune; take it out"),
        ("llama", "x", r"a\.yaml is named family: llama, and so is family 'llama' of libprune"),
        ("other", "taken", r"describes model_type 'taken', and so does .*0\.yaml"),
        ("zero", "x", r"is named family: zero, and so is .*0\.yaml"),
    ],
)
def test_no_file_replaces_another_one(tmp_path, family, types, message):
    write(tmp_path / "0.yaml", "zero", "taken")
    write(tmp_path / "a.yaml", family, types)
    with pytest.raises(FamilyError, match=message):
        use_families(str(tmp_path))
    assert families().keys() == shipped().keys()


def test_what_is_not_there_or_is_no_family_is_named(tmp_path):
    for missing in (str(tmp_path / "none.yaml"), "nothing_of_this_name"):
        with pytest.raises(SourceError, match="does not exist"):
            use_families(missing)
    with pytest.raises(SourceError, match=r"is a folder without a \.yaml file"):
        use_families(str(tmp_path))
    (tmp_path / "broken.yaml").write_text("family: x\n")
    with pytest.raises(LibpruneError, match=r"broken\.yaml: .*model_types"):
        use_families(str(tmp_path))
