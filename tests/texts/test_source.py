"""Texts: presets, hub data sets and local files, whole and as streams; what is evaluated on is never calibrated on."""

import csv
import gzip
import json
import os
import socket
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.pipeline.sections import Tokenize
from libprune.texts.chosen import PRESETS, TextSource, calibration_source, evaluation_source, require_other_text
from libprune.texts.source import chat_writer, open_text
from tests.support.hub import REVISION, write_cached
from tests.support.tiny import write_model

DOCUMENTS = ["the cat sees a bird", "  never, and then: today", "a river", 'the "old" house']


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(text: object, **keys: object) -> TextSource:
    return calibration_source(Tokenize(text=str(text), **keys))


def load(text: object, **keys: object) -> list[str]:
    return list(open_text(source(text, **keys)).documents())


# Local files


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["label", "text"], *(("1", text) for text in DOCUMENTS)])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_in_the_order_of_its_files(streaming, tmp_path):
    (tmp_path / "b.txt").write_text("\n".join(DOCUMENTS[2:]))
    (tmp_path / "a.txt").write_text("\n".join(DOCUMENTS[:2]))
    text = open_text(source(tmp_path, streaming=streaming))
    assert list(text.documents()) == DOCUMENTS
    assert text.files == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_a_text_inside_a_package_gives_the_same_documents(tmp_path, monkeypatch):
    (tmp_path / "site" / "of_texts").mkdir(parents=True)
    (tmp_path / "site" / "of_texts" / "text.txt").write_text("\n".join(DOCUMENTS))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert load("package://of_texts/text.txt") == DOCUMENTS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_those_that_are_there(streaming, tmp_path):
    write_csv(tmp_path / "t.csv")
    with pytest.raises(SourceError, match=r"t\.csv' has no column 'content'; it has label, text$"):
        load(tmp_path / "t.csv", column="content", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_file_holds_now_is_read_even_under_the_same_name_and_time(streaming, tmp_path):
    path = tmp_path / "t.jsonl"
    for document in ("the first one", "the other one"):
        path.write_text(json.dumps({"text": document}))
        os.utime(path, ns=(10**18, 10**18))
        assert load(path, streaming=streaming) == [document]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a[1].txt", "a*.txt", "a?.txt", "{a,b}.txt", "hf:a::b.txt", "zip:a.txt", "%41.txt", "[0-9]"]
)
def test_a_path_is_a_path_and_no_pattern(name, streaming, tmp_path):
    for other in ("a1.txt", "ab.txt", "a.txt", "0", "A.txt"):
        (tmp_path / other).write_text("wrong")
    path = tmp_path / name
    if path.suffix:
        path.write_text("right")
    else:
        path.mkdir()
        (path / "a[1].txt").write_text("right")
    assert load(path, streaming=streaming) == ["right"]


@pytest.mark.parametrize("name", ["csv", "json", "text", "parquet", "imagefolder", "arrow"])
def test_the_name_of_a_format_is_no_text(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("text\nwrong\n")
    with pytest.raises(SourceError, match=f"text '{name}' is a format, not a text; name a file"):
        load(name)


def test_a_preset_is_of_the_hub_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Salesforce" / "wikitext").mkdir(parents=True)
    (tmp_path / "Salesforce" / "wikitext" / "t.txt").write_text("wrong")
    with pytest.raises(SourceError, match="text 'wikitext2' cannot be loaded"):
        load("wikitext2")
    assert load("Salesforce/wikitext") == ["wrong"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_text_makes_no_request(streaming, tmp_path, monkeypatch):
    """Tests run offline as a whole; here only what the text is keeps `datasets` from asking."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for a host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "t.txt").write_text("\n".join(DOCUMENTS))
    assert load(tmp_path / "t.txt", streaming=streaming) == DOCUMENTS


def test_a_column_that_not_all_rows_have_is_read_where_it_is(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"text": "b"}\n{"text": null}\n{"text": "c"}\n')
    assert load(tmp_path / "t.jsonl") == ["b", "c"]
    assert sorted(open_text(source(tmp_path / "t.jsonl", streaming=True)).shuffled(0, 0)) == ["b", "c"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("empty.txt", b""),
        ("empty.jsonl", b""),
        ("blank.txt", b" \n\n  \n"),
        ("latin1.txt", "caf\u00e9\n".encode("latin1")),
        ("ragged.csv", b'text,b\n"a\n1,2,3,4\n'),
        ("empty.csv", b""),
        ("wide.csv", b"text,b\na,1\nb,1,2\n"),
        ("numbers.jsonl", b'{"text": 1}\n'),
        ("list.jsonl", b'["a"]\n'),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-9]),
        ("no.jsonl.xz", b'{"text": "a"}\n'),
        ("no.parquet", b"PAR1"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_that_cannot_be_used_is_refused_by_name(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=name):
        load(tmp_path / name, streaming=streaming)


# Streams


@pytest.mark.parametrize("skip", [0, 7])
def test_the_seeded_order_of_a_stream_is_a_permutation_of_what_is_not_skipped(tmp_path, skip):
    documents = [f"document {number}" for number in range(40)]
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(documents))
    text = open_text(source(path, streaming=True))
    orders = [list(text.shuffled(skip, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] != documents[skip:]
    for order in orders:
        assert sorted(order) == sorted(documents[skip:])


def test_a_stream_with_nothing_after_what_is_skipped_says_so(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(DOCUMENTS))
    with pytest.raises(SourceError, match=r"t\.txt' holds no document after the first 4$"):
        list(open_text(source(tmp_path / "t.txt", streaming=True)).shuffled(4, 0))


def test_a_stream_reads_no_further_than_it_is_asked_to(tmp_path):
    """The last file cannot be read, and is not, before its documents are asked for."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("\n".join(DOCUMENTS))
    (tmp_path / "texts" / "9.txt").write_bytes(b"\xff\xfe\xfd")
    documents = open_text(source(tmp_path / "texts", streaming=True)).documents()
    assert [next(documents) for _ in range(12)] == 3 * DOCUMENTS
    with pytest.raises(SourceError, match=r"9\.txt cannot be read as text: .* position 0: .*; files are read as UTF-8"):
        next(documents)
    with pytest.raises(SourceError, match=r"9\.txt cannot be read as text"):
        load(tmp_path / "texts", streaming=False)


# Conversations


@pytest.fixture
def tokenizer(tmp_path) -> PreTrainedTokenizerBase:
    """Its template writes the keys of each message with their values."""
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))
    tokenizer.chat_template = (
        "{% for message in messages %}[{% for key in message %}{{ key }}:{{ message[key] }} {% endfor %}]{% endfor %}"
    )
    return tokenizer


CHATS = [
    [{"role": "user", "content": "a river"}, {"role": "assistant", "content": "never"}],
    [],
    [{"role": "assistant", "content": None, "name": "tool"}],
]
WRITTEN = ["[role:user content:a river ][role:assistant content:never ]", "[role:assistant name:tool ]"]


def chats(path: Path, tokenizer: PreTrainedTokenizerBase, streaming: bool = False) -> list[str]:
    return list(open_text(source(path, column="messages", streaming=streaming), chat_writer(tokenizer)).documents())


def write_chats(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_written_by_the_chat_template_without_keys_that_are_null(tokenizer, tmp_path, streaming):
    assert chats(write_chats(tmp_path / "t.jsonl", CHATS), tokenizer, streaming) == WRITTEN
    pq.write_table(pa.table({"messages": [*CHATS, None]}), tmp_path / "t.parquet")
    assert chats(tmp_path / "t.parquet", tokenizer, streaming) == WRITTEN


def test_conversations_of_a_stream_come_in_a_seeded_order(tokenizer, tmp_path):
    rows = [[{"role": "user", "content": str(number)}] for number in range(20)]
    path = write_chats(tmp_path / "t.jsonl", rows)
    text = open_text(source(path, column="messages", streaming=True), chat_writer(tokenizer))
    found = list(text.shuffled(3, seed=0))
    assert found != sorted(found)
    assert sorted(found) == sorted(f"[role:user content:{number} ]" for number in range(3, 20))


def test_a_text_without_conversations_is_read_as_it_is(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": text}) + "\n" for text in DOCUMENTS))
    assert chats(tmp_path / "t.jsonl", tokenizer) == DOCUMENTS


def test_a_template_that_writes_the_date_writes_the_same_on_every_day(tokenizer, tmp_path):
    path = write_chats(tmp_path / "t.jsonl", CHATS[:1])
    tokenizer.chat_template = "{%- set day = strftime_now('%d %B %Y') -%}{{ day }}: {{ messages[0]['content'] }}"
    assert chats(path, tokenizer) == ["26 July 2024: a river"]
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%H') }}{% endif %}"
    assert chats(path, tokenizer) == ["26 July 2024"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"column 'messages' of text '.*t\.jsonl' holds a conversation .* cannot write: it has none; use a text"),
        ("{{ raise_exception('roles must alternate') }}", "cannot write: TemplateError: roles must alternate$"),
        ("{% for", "that the chat template of the tokenizer cannot write: "),
        ("{{ messages[9].content.missing }}", "that the chat template of the tokenizer cannot write: "),
    ],
)
def test_a_template_that_cannot_write_a_conversation_is_refused(tokenizer, tmp_path, template, message):
    path = write_chats(tmp_path / "t.jsonl", CHATS[:1])
    tokenizer.chat_template = template
    with pytest.raises(SourceError, match=message):
        chats(path, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        ["a", "b"],
        [1],
        [{"from": "human", "value": "a"}],
        [{"role": "user"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": 5}],
        {"role": "user", "content": "a"},
        5,
    ],
    ids=str,
)
def test_what_is_neither_text_nor_a_conversation_is_refused(tokenizer, tmp_path, row, streaming):
    path = write_chats(tmp_path / "t.jsonl", [row])
    with pytest.raises(
        SourceError,
        match=r"holds (list|dict|int), not text, nor a conversation: a list of messages, each with ",
    ):
        chats(path, tokenizer, streaming)


def test_conversations_are_refused_where_documents_have_labels(tmp_path):
    rows = [{"messages": CHATS[0], "label": 1}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = calibration_source(Tokenize(text=str(tmp_path / "t.jsonl"), column="messages"), "label")
    with pytest.raises(SourceError, match=r"column 'messages' of text .* holds list, not text$"):
        list(open_text(labelled).examples())


def test_a_conversation_begins_with_what_stands_before_any_text_once_its_window_does(tokenizer, tmp_path):
    """Templates write the first token that the tokenizer adds, too."""
    path = write_chats(tmp_path / "t.jsonl", CHATS[:1])
    tokenizer.chat_template = "<eos>{{ messages[0].content }}<eos>"
    assert chats(path, tokenizer) == ["<eos>a river<eos>"]
    tokenizer.bos_token, tokenizer.add_bos_token = "<eos>", True
    assert tokenizer("a").input_ids[0] == tokenizer.eos_token_id
    assert chats(path, tokenizer) == ["a river<eos>"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_read_is_told_and_moves_no_terminal(streaming, tmp_path):
    (tmp_path / "t.txt").write_text("\x1b[31mred and\ta very long line that goes on and on and on and on\nb\n")
    text = open_text(source(tmp_path / "t.txt", streaming=streaming))
    told = text.told(list(text.documents()), 1234)
    assert told.startswith("read were 2 documents of 1,234 tokens in 1 file, which begin '\\x1b[31mred and a very")
    assert told.isprintable()
    assert len(told) < 150


# The hub


SPLITS = {"train": ["one", " ", "two"], "validation": ["three"], "test": ["four"]}


@pytest.mark.parametrize("streaming", [None, False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_its_splits_at_a_revision_that_is_told(name, streaming, tmp_path):
    preset = PRESETS[name]
    write_cached(tmp_path / "cache", preset.data_set, SPLITS, preset.config or "default", preset.column)
    settings = Tokenize(text=name, streaming=streaming)
    text = open_text(calibration_source(settings))
    assert list(text.documents()) == ["one", "two"]
    assert text.revision == REVISION
    assert text.source.streaming == (preset.streaming if streaming is None else streaming)
    other = evaluation_source(settings)
    assert (other is None) == (name == "fineweb-edu")
    if other is not None:
        require_other_text(text.source, other)
        assert list(open_text(other).documents()) == SPLITS[preset.held_out]


def test_keys_of_the_params_win_over_the_presets(tmp_path):
    keys = {"config": "mine", "split": "validation", "column": "body", "revision": "b", "streaming": False}
    found = source("c4", **keys)
    assert {key: getattr(found, key) for key in keys} == keys
    assert found.data_set == "allenai/c4"
    write_cached(tmp_path / "cache", found.data_set, SPLITS, "mine", "body")
    assert list(open_text(found).documents()) == ["three"]


def test_a_commit_that_is_asked_for_is_not_replaced_by_the_cached_one(tmp_path):
    write_cached(tmp_path / "cache", "owner/data", SPLITS)
    assert load("owner/data", revision=REVISION) == ["one", "two"]
    with pytest.raises(SourceError, match=f"'owner/data' is only there at revision {REVISION}, not at {'f' * 40}"):
        load("owner/data", revision="f" * 40)


def test_a_hub_text_that_cannot_be_reached_is_named():
    with pytest.raises(SourceError, match="text 'nobody/nothing' cannot be loaded: "):
        load("nobody/nothing")


def test_a_name_near_a_preset_is_told_the_presets():
    with pytest.raises(SourceError, match=r"text 'wikitext-2' cannot be loaded: .*; did you mean 'wikitext2'\?$"):
        load("wikitext-2")
