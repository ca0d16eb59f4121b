"""Models and texts from where users have them, and the token windows made of them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from libprune.checkpoint import write_dense
from libprune.errors import ArtifactError, SourceError
from libprune.sections import Prepare
from libprune.sources import load_dense, load_documents, require_other_text, resolve
from libprune.tokens import draw, read_tokens, split_documents, spread, windows, write_tokens
from tests.tiny import WORDS, write_model, write_text

DOCUMENTS = ["the cat sees a bird", "  never, and then: today", "a river", 'the "old" house']


# Where things are


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package that must not be imported: its module raises."""
    folder = tmp_path / "site" / "forbidden_to_import"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "text.txt").write_text("\n".join(DOCUMENTS))
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


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "wikitext"])
def test_a_hub_id_is_left_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None


# Texts


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["label", "text"], *(("1", text) for text in DOCUMENTS)])


def write_shards(path: Path) -> None:
    """A folder whose two files, in the order of their names, hold the documents."""
    path.mkdir()
    (path / "b.txt").write_text("\n".join(DOCUMENTS[2:]))
    (path / "a.txt").write_text("\n".join(DOCUMENTS[:2]))


FORMS: dict[str, Callable[[Path], object]] = {
    "t.txt": lambda path: path.write_text("\n".join(DOCUMENTS)),
    "t.text": lambda path: path.write_text("\n\n \n".join(DOCUMENTS) + "\n"),
    "t.jsonl": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)),
    "t.json": lambda path: path.write_text(json.dumps([{"text": text} for text in [*DOCUMENTS, " ", None]])),
    "t.csv": write_csv,
    "t.parquet": lambda path: pq.write_table(pa.table({"text": [*DOCUMENTS, ""]}), path),
    "folder": write_shards,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_local_text_gives_the_same_documents(form, tmp_path):
    FORMS[form](tmp_path / form)
    assert load_documents(str(tmp_path / form), None, "train", "text") == DOCUMENTS


def test_a_text_inside_a_package_gives_the_same_documents(package):
    assert load_documents("package://forbidden_to_import/data/text.txt", None, "train", "text") == DOCUMENTS


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    write_csv(tmp_path / "t.csv")
    with pytest.raises(SourceError, match=r"t\.csv' has no column 'content'; it has label, text$"):
        load_documents(str(tmp_path / "t.csv"), None, "train", "content")


def test_a_folder_of_mixed_kinds_or_of_nothing_is_refused(tmp_path):
    (tmp_path / "mixed").mkdir()
    with pytest.raises(SourceError, match="holds files of 0 kinds: none"):
        load_documents(str(tmp_path / "mixed"), None, "train", "text")
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.csv").write_text("a")
    with pytest.raises(SourceError, match="holds files of 2 kinds: csv, text"):
        load_documents(str(tmp_path / "mixed"), None, "train", "text")


def test_a_hub_text_that_cannot_be_reached_is_named():
    with pytest.raises(SourceError, match="text 'nobody/nothing' cannot be loaded: "):
        load_documents("nobody/nothing", None, "train", "text")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("empty.txt", b""),
        ("empty.jsonl", b""),
        ("latin1.txt", "caf\u00e9\n".encode("latin1")),
        ("ragged.csv", b'text,b\n"a\n1,2,3,4\n'),
        ("numbers.csv", b"text\n1\n2\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_that_cannot_be_used_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=name):
        load_documents(str(tmp_path / name), None, "train", "text")


# Windows


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_the_documents_for_evaluation_are_the_last_and_no_others(numbers, share):
    documents = [f"{i} {number}" for i, number in enumerate(numbers)]
    expected = max(1, round(len(documents) * share))
    if expected == len(documents):
        with pytest.raises(SourceError, match="two are needed to set some apart"):
            split_documents(documents, share)
        return
    calibration, evaluation = split_documents(documents, share)
    assert calibration + evaluation == documents
    assert not set(calibration) & set(evaluation)
    assert len(evaluation) == expected


def test_one_document_cannot_be_divided():
    with pytest.raises(SourceError, match=r"the text has 1 document\(s\); .* or name tokenize\.evaluation_text"):
        split_documents(["all in one line"], 0.3)


AVAILABLE = np.arange(60).reshape(20, 3)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_draw_is_seeded_without_replacement_and_in_the_texts_order(count, seed):
    drawn = draw(AVAILABLE, count, seed, "calibration")
    assert drawn.shape == (count, 3)
    assert (np.diff(drawn[:, 0]) > 0).all()
    assert {tuple(row) for row in drawn} <= {tuple(row) for row in AVAILABLE}
    np.testing.assert_array_equal(draw(AVAILABLE, count, seed, "calibration"), drawn)


def test_other_seeds_draw_other_windows():
    assert len({tuple(draw(AVAILABLE, 5, seed, "calibration")[:, 0]) for seed in range(20)}) > 15


@given(st.integers(1, 20))
def test_evaluation_windows_are_distinct_and_span_the_text(count):
    rows = spread(AVAILABLE, count, "evaluation")[:, 0] // 3
    assert len(set(rows)) == count
    assert rows[0] == 0
    if count > 1:
        assert rows[-1] == 19
        assert np.ptp(np.diff(rows)) <= 1


@pytest.mark.parametrize("choose", [lambda ids, n: draw(ids, n, 0, "this"), lambda ids, n: spread(ids, n, "this")])
def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(choose):
    with pytest.raises(SourceError, match=r"this needs 21 windows of 3 tokens, the text gives 20 \(60 tokens\)"):
        choose(AVAILABLE, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and its word-level tokenizer as a Hugging Face folder."""
    return write_model(tmp_path_factory.mktemp("model"))


def test_windows_are_consecutive_stretches_of_the_tokens(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = write_text(tmp_path / "t.txt", documents=3).read_text().splitlines()
    expected = [WORDS.index(word) + 2 for document in documents for word in document.split()]
    found = windows(documents, tokenizer, 10)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.reshape(expected[:70], (7, 10)))
    assert windows(documents, tokenizer, 100).shape == (0, 100)


def test_tokens_come_back_and_those_of_another_model_are_refused(tmp_path):
    path = tmp_path / "tokens.parquet"
    write_tokens(path, AVAILABLE, {"model": "here", "source": "a text"})
    ids, meta = read_tokens(path, "here")
    np.testing.assert_array_equal(ids, AVAILABLE)
    assert (meta["source"], meta["sequences"], meta["length"]) == ("a text", 20, 3)
    np.testing.assert_array_equal(read_tokens(path, "here", 4)[0], AVAILABLE[:4])
    with pytest.raises(ArtifactError, match="belongs to model 'here', but the current model is 'elsewhere'"):
        read_tokens(path, "elsewhere")
    with pytest.raises(SourceError, match=r"21 calibration sequences are asked for, .* holds 20; raise tokenize\."):
        read_tokens(path, "here", 21)


def test_the_digest_names_the_tokens(tmp_path):
    digests = []
    for ids in (AVAILABLE, AVAILABLE.copy(), AVAILABLE + 1, AVAILABLE[:10]):
        write_tokens(tmp_path / "tokens.parquet", ids, {"model": "here"})
        digests.append(read_tokens(tmp_path / "tokens.parquet", "here")[1]["tokens"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# Models


def test_a_local_folder_is_loaded_and_written_as_a_plain_one(folder, tmp_path):
    model, tokenizer = load_dense(Prepare(model=str(folder)))
    assert not model.training
    fingerprint = write_dense(tmp_path / "model", model, tokenizer)
    again, _ = load_dense(Prepare(model=str(tmp_path / "model")))
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)
    assert write_dense(tmp_path / "again", again, tokenizer) == fingerprint


def test_the_dtype_of_the_source_is_kept_unless_another_is_asked_for(folder):
    assert load_dense(Prepare(model=str(folder)))[0].dtype == torch.float32
    assert load_dense(Prepare(model=str(folder), dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"prepare\.model = '.*' cannot be loaded: "):
        load_dense(Prepare(model=str(tmp_path)))
    (tmp_path / "model.gguf").write_text("not one")
    with pytest.raises(SourceError, match=r"model\.gguf' cannot be loaded: "):
        load_dense(Prepare(model=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "unheard-of"])
def test_a_quantized_model_is_refused_with_its_method(folder, tmp_path, method):
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=rf"is quantized \({method}\); prune the unquantized model"):
        load_dense(Prepare(model=str(tmp_path)))


def test_the_text_to_calibrate_on_is_refused_for_evaluation(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a\n")
    two.write_text("b\n")
    require_other_text(str(one), "train", str(two), "test")
    require_other_text("owner/data", "train", "owner/data", "test")
    for source, split in ((str(one), "test"), ("owner/data", "train")):
        text = str(one) if split == "test" else source
        with pytest.raises(SourceError, match="is the text to calibrate on"):
            require_other_text(text, "train", source, split)
