"""Local files are read as their endings say, and everything else is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import SourceError
from libprune.texts import local
from libprune.texts.local import read_rows, text_files

DOCUMENTS = ["the cat sees a bird", "  never, and then: today", "caf\u00e9\tand", 'the "old" house']


def table(documents: Sequence[str], delimiter: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([["label", "text"], *(("1", text) for text in documents)])
    return file.getvalue()


def json_lines(documents: Sequence[str]) -> str:
    return "".join(json.dumps({"label": 1, "text": text}) + "\n" for text in documents)


WRITERS: dict[str, Callable[[Sequence[str]], str]] = {
    ".txt": "\n".join,
    ".text": lambda documents: "\r\n".join(documents) + "\r\n",
    ".cor": "\n".join,
    ".raw": "\n".join,
    ".tokens": "\n".join,
    ".jsonl": json_lines,
    ".ndjson": lambda documents: "\n" + json_lines(documents).rstrip(),
    ".json": lambda documents: json.dumps([{"text": text} for text in documents], indent=1),
    ".csv": lambda documents: table(documents, ","),
    ".tsv": lambda documents: table(documents, "\t"),
}


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
}


def texts(path: Path) -> list[object]:
    return [row["text"] for row in read_rows([str(file) for file in text_files(path)])]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("ending", WRITERS)
def test_every_ending_plain_and_compressed_gives_the_same_documents(ending, packer, tmp_path):
    path = tmp_path / f"t.v1{ending}{packer}"
    path.write_bytes(PACKERS[packer](WRITERS[ending](DOCUMENTS).encode()))
    assert texts(path) == DOCUMENTS
    path.write_bytes(PACKERS[packer]("\ufeff".encode() + WRITERS[ending](DOCUMENTS).encode()))
    assert texts(path) == DOCUMENTS, "a mark of the byte order is no text"


def test_parquet_gives_the_same_documents(tmp_path):
    pq.write_table(pa.table({"id": range(4), "text": DOCUMENTS}), tmp_path / "t.parquet")
    assert texts(tmp_path / "t.parquet") == DOCUMENTS


def test_json_objects_may_stand_one_after_the_other(tmp_path):
    (tmp_path / "t.json").write_text(json_lines(DOCUMENTS))
    assert texts(tmp_path / "t.json") == DOCUMENTS


def test_many_json_objects_are_read_in_seconds(tmp_path):
    """In time proportional to their number; it took 40 seconds when it grew with the square."""
    line = json.dumps({"text": "a word " * 60}) + "\n"
    (tmp_path / "t.json").write_text(line * 20_000)
    start = time.process_time()
    assert sum(1 for _ in texts(tmp_path / "t.json")) == 20_000
    assert time.process_time() - start < 15


def test_what_looks_like_nothing_in_a_table_is_text(tmp_path):
    """Readers that guess types take these for missing values or numbers."""
    words = ["NA", "null", "None", "nan", "1", "1e5", "true"]
    (tmp_path / "t.csv").write_text(table(words, ","))
    assert texts(tmp_path / "t.csv") == words


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8),
    st.sampled_from([".csv", ".tsv", ".jsonl"]),
)
def test_any_text_comes_back_from_a_table(tmp_path_factory, documents, ending):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(WRITERS[ending](documents).encode())
    assert texts(path) == documents


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "t",
        "t.md",
        "t.pdf",
        "t.html",
        "t.arrow",
        "t.bin",
        "t.txt~",
        "t.gz",
        "t.txt.zip",
        "t.parquet.gz",
        "t.docx",
    ],
)
def test_any_other_ending_is_refused_with_those_that_are_known(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    for path in (tmp_path / name, tmp_path / "folder" / name):
        path.write_text("wrong")
        if name == "README.md" and path.parent.name == "folder":
            assert texts(path.parent) == ["a"], "in a folder what tells about the text is left out"
            continue
        with pytest.raises(
            SourceError, match=r"no ending that is known .* \.txt, .*\.parquet; all but .*\.gz.*; rename it"
        ):
            text_files(path if path.parent == tmp_path else path.parent)


def test_of_a_folder_hidden_files_and_those_about_the_text_are_left_out(tmp_path):
    for name in (
        ".DS_Store",
        ".hidden.txt",
        ".gitattributes",
        "README.md",
        "readme.txt",
        "LICENSE",
        "license.txt",
        "README_de.txt",
        "CITATION.cff",
    ):
        (tmp_path / name).write_text("wrong")
    (tmp_path / ".git").mkdir()
    with pytest.raises(SourceError, match="holds files of 0 kinds: none; known: "):
        text_files(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b"))
    (tmp_path / "citations.txt").write_text("c")
    assert texts(tmp_path) == ["a", "b", "c"]
    (tmp_path / "c.csv").write_text("a")
    with pytest.raises(SourceError, match="holds files of 2 kinds: csv, text"):
        text_files(tmp_path)


def test_a_data_set_cloned_from_a_hub_is_not_read_by_what_it_says_of_itself(tmp_path):
    (tmp_path / "README.md").write_text("wrong")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "data" / "train.parquet")
    with pytest.raises(SourceError, match=r"holds folders \(data\); name one of them, or a file"):
        text_files(tmp_path)
    assert texts(tmp_path / "data") == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: Expecting value at column"),
        ("t.jsonl", b'{"text": "a"}\n"b"\n', "line 2 is a str, not an object with columns"),
        ("t.json", b'[{"text": "a"}, 5]', "entry 2 is a int, not an object"),
        ("t.json", b'{"text": "a"}\n[{"text": "b"}, 5]', "entry 3 is a int, not an object"),
        ("t.json", b'[{"text": "a"}', "Expecting ',' delimiter: line 1 column 15"),
        ("t.csv", b"text,b\na,1\nb\n", "line 3 has 1 fields, the first line 2"),
        ("t.csv", b'text\n"a" b\n', "expected after"),
        ("t.txt", "caf\u00e9\n".encode("latin1"), "position 3: .*; files are read as UTF-8"),
        ("t.txt", "caf\u00e9\n".encode("utf-16"), "files are read as UTF-8"),
        ("t.txt.gz", b"no archive", "Not a gzipped file"),
        ("t.txt.xz", b"no archive", "."),
        ("t.txt.zst", b"no archive", "."),
        ("t.parquet", b"no archive", "."),
    ],
)
def test_what_cannot_be_read_is_told_with_the_file_and_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name} cannot be read as .*: .*{message}"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz", "t.csv.gz", "t.tsv.gz", "t.json.gz"])
def test_a_small_file_that_unpacks_to_a_huge_line_is_refused_soon(tmp_path, name, monkeypatch):
    """No more of it is read than a document may have."""
    monkeypatch.setattr(local, "LONGEST", 1 << 16)
    monkeypatch.setattr(local, "_WHOLE", 1 << 16)
    with gzip.open(tmp_path / name, "wb") as file:
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(SourceError, match=rf"{name} cannot be read as .*more than 65,536 characters"):
        texts(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_pointer_of_git_lfs_is_not_the_text(tmp_path):
    for name in ("t.txt", "t.parquet", "t.jsonl.gz"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(SourceError, match="is not the text but its pointer in Git LFS; run git lfs pull"):
            texts(tmp_path / name)
