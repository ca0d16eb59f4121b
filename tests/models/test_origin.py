"""Which model a dense model is, by what lies beside it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import pytest

from libprune.engine.errors import ArtifactError, SourceError
from libprune.models.origin import Origin, find_origin
from libprune.pipeline.sections import Prepare


def origin(model: object) -> Origin:
    return find_origin(Prepare(model=str(model)))


def folder_with(card: str | None, folder: Path) -> Path:
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, None),
        ("# A model\n\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\nbase_model: some/other\n---\n# A model\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: {a: b\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("---\nlicense: mit\ndate: 2023-02-30\n---\n", None),
        ("---\njust words\n---\n", None),
    ],
)
def test_a_folder_has_its_own_name_and_the_licence_of_its_model_card(tmp_path, monkeypatch, card, expected):
    """The base model of the card is that of the dense model, not the dense model itself."""
    folder = folder_with(card, tmp_path / "My-Model")
    monkeypatch.chdir(folder)
    assert origin(folder) == origin(".") == Origin("My-Model", expected, None)


def test_a_folder_that_libprune_has_written_keeps_the_origin_of_the_first_model(tmp_path):
    first = Origin("SmolLM2-135M", "apache-2.0", "HuggingFaceTB/SmolLM2-135M")
    folder = folder_with("---\nlicense: mit\n---\n", tmp_path / "pruned")
    for cut in (1, 2, 3):
        sizes = {"dense": {"decoder": 1000 // cut}, "pruned": {"decoder": 1000 // cut - 100}}
        made = {"origin": asdict(first if cut == 1 else origin(folder)), "parameters": sizes}
        (folder / "libprune.json").write_text(json.dumps(made))
        assert origin(folder) == replace(first, cuts=cut, decoder=1000)
    (folder / "libprune.json").write_text("{}")
    assert origin(folder) == Origin("pruned", "mit", None)
    (folder / "libprune.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"libprune\.json is damaged"):
        origin(folder)


def write_gguf(path: Path, **fields: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_string(f"general.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


URL = "https://huggingface.co/"


@pytest.mark.parametrize(
    ("fields", "license", "base"),
    [
        ({}, None, None),
        ({"license": "apache-2.0", "name": "Some Internal Name"}, "apache-2.0", None),
        ({"base_model.0.repo_url": URL + "org/base"}, None, "org/base"),
        (
            {"base_model.0.repo_url": URL + "org/base", "source.repo_url": URL + "org/itself/tree/main"},
            None,
            "org/itself",
        ),
        ({"repo_url": "https://example.org/org/model"}, None, None),
    ],
)
def test_a_gguf_file_has_its_own_name_and_what_its_metadata_tell(tmp_path, fields, license, base):
    path = write_gguf(tmp_path / "SmolLM2-135M.Q4_1.gguf", **fields)
    assert origin(path) == Origin("SmolLM2-135M.Q4_1", license, base)


def test_a_model_on_the_hub_has_its_name_there_and_the_licence_of_its_card(tmp_path, monkeypatch):
    assert origin("some-org/some-model") == Origin("some-model", None, "some-org/some-model"), "the tests have no hub"
    card = folder_with("---\nlicense: llama3.2\n---\n", tmp_path / "cache") / "README.md"
    asked = []

    def download(*names: str, revision: str | None) -> str:
        asked.append((*names, revision))
        return str(card)

    monkeypatch.setattr("libprune.models.origin.hf_hub_download", download)
    found = find_origin(Prepare(model="meta-llama/Llama-3.2-1B", revision="abc"))
    assert found == Origin("Llama-3.2-1B", "llama3.2", "meta-llama/Llama-3.2-1B")
    assert asked == [("meta-llama/Llama-3.2-1B", "README.md", "abc")]


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        origin(tmp_path / "nowhere")


def test_it_reads_back_from_json():
    one = Origin("a", None, "b/a", 2, 1000)
    assert Origin.from_json(json.loads(json.dumps(asdict(one)))) == one
    older = {"name": "a", "license": None, "base_model": "b/a"}
    assert Origin.from_json(older) == Origin("a", None, "b/a")
