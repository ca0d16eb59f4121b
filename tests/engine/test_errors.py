"""The help in messages: nearest names, what a table holds, what other libraries say, and what the machine lacks."""

import errno
import os

import pytest

from libprune.engine import errors
from libprune.engine.errors import (
    ArtifactError,
    LibpruneError,
    MeansError,
    SourceError,
    cause,
    lacking,
    missing_key,
    naming,
    nearest,
)


def test_every_error_that_users_cause_is_one_kind():
    kinds = [kind for kind in vars(errors).values() if getattr(kind, "__module__", "") == errors.__name__]
    kinds = [kind for kind in kinds if isinstance(kind, type)]
    assert len(kinds) > 5
    assert all(issubclass(kind, LibpruneError) and issubclass(kind, ValueError) for kind in kinds)


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("kw", ["kv", "model"], "; did you mean 'kv'?"),
        ("layer", ["layers", "layer0"], "; did you mean 'layers' or 'layer0'?"),
        ("esed", ["nested", "seed"], "; did you mean 'seed' or 'nested'?"),
        ("xyz", ["kv", "model"], ""),
        ("kv", [], ""),
    ],
)
def test_the_nearest_names_end_a_message(word, known, said):
    assert nearest(word, known) == said


def test_a_missing_name_is_told_with_the_count_and_the_first_names():
    said = missing_key("taylr", ["taylor", "wanda", "obs", "fisher"], "the table")
    assert said == (
        "the table has no entry 'taylr'; it holds 4 entries (first: taylor, wanda, obs); did you mean 'taylor'?"
    )
    assert missing_key("a", [], "the file") == "the file has no entry 'a'; it holds 0 entries (first: none)"


def raised(inner: BaseException, outer: BaseException, explicit: bool = True) -> BaseException:
    """An error raised from another, or while another was handled."""
    outer.__cause__ = inner if explicit else None
    outer.__context__ = inner
    outer.__suppress_context__ = explicit
    return outer


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("a\nb"), "KeyError: 'a\\nb'"),
        (ValueError(" first\n second line"), "first second line"),
        (OSError(), "OSError"),
        (ValueError("word"), "ValueError: word"),
        (raised(ValueError("byte 3 is wrong"), OSError("It failed.")), "It failed: byte 3 is wrong"),
        (raised(ValueError("byte 3 is wrong"), OSError("It failed."), explicit=False), "It failed: byte 3 is wrong"),
        (raised(ValueError("byte 3 is wrong"), OSError("It failed: byte 3 is wrong")), "It failed: byte 3 is wrong"),
        (raised(ImportError("needs SentencePiece"), ValueError("no tokenizer here")),
         "no tokenizer here: ImportError: needs SentencePiece; it needs a package: pip install sentencepiece"),
    ],
)  # fmt: skip
def test_of_another_librarys_error_the_innermost_cause_is_told(error, line):
    assert cause(error) == line


def test_a_long_message_is_cut_and_a_circle_of_causes_ends():
    assert len(cause(ValueError("long " * 1000))) < 500
    first, second = ValueError("the first one"), ValueError("the second one")
    first.__cause__, second.__cause__ = second, first
    assert cause(first) == "the first one: the second one"


def test_what_another_library_raises_is_one_error_that_names_the_file():
    with (
        pytest.raises(SourceError, match=r"^a\.bin cannot be read: ZeroDivisionError: by zero$"),
        naming("a.bin cannot be read"),
    ):
        raise ZeroDivisionError("by zero")
    with pytest.raises(ArtifactError, match="as it is"), naming("a.bin"):
        raise ArtifactError("as it is")
    with pytest.raises(KeyboardInterrupt), naming("a.bin"):
        raise KeyboardInterrupt


def test_a_panic_of_rust_is_an_error_too():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SourceError, match=r"a\.bin: PanicException: index out of range"), naming("a.bin"):
        raise panic("index out of range")


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "/a/b: No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (raised(PermissionError(errno.EACCES, "denied", "/a"), RuntimeError("failed")), "/a: Permission denied"),
        (MemoryError(), "not enough memory (no more could be had); lower compute.batch_tokens, or free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory (Def"),
        (RuntimeError("can't start new thread"), "no more threads or processes can be started"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit by `ulimit -n`"),
        (RuntimeError("no file <a> opened: Too many open files (24)"), "Too many open files; raise the limit"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_told_apart(error, lacks):
    found = lacking(error)
    assert found is not None
    assert found.startswith(lacks)
    with pytest.raises(MeansError, match="the file: "), naming("the file"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no number"),
        FileNotFoundError(errno.ENOENT, "gone", "/a"),
        KeyError("x"),
        ValueError("a tensor of the size (12)"),
    ],
)
def test_other_errors_are_not_for_want_of_means(error):
    assert lacking(error) is None
