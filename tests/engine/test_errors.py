"""The help in messages: nearest names, what a table holds, and the first line of what other libraries say."""

import pytest

from libprune.engine import errors
from libprune.engine.errors import LibpruneError, first_line, missing_key, nearest


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


@pytest.mark.parametrize(
    ("error", "line"), [(KeyError("a\nb"), "'a\\nb'"), (ValueError(" first\nsecond"), "first"), (OSError(), "OSError")]
)
def test_the_first_line_of_an_error_or_its_kind(error, line):
    assert first_line(error) == line
