"""Files of sentence-transformers: what they say of the pooling, and which of them stay with a model."""

import json
from pathlib import Path

import pytest

from libprune.engine.errors import SourceError
from libprune.models.sentences import copy_sentence_files, pooling_of, sentence_files

_TYPE = "sentence_transformers.models."


def write(folder: Path, pooling: dict | None, *kinds: str) -> Path:
    """The files beside a model: its modules, and the config of the pooling."""
    folder.mkdir(exist_ok=True)
    names = ["Transformer", "Pooling", *kinds]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": _TYPE + kind}
        for i, kind in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


MODES = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens")}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (MODES | {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 384}, "mean"),
        (MODES | {"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "mean", "include_prompt": True}, "mean"),
    ],
)
def test_the_pooling_is_that_of_the_files(tmp_path, config, pooling):
    files = sentence_files(write(tmp_path, config, "Normalize"), local_files_only=True)
    assert pooling_of(files, None) == (pooling, f"embeddings are pooled by {pooling}, as 1_Pooling/config.json says")
    assert pooling_of(files, "cls") == ("cls", "embeddings are pooled by cls, as prepare.pooling says")


def test_without_files_it_is_the_mean_and_said_so(tmp_path):
    assert sentence_files(tmp_path, local_files_only=True) == {}
    pooling, said = pooling_of({}, None)
    assert pooling == "mean"
    assert "since the model has no modules.json; prepare.pooling can say else" in said


@pytest.mark.parametrize(
    ("config", "kinds", "message"),
    [
        (MODES | {"pooling_mode_max_tokens": True}, (), "asks for the pooling max_tokens; libprune knows mean and cls"),
        (MODES, (), "asks for the pooling of nothing"),
        (dict.fromkeys(MODES, True), (), "asks for the pooling cls_token and mean_tokens and max_tokens"),
        (MODES | {"pooling_mode_cls_token": True}, ("Dense",), "names the module Dense, which libprune does not know"),
        (None, (), "names no pooling with a config.json; set prepare.pooling to mean or cls"),
    ],
)
def test_what_libprune_does_not_compute_is_refused_unless_the_params_say_otherwise(tmp_path, config, kinds, message):
    files = sentence_files(write(tmp_path, config, *kinds), local_files_only=True)
    with pytest.raises(SourceError, match=message):
        pooling_of(files, None)
    assert pooling_of(files, "mean")[0] == "mean"


def test_a_file_of_modules_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(SourceError, match=r"modules\.json cannot be read"):
        sentence_files(tmp_path, local_files_only=True)


def test_all_files_are_copied_to_their_places(tmp_path):
    own = write(tmp_path / "own", MODES, "Dense")
    (own / "2_Dense").mkdir()
    (own / "2_Dense/model.safetensors").write_bytes(b"weights")
    (own / "model.safetensors").write_bytes(b"the model's own, which slice writes")
    (tmp_path / "other").mkdir()
    copy_sentence_files(sentence_files(own, local_files_only=True), tmp_path / "other")
    found = {str(path.relative_to(tmp_path / "other")) for path in (tmp_path / "other").rglob("*") if path.is_file()}
    assert found == {
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    }
