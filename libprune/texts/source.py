"""Reading texts from presets and data sets of the hub, local files and installed packages.

All of them are read by `datasets.load_dataset`, whole or as a stream.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import LibpruneError, SourceError, cause, nearest
from libprune.models.source import resolve
from libprune.pipeline.sections import Tokenize

SELF = "self"
"""The text that the dense model writes itself; see `libprune.texts.self_text`."""
SHUFFLE_BUFFER = 10_000
"""Documents of a stream among which the next one is drawn; some 20 MB of web text."""

_FIXED_DATE = "{% macro strftime_now(format) %}26 July 2024{% endmacro %}"
"""Stands before a chat template, instead of the function that tells today's date."""
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Preset:
    """Values of a text's keys that are null in params.yaml.

    Attributes:
        data_set: a hub id, or whatever else `tokenize.text` names.
        config: config of the data set.
        split: the split for calibration.
        held_out: the split for evaluation; None if the data set has none.
        column: the column that holds the text.
        streaming: whether the data set is read as a stream, because it is too large to be downloaded.
        revision: branch, tag or commit.
    """

    data_set: str
    config: str | None = None
    split: str = "train"
    held_out: str | None = None
    column: str = "text"
    streaming: bool = False
    revision: str | None = None


PRESETS = {
    "wikitext2": Preset("Salesforce/wikitext", "wikitext-2-raw-v1", held_out="test"),
    "ptb": Preset("ptb-text-only/ptb_text_only", held_out="test", column="sentence", revision="refs/convert/parquet"),
    "c4": Preset("allenai/c4", "en", held_out="validation", streaming=True),
    "fineweb-edu": Preset("HuggingFaceFW/fineweb-edu", "sample-10BT", streaming=True),
}
"""Texts by short names. `ptb` is a script on its main branch, which datasets 4 and later refuse; the hub keeps the same
data as Parquet on a branch of its own."""


@dataclass(frozen=True)
class TextSource:
    """One split of a data set.

    Attributes:
        name: its name in params.yaml: a preset, or the data set.
        data_set: a hub id, a local path or `package://NAME/path`.
        config, revision, split: those of a hub data set; without effect on local files.
        column: the column that holds the text.
        streaming: whether documents are read one after another, no more than are asked for.
        label: the column that holds the labels; None if no labels are wanted.
    """

    name: str
    data_set: str
    config: str | None
    revision: str | None
    split: str
    column: str
    streaming: bool
    label: str | None = None


def calibration_source(settings: Tokenize, label: str | None = None) -> TextSource:
    """The source of the calibration text, with the given label column; keys of the params win over the preset's."""
    preset = PRESETS.get(settings.text, Preset(settings.text))
    return TextSource(
        name=settings.text,
        data_set=preset.data_set,
        config=settings.config or preset.config,
        revision=settings.revision or preset.revision,
        split=settings.split or preset.split,
        column=settings.column or preset.column,
        streaming=preset.streaming if settings.streaming is None else settings.streaming,
        label=label,
    )


def evaluation_source(settings: Tokenize, label: str | None = None) -> TextSource | None:
    """The source of the evaluation text; None if documents of the calibration text should be held out.

    Without `evaluation_text` it is the held-out split of the calibration text, which is `evaluation_split` or the
    preset's; local files and `fineweb-edu` have none. Another text that is no preset shares `column`.
    """
    name = settings.evaluation_text or settings.text
    preset = PRESETS.get(name, Preset(name))
    split = settings.evaluation_split or preset.held_out
    if settings.evaluation_text is None and (split is None or resolve(preset.data_set) is not None):
        return None
    if name == settings.text:
        source = calibration_source(settings, label)
    else:
        own = {} if name in PRESETS else {"column": settings.column}
        keys = {"text": name, "config": None, "revision": None, "split": None, "column": None} | own
        source = calibration_source(settings.model_copy(update=keys), label)
    return replace(
        source,
        config=settings.evaluation_config or source.config,
        split=split or (preset.split if name in PRESETS else "test"),
        column=settings.evaluation_column or source.column,
    )


def require_other_text(calibration: TextSource, evaluation: TextSource) -> None:
    """Stop if the evaluation text is the calibration text.

    Raises:
        SourceError: if both name one file, or overlapping splits of one data set.
    """
    path, other = resolve(calibration.data_set), resolve(evaluation.data_set)
    if path and other:
        same = path.samefile(other)
    else:
        same = (calibration.data_set, calibration.config) == (evaluation.data_set, evaluation.config)
        same = same and _overlap(calibration.split, evaluation.split)
    if same:
        raise SourceError(
            f"the text to evaluate on is the text to calibrate on ({evaluation.name!r}, split {evaluation.split!r}); "
            "name another tokenize.evaluation_text or another tokenize.evaluation_split, or set both to null to set "
            "documents apart"
        )


def _overlap(split: str, other: str) -> bool:
    """Whether two splits may share rows; slices of one split, such as ``train[:10%]``, always count as sharing some."""
    names = [{part.partition("[")[0].strip() for part in one.split("+")} for one in (split, other)]
    return bool(names[0] & names[1]) or "all" in names[0] | names[1]


@dataclass(frozen=True)
class Text:
    """An open text.

    Attributes:
        source: the split that was opened.
        revision: the commit that it was read at; None for local files.
        rows: its documents, and its labels if they are wanted: a `datasets.Dataset`, or a `datasets.IterableDataset` if
            it is a stream.
        chat: writes a conversation as text, and raises what it likes; None where conversations are refused.
    """

    source: TextSource
    revision: str | None
    rows: Any
    chat: Callable[[Any], str] | None = None

    def documents(self) -> Iterator[str]:
        """The documents that are not blank, in their order.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        return self._read(self.rows, "")

    def examples(self) -> Iterator[tuple[str, Any]]:
        """The documents that are not blank, in their order, each with the value in the label column.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        rows = self.rows.filter(self._is_document, input_columns=self.source.column)
        yield from zip(self._read(rows, ""), rows[self.source.label], strict=True)

    def shuffled(self, skip: int, seed: int) -> Iterator[str]:
        """The documents of a stream that are not blank, without the first `skip`, in a seeded order.

        The order is that of `datasets.IterableDataset.shuffle`: files are shuffled if none are skipped, and each
        document is drawn from a buffer of the next `SHUFFLE_BUFFER`.

        Raises:
            SourceError: if there is none, or one cannot be read or is not text.
        """
        rows = self.rows.filter(self._is_document, input_columns=self.source.column)
        rows = rows.skip(skip) if skip else rows
        return self._read(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), f" after the first {skip}")

    def _read(self, rows: Iterable[Any], where: str) -> Iterator[str]:
        column, empty = self.source.column, True
        with _naming(self.source):
            for row in rows:
                if self._is_document(row[column]):
                    empty = False
                    yield self._written(row[column])
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
    so that the text is the same on every day.
    """

    def write(messages: Any) -> str:
        if tokenizer.chat_template is None:
            raise ValueError("it has none; use a text without conversations")
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        template = _FIXED_DATE + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(told, chat_template=template, tokenize=False))

    return write


def open_text(source: TextSource, chat: Callable[[Any], str] | None = None) -> Text:
    """Find a text and, unless it is a stream, load it.

    A local file with an unknown suffix is read as text, one document for each line.

    Args:
        source: the split to open.
        chat: writes conversations as text, as `chat_writer` makes it; None to refuse them.

    Raises:
        SourceError: if the text cannot be read or lacks a column, or one column is named for both text and labels.
    """
    from datasets import load_dataset, load_dataset_builder

    path, revision = resolve(source.data_set), None
    with _naming(source):
        if path is None:
            revision = load_dataset_builder(source.data_set, source.config, revision=source.revision).hash
            _require_revision(source, revision)
            what: dict[str, Any] = {"path": source.data_set, "name": source.config, "revision": revision}
            rows = load_dataset(**what, split=source.split, streaming=source.streaming)
        else:
            builder, files = _builder(path)
            rows = load_dataset(builder, data_files=files, split="train", streaming=source.streaming)
        columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them before its first row
    if not columns:
        raise SourceError(f"text {source.name!r} holds no document")
    if source.label == source.column:
        raise SourceError(
            f"column {source.column!r} of text {source.name!r} holds the documents; name another tokenize.label_column"
        )
    wanted = [column for column in (source.column, source.label) if column is not None]
    for column in wanted:
        if column not in columns:
            raise SourceError(f"text {source.name!r} has no column {column!r}; it has {', '.join(columns)}")
    return Text(source, revision, rows.select_columns(wanted), chat)


def _require_revision(source: TextSource, cached: str) -> None:
    """Stop if the cache holds another commit than the one asked for, and the hub cannot be reached."""
    if re.fullmatch("[0-9a-f]{40}", source.revision or "") and cached != source.revision:
        raise SourceError(f"text {source.name!r} is only there at revision {cached}, not at {source.revision}")


def _builder(path: Path) -> tuple[str, list[str]]:
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    kinds = {_BUILDERS.get(file.suffix, "text") for file in files}
    if len(kinds) != 1:
        raise SourceError(f"text {str(path)!r} holds files of {len(kinds)} kinds: {', '.join(sorted(kinds)) or 'none'}")
    return kinds.pop(), [str(file) for file in files]


@contextmanager
def _naming(source: TextSource) -> Iterator[None]:
    """Inside the context, turn the errors of `datasets`, which have many types, into one that names the text."""
    try:
        yield
    except LibpruneError:
        raise
    except Exception as error:
        hint = nearest(source.name, [*PRESETS, SELF]) if resolve(source.data_set) is None else ""
        raise SourceError(f"text {source.name!r} cannot be loaded: {cause(error)}{hint}") from error
