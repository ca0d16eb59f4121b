"""Errors that a user can cause, and the help that goes into their messages."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LibpruneError(ValueError):
    """The user's input cannot be used. The message says what was found, where, and what to do."""


class NotationError(LibpruneError):
    """An axis expression cannot be read or evaluated."""


class FamilyError(LibpruneError):
    """A model or a config is not, or not wholly, described by a family file."""


class NotExpressibleError(LibpruneError):
    """A shape of the pruned model cannot be written in the config of its family."""


class ParamsError(LibpruneError):
    """params.yaml holds an unknown key, a value out of range, or what cannot be carried out.

    Attributes:
        faults: every fault in a sentence of its own, if there are several.
    """

    def __init__(self, message: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults or (message,)


class ArtifactError(LibpruneError):
    """An artifact is missing, damaged, or was made from another model or text."""


class SourceError(LibpruneError):
    """A model or text source cannot be read, or holds too little."""


class StatisticsError(LibpruneError):
    """A collected statistic is not finite, or has no entry for a name."""


class BudgetError(LibpruneError):
    """The requested share cannot be removed under the given floors and shapes."""


class NetworkError(LibpruneError):
    """A network cannot be built as asked, or cannot run on what it is given."""


class ExportError(LibpruneError):
    """A model cannot be written for another program, or that program computes something else."""


class ProjectError(LibpruneError):
    """A project cannot be made or run: its folder is taken, or git or DVC refuse."""


class MeansError(LibpruneError):
    """The machine has not what a step needs: space, permission, memory, threads. Nothing finished is lost by it."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known words nearest to `word`, as the end of a message: ``; did you mean 'kv'?``.

    Those of the same letters in another order come first.
    """
    words = list(known)
    turned = [one for one in words if sorted(one) == sorted(word)]
    matches = list(dict.fromkeys([*turned, *get_close_matches(word, words, n=count, cutoff=0.5)]))[:count]
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def missing_key(key: str, known: Iterable[str], where: str) -> str:
    """The message for a name that is looked up and not there: the count, the first names, the nearest."""
    names = list(known)
    first = ", ".join(names[:3]) or "none"
    return f"{where} has no entry {key!r}; it holds {len(names)} entries (first: {first}){nearest(key, names)}"


_LONGEST = 400
"""Characters of a message of another library that are shown."""
_PACKAGES = ("sentencepiece", "protobuf", "tiktoken", "blobfile")
"""Packages that transformers asks for by their names."""
_ERRNO = re.compile(r"(?:os error |\[Errno |(\w[\w ]+) \()(\d{1,3})\b")
_NO_MEMORY = re.compile(r"(?:can't|cannot|unable to) allocate|out of memory|bad_alloc|std::length_error", re.IGNORECASE)
_NO_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable|pthread_create", re.IGNORECASE)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cause(error: BaseException) -> str:
    """What another library's error says, on one line: the innermost cause, after what the outermost makes of it.

    The innermost has the place (a byte, a line, a key); what the outermost says alone is often that something failed.
    """
    chain = _chain(error)
    outer, inner = _said(chain[0]), _said(chain[-1])
    needed = " ".join(str(e).lower() for e in chain if isinstance(e, ImportError))
    known = next((word for word in _PACKAGES if word in needed), None)
    missing = f"; it needs a package: pip install {known}" if known else ""
    return (outer if inner in outer else f"{outer.rstrip('.')}: {inner}") + missing


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the innermost last."""
    chain = [error]
    while True:
        last = chain[-1]
        inner = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if inner is None or inner in chain:
            return chain
        chain.append(inner)


def _said(error: BaseException) -> str:
    text, kind = " ".join(str(error).split()), type(error).__name__
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    plain = isinstance(error, ValueError | OSError | RuntimeError) and " " in text
    return text if plain else f"{kind}: {text}" if text else kind


@contextmanager
def naming(what: str, kind: type[LibpruneError] = SourceError) -> Iterator[None]:
    """Inside the context, turn whatever another library raises into one error that says what failed, and why.

    It belongs around calls of libraries that read what users give: they raise types of their own, and panics.

    Args:
        what: the beginning of the message, such as ``model.safetensors cannot be read``.
        kind: the error to raise. What the machine lacks is a `MeansError` instead.
    """
    try:
        yield
    except LibpruneError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        if (lacks := lacking(error)) is not None:
            raise MeansError(f"{what}: {lacks}") from error
        raise kind(f"{what}: {cause(error)}") from error


def lacking(error: BaseException) -> str | None:
    """What the machine lacks, if that is what an error comes from: space, permission, memory or threads; else None."""
    for inner in reversed(_chain(error)):
        text, number = " ".join(str(inner).split()), getattr(inner, "errno", None)
        numbers = (int(code) for said, code in _ERRNO.findall(text) if said in {"", os.strerror(int(code))})
        number = number or next(numbers, None)
        named = getattr(inner, "filename", None)
        where = f"{named}: " if named is not None and not isinstance(named, int) else ""
        if number in _NO_SPACE:
            return f"{where}{os.strerror(number)}"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{where}{os.strerror(number)}"
        if number == errno.EIO:
            return f"{where}{os.strerror(number)}; look after the disk"
        if number in (errno.EMFILE, errno.ENFILE):
            return f"{where}{os.strerror(number)}; raise the limit by `ulimit -n`"
        if number == errno.ENOMEM or isinstance(inner, MemoryError) or _NO_MEMORY.search(text):
            asked = text[:_LONGEST] or "no more could be had"
            return f"not enough memory ({asked}); lower compute.batch_tokens, or free some"
        if number == errno.EAGAIN or _NO_THREADS.search(text):
            return "no more threads or processes can be started; set OMP_NUM_THREADS lower, or raise `ulimit -u`"
    return None


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text whose control characters, but for line ends and tabs, are shown by their numbers.

    Names and texts from elsewhere could otherwise move the cursor, change the title or write to the clipboard of a
    terminal, or turn the direction of what follows.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
