"""Local text files: which files a path names, and the rows that each holds, read as its ending says.

They are read here and not by `datasets`, which takes brackets in a path for a pattern, an unknown file for prose, and
what it has read before for what the file holds now.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from libprune.engine.errors import LibpruneError, SourceError, cause
from libprune.models.given import is_pointer

Row = dict[str, Any]
"""The values of a document by column."""


LONGEST = 1 << 24
"""The most characters of a document. A file of a few kilobytes may unpack to one that the memory cannot hold."""
_WHOLE = 1 << 28
"""The most characters of a file that is read at once."""


def _bounded(file: io.TextIOBase) -> Iterator[str]:
    """The lines of a file, each with its end.

    Raises:
        ValueError: if one is too long, of which no more than `LONGEST` characters are read.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST:,} characters; cut it into several lines")
        yield line


def _lines(file: io.TextIOBase) -> Iterator[Row]:
    for line in _bounded(file):
        yield {"text": line.rstrip("\n")}


def _json_lines(file: io.TextIOBase) -> Iterator[Row]:
    for number, line in enumerate(_bounded(file), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
            yield _object(value, f"line {number}")


def _json(file: io.TextIOBase) -> Iterator[Row]:
    """One list of objects, or objects one after the other."""
    text, end = file.read(_WHOLE + 1), 0
    if len(text) > _WHOLE:
        raise ValueError(f"it has more than {_WHOLE:,} characters; write one object a line, as .jsonl")
    decoder, number = json.JSONDecoder(), 0
    while (end := _SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr] # it matches anywhere
        value, end = decoder.raw_decode(text, end)
        for row in value if isinstance(value, list) else [value]:
            number += 1
            yield _object(row, f"entry {number}")


_SPACE = re.compile(r"\s*")


def _object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not an object with columns")
    return value


def _table(file: io.TextIOBase, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    rows = csv.reader(_bounded(file), delimiter=delimiter, strict=True)
    names = next(rows, [])
    for row in rows:
        if row and len(row) != len(names):
            raise ValueError(f"line {rows.line_num} has {len(row)} fields, the first line {len(names)}")
        if row:
            yield dict(zip(names, row, strict=True))


def _commas(file: io.TextIOBase) -> Iterator[Row]:
    return _table(file, ",")


def _tabs(file: io.TextIOBase) -> Iterator[Row]:
    return _table(file, "\t")


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[io.TextIOBase], Iterator[Row]]]] = {
    "text": ((".txt", ".text", ".cor", ".raw", ".tokens"), _lines),
    "json lines": ((".jsonl", ".ndjson"), _json_lines),
    "json": ((".json",), _json),
    "csv": ((".csv",), _commas),
    "tsv": ((".tsv",), _tabs),
}
_PARQUET = "parquet"
_ENDINGS = {ending: kind for kind, (endings, _) in _KINDS.items() for ending in endings} | {".parquet": _PARQUET}


def _zstd(path: Path) -> Any:
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
KNOWN = f"{', '.join(_ENDINGS)}; all but .parquet also with {', '.join(_OPENERS)}"
"""The endings of files that are read."""
_ABOUT = re.compile(r"(readme|licen[cs]e|citation)(?![a-z])", re.IGNORECASE)
"""The first word of the names of files that tell about a text."""


def text_files(path: Path) -> list[Path]:
    """The files of a text: the file itself, or those of a folder in the order of their names.

    In a folder hidden files and those that tell about the text (`README`, `LICENSE`, `CITATION`) are left out.

    Raises:
        SourceError: if a file has no known ending, or the folder holds none, files of several kinds, or folders.
    """
    if not path.is_dir():
        _kind(path)
        return [path]
    inside = sorted(one for one in path.iterdir() if not one.name.startswith(".") and not _tells_about(one))
    folders = [one.name for one in inside if one.is_dir()]
    if folders:
        raise SourceError(f"{path} holds folders ({_first(folders)}); name one of them, or a file")
    kinds = sorted({_kind(one) for one in inside})
    if len(kinds) != 1:
        raise SourceError(f"{path} holds files of {len(kinds)} kinds: {', '.join(kinds) or 'none'}; known: {KNOWN}")
    return inside


def _tells_about(path: Path) -> bool:
    return _ABOUT.match(path.name) is not None and path.suffix.lower() in {"", ".md", ".rst", ".txt", ".cff"}


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def _kind(path: Path) -> str:
    """The kind of a text file, by its ending.

    Raises:
        SourceError: if the ending is not known, or the path is that of something else than a file.
    """
    if not path.is_file():
        raise SourceError(f"{path} is no file, or a link to nothing; remove it")
    ending = _ending(path)
    packed = path.suffix.lower() in _OPENERS
    if ending not in _ENDINGS or (packed and _ENDINGS[ending] == _PARQUET):
        raise SourceError(
            f"{path} has no ending that is known as one of a text; known: {KNOWN}; rename it, or make a link to it "
            "whose name tells what it holds"
        )
    return _ENDINGS[ending]


def _ending(path: Path) -> str:
    """The ending of the file's name, without that of its compression."""
    name = path.name.lower()
    return Path(name.removesuffix(path.suffix.lower()) if path.suffix.lower() in _OPENERS else name).suffix


def read_rows(files: Sequence[str]) -> Iterator[Row]:
    """The rows of text files, one after another, none of them before it is asked for.

    Args:
        files: paths, as `text_files` finds them. `datasets` shuffles a list of this type.

    Raises:
        SourceError: if a file cannot be read; the message names it, and where the line.
    """
    for name in files:
        try:
            yield from _rows(Path(name))
        except LibpruneError:
            raise
        except Exception as error:  # each library has types of its own
            hint = "; files are read as UTF-8" if isinstance(error, UnicodeError) else ""
            raise SourceError(f"{name} cannot be read as {_kind(Path(name))}: {cause(error)}{hint}") from error


def _rows(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    if is_pointer(path):
        raise SourceError(f"{path} is not the text but its pointer in Git LFS; run git lfs pull")
    if kind == _PARQUET:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        return
    opened = _OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))(path)
    with opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="" if kind in {"csv", "tsv"} else None) as file:
        yield from _KINDS[kind][1](file)
