"""How sources are found, and the links by which DVC notices that one has changed."""

from pathlib import Path

import pytest

from libprune.engine.errors import SourceError
from libprune.pipeline.sources import link_sources, resolve


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package that must not be imported: its module raises."""
    folder = tmp_path / "site" / "forbidden_to_import"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "text.txt").write_text("a\nb")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_file_inside_a_package_is_found_without_importing_it(package):
    assert resolve("package://forbidden_to_import/data/text.txt") == package / "data" / "text.txt"


def test_a_missing_package_is_named_with_what_to_do():
    for source in ("package://no_such_package/file", "package:///file", "package://../etc/passwd"):
        with pytest.raises(SourceError, match=r"no installed package is named '.*'; install it with pip"):
            resolve(source)


def test_a_missing_file_of_a_package_is_named_with_what_lies_beside_it(package):
    with pytest.raises(SourceError, match=r"'forbidden_to_import' has no such file; in that folder: text\.txt$"):
        resolve("package://forbidden_to_import/data/txet.txt")
    with pytest.raises(SourceError, match=r"no such file; in that folder: none$"):
        resolve("package://forbidden_to_import/nowhere/text.txt")


def test_a_local_path_is_taken_as_it_is_and_must_exist(tmp_path, monkeypatch):
    (tmp_path / "here.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert resolve("here.txt") == Path("here.txt")
    assert resolve(str(tmp_path)) == tmp_path
    for missing in ("./there", "/no/where", "a/b/c", "there.gguf", "there.jsonl", "~/no/such/file"):
        with pytest.raises(SourceError, match=r"does not exist \(seen from "):
            resolve(missing)


@pytest.mark.parametrize("source", ["~no_such_user/model", "a" * 5000, "./" + "a" * 300])
def test_a_path_that_no_system_takes_is_refused(source):
    with pytest.raises(SourceError, match=r"cannot be looked for: "):
        resolve(source)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "wikitext"])
def test_a_hub_id_is_left_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None


@pytest.mark.parametrize("inside", ["/etc/passwd", "../outside.txt", "data/../../outside.txt"])
def test_a_file_outside_of_the_package_is_refused(package, inside):
    (package.parent / "outside.txt").write_text("x")
    with pytest.raises(SourceError, match="leaves the package 'forbidden_to_import'; name a file inside it"):
        resolve(f"package://forbidden_to_import/{inside}")


def test_a_copy_of_the_project_finds_what_git_does_not_track_in_the_project(tmp_path, monkeypatch):
    """DVC runs queued experiments in a copy, and tells the project's own folder."""
    (tmp_path / "project").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "project" / "t.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(SourceError, match="does not exist"):
        resolve("t.txt")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    assert resolve("t.txt") == tmp_path / "project" / "t.txt"
    (tmp_path / "copy" / "t.txt").write_text("y")
    assert resolve("t.txt").read_text() == "y"


def test_a_copy_takes_a_folder_of_the_project_of_which_git_tracks_a_part(tmp_path, monkeypatch):
    project, copy = tmp_path / "project", tmp_path / "project" / ".dvc" / "tmp" / "copy"
    for folder in (project / "sub" / "model", copy / "sub" / "model", copy / ".dvc"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(copy / "sub")
    monkeypatch.setenv("DVC_ROOT", str(project))
    for folder in (project, copy):
        (folder / "sub" / "model" / "config.json").write_text("{}")
    assert resolve("model") == Path("model"), "what git tracks is that of the copy"
    (project / "sub" / "model" / "weights").write_text("untracked")
    assert resolve("model") == project / "sub" / "model"
    (copy / "sub" / "model" / "weights").write_text("x")
    assert resolve("model") == Path("model")
    monkeypatch.chdir(project / "sub")
    assert resolve("./model") == Path("model")


@pytest.mark.parametrize("address", ["https://me:secret@host/t.txt", "https://host/a/t.txt?api_key=secret&b=1"])
def test_what_is_secret_in_an_address_is_not_told(address):
    with pytest.raises(SourceError) as caught:
        resolve(address)
    assert "secret" not in str(caught.value)
    assert "host" in str(caught.value)


# Links


def test_local_sources_are_linked_and_others_get_a_note(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "t.txt").write_text("one")
    links = tmp_path / "artifacts" / "sources"
    named = {
        "model": ("prepare.model", str(tmp_path / "model")),
        "text": ("tokenize.text", str(tmp_path / "t.txt")),
        "evaluation": ("tokenize.evaluation_text", "owner/name"),
        "teacher": ("recover.teacher", None),
    }
    found = link_sources(links, named)
    assert found == {"model": tmp_path / "model", "text": tmp_path / "t.txt"}
    assert (links / "text").read_text() == "one"
    assert (links / "evaluation").read_text() == (links / "teacher").read_text()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert [path.name for path in (links / "model").iterdir()] == ["config.json"]

    other = {"model": ("prepare.model", "owner/name"), "text": named["model"], "evaluation": named["text"]}
    assert link_sources(links, other) == {"text": tmp_path / "model", "evaluation": tmp_path / "t.txt"}
    assert (links / "model").read_text() == (links / "teacher").read_text()
    assert (tmp_path / "model" / "config.json").read_text() == "{}", "what was linked to is as it was"
    assert {path.name for path in links.iterdir()} == set(named)


def test_a_source_that_does_not_exist_is_told_with_its_key(tmp_path):
    with pytest.raises(SourceError, match=r"^recover\.text: \./nowhere does not exist \(seen from "):
        link_sources(tmp_path, {"recovery-1": ("recover.text", "./nowhere")})


def test_a_folder_that_holds_the_links_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"tokenize\.text: \. is a folder that holds artifacts/sources"):
        link_sources(Path("artifacts/sources"), {"text": ("tokenize.text", ".")})
