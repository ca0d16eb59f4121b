"""Errors that a user can cause, and the help that goes into their messages."""

from collections.abc import Iterable
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
    """params.yaml holds an unknown key or a value out of range."""


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


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known words nearest to `word`, as the end of a message: ``; did you mean 'kv'?``."""
    matches = get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def missing_key(key: str, known: Iterable[str], where: str) -> str:
    """The message for a name that is looked up and not there: the count, the first names, the nearest."""
    names = list(known)
    first = ", ".join(names[:3]) or "none"
    return f"{where} has no entry {key!r}; it holds {len(names)} entries (first: {first}){nearest(key, names)}"


def first_line(error: Exception) -> str:
    """The first line of what another library's error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
