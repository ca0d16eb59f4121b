"""Reading texts from presets and data sets of the hub, local files and installed packages, whole or as a stream.

Those of the hub are read by `datasets.load_dataset`, local files by `libprune.texts.local`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import LibpruneError, SourceError, cause, nearest
from libprune.models.tokens import frame_of
from libprune.pipeline.terminal import masked
from libprune.texts.chosen import PRESETS, SELF, TextSource
from libprune.texts.local import LONGEST, Row, read_rows, text_files

SHUFFLE_BUFFER = 10_000
"""Documents of a stream among which the next one is drawn; some 20 MB of web text."""

_SHOWN = 60
"""Characters of a text that are told."""
_FIXED_DATE = "{% macro strftime_now(format) %}26 July 2024{% endmacro %}"
"""Stands before a chat template, instead of the function that tells today's date."""


@dataclass(frozen=True)
class Text:
    """An open text.

    Attributes:
        source: the split that was opened.
        revision: the commit that it was read at; None for local files.
        rows: its documents, and its labels if they are wanted, by column; a `datasets.IterableDataset` if it is a
            stream.
        files: the local files that it is read from; None of the hub.
        chat: writes a conversation as text, and raises what it likes; None where conversations are refused.
    """

    source: TextSource
    revision: str | None
    rows: Any
    files: list[str] | None = None
    chat: Callable[[Any], str] | None = None

    def told(self, documents: list[str], tokens: int | None) -> str:
        """What was read, in words: files, documents, their tokens if they were counted, and the first words."""
        files = "" if self.files is None else f" in {len(self.files):,} file{'s' * (len(self.files) > 1)}"
        counted = "" if tokens is None else f" of {tokens:,} tokens"
        begin = " ".join(documents[0][:_SHOWN].split())
        return f"read were {len(documents):,} documents{counted}{files}, which begin {begin!r}"

    def documents(self) -> Iterator[str]:
        """The documents that are not blank, in their order.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        return (document for _, document in self._read(self.rows, ""))

    def examples(self) -> Iterator[tuple[str, Any]]:
        """The documents that are not blank, in their order, each with the value in the label column.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        label = self.source.label
        assert label is not None, "only asked for where labels are wanted"
        return ((document, row.get(label)) for row, document in self._read(self.rows, ""))

    def shuffled(self, skip: int, seed: int) -> Iterator[str]:
        """The documents of a stream that are not blank, without the first `skip`, in a seeded order.

        The order is that of `datasets.IterableDataset.shuffle`: files are shuffled if none are skipped, and each
        document is drawn from a buffer of the next `SHUFFLE_BUFFER`.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        rows = self.rows.filter(lambda row: self._is_document(row.get(self.source.column)))
        rows = (rows.skip(skip) if skip else rows).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return (document for _, document in self._read(rows, f" after the first {skip}"))

    def _read(self, rows: Iterable[Row], where: str) -> Iterator[tuple[Row, str]]:
        """The rows that hold a document, each with this document."""
        column, empty = self.source.column, True
        with _naming(self.source):
            for row in rows:
                if self._is_document(row.get(column)):
                    empty = False
                    yield row, self._written(row[column])
        if empty:
            raise SourceError(f"text {self.source.name!r} holds no document{where}")

    def _written(self, value: Any) -> str:
        if self.chat is None or isinstance(value, str):
            return str(value)
        try:
            return self.chat(value)
        except Exception as error:  # templates raise what they like
            raise SourceError(
                f"column {self.source.column!r} of text {self.source.name!r} holds a conversation that the chat "
                f"template of the tokenizer cannot write: {cause(error)}"
            ) from error

    def _is_document(self, value: object) -> bool:
        if self.chat is not None and isinstance(value, list) and all(map(_is_message, value)):
            return bool(value)
        if value is not None and not isinstance(value, str):
            column, kind = self.source.column, type(value).__name__
            more = "" if self.chat is None else ", nor a conversation: a list of messages, each with role and content"
            raise SourceError(f"column {column!r} of text {self.source.name!r} holds {kind}, not text{more}")
        if value is not None and len(value) > LONGEST:
            raise SourceError(
                f"text {self.source.name!r} holds a document of {len(value):,} characters, which begins "
                f"{value[:_SHOWN]!r}; cut documents to {LONGEST:,} characters or fewer"
            )
        return bool(value and value.strip())


def _is_message(value: object) -> bool:
    """Whether a value is a message of a conversation; one that only calls tools has no content."""
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        return False
    return isinstance(value["role"], str) and isinstance(value["content"], str | list | None)


def chat_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], str]:
    """A function that writes a conversation as text, by the chat template of a tokenizer.

    A conversation is a list of messages, each with a `role` and a `content`. Keys of a message that are null are left
    out, since data sets add them to the messages that lack them. Templates that write today's date write a fixed one,
    so that the text is the same on every day. The tokens that the tokenizer puts before any text are left out where the
    template begins with them, for windows have them already.
    """
    before = "".join(tokenizer.convert_ids_to_tokens(list(frame_of(tokenizer).before)))

    def write(messages: Any) -> str:
        if tokenizer.chat_template is None:
            raise ValueError("it has none; use a text without conversations")
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        template = _FIXED_DATE + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(told, chat_template=template, tokenize=False)).removeprefix(before)

    return write


def open_text(source: TextSource, chat: Callable[[Any], str] | None = None) -> Text:
    """Find a text and, unless it is a stream, load it.

    Args:
        source: the split to open.
        chat: writes conversations as text, as `chat_writer` makes it; None to refuse them.

    Raises:
        SourceError: if the text cannot be read or lacks a column, or one column is named for both text and labels.
    """
    path, revision, files = source.path, None, None
    with _naming(source):
        if path is None:
            revision, rows = _from_hub(source)
            columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them before its first row
        else:
            files = [str(file) for file in text_files(path)]
            rows = _from_files(files, source.streaming)
            columns = _columns(rows, source)
    if not columns:
        raise SourceError(f"text {source.name!r} holds no document")
    if source.label == source.column:
        raise SourceError(
            f"column {source.column!r} of text {source.name!r} holds the documents; name another tokenize.label_column"
        )
    for column in _wanted(source):
        if column not in columns:
            raise SourceError(f"text {source.name!r} has no column {column!r}; it has {', '.join(columns)}")
    return Text(source, revision, rows if path else rows.select_columns(_wanted(source)), files, chat)


def _wanted(source: TextSource) -> list[str]:
    return [column for column in (source.column, source.label) if column is not None]


def _from_hub(source: TextSource) -> tuple[str, Any]:
    """A split of a data set of the hub, and the commit that it was read at."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if source.data_set in _PACKAGED_DATASETS_MODULES:
        raise SourceError(f"text {source.name!r} is a format, not a text; name a file, a folder or a data set")
    revision = load_dataset_builder(source.data_set, source.config, revision=source.revision).hash
    _require_revision(source, revision)
    what: dict[str, Any] = {"path": source.data_set, "name": source.config, "revision": revision}
    return revision, load_dataset(**what, split=source.split, streaming=source.streaming)


def _from_files(files: list[str], streaming: bool) -> Any:
    from datasets import IterableDataset

    return IterableDataset.from_generator(read_rows, gen_kwargs={"files": files}) if streaming else _Rows(files)


@dataclass(frozen=True)
class _Rows:
    """The rows of local files, read anew whenever they are gone through."""

    files: list[str]

    def __iter__(self) -> Iterator[Row]:
        return read_rows(self.files)


def _columns(rows: Iterable[Row], source: TextSource) -> list[str]:
    """The columns of rows, up to the first row by which all that are wanted have come up."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(row)
        if found.keys() >= set(_wanted(source)):
            break
    return list(found)


def _require_revision(source: TextSource, cached: str) -> None:
    """Stop if the cache holds another commit than the one asked for, and the hub cannot be reached."""
    if re.fullmatch("[0-9a-f]{40}", source.revision or "") and cached != source.revision:
        raise SourceError(f"text {source.name!r} is only there at revision {cached}, not at {source.revision}")


@contextmanager
def _naming(source: TextSource) -> Iterator[None]:
    """Inside the context, turn the errors of `datasets`, which have many types, into one that names the text."""
    try:
        yield
    except LibpruneError:
        raise
    except Exception as error:
        hint = nearest(source.name, [*PRESETS, SELF]) if source.path is None else ""
        raise SourceError(f"text {source.name!r} cannot be loaded: {masked(cause(error))}{hint}") from error
