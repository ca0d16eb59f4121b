"""Faults of a params file: each told once, in its line, with what the key takes instead."""

import re
from decimal import Decimal
from functools import partial

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libprune.engine.errors import ParamsError
from libprune.pipeline.faults import MOST, numbers_in, written
from libprune.pipeline.params import PRESETS, load_params
from tests.support.params import PLACES, SHIPPED, shipped

QUIET = partial(settings, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAVES = [place for place in PLACES if len(place) == 2 and not isinstance(shipped()[place[0]][place[1]], dict)]


def line_of(place: tuple[str, ...]) -> int:
    """The line of a key in the shipped file, from 1."""
    lines = SHIPPED.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{place[0]}:"))
    if len(place) == 1:
        return start + 1
    return next(n for n, line in enumerate(lines) if n > start and line.startswith(f"  {place[1]}:")) + 1


def written_in(place: tuple[str, ...], text: str) -> str:
    """The shipped file with other text behind a key."""
    lines = SHIPPED.read_text().splitlines()
    number = line_of(place) - 1
    lines[number] = f"{lines[number].partition(':')[0]}: {text}"
    return "\n".join(lines) + "\n"


@pytest.fixture
def faults(tmp_path):
    """The faults of a text, without the name of the file."""

    def of(text: str) -> list[str]:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        try:
            load_params(path)
        except ParamsError as error:
            assert str(error) == "; ".join(error.faults)
            return [fault.removeprefix(f"{path}, ") for fault in error.faults]
        return []

    return of


def test_a_text_that_would_be_read_as_a_number_is_written_in_quotes():
    assert written(["0", "null", "a", "it's"]) == "['0', 'null', a, it's]"


ODD = ["30%", "0,3", "1e-3", "20", "'0.3'", "1/3", "1,000", "2.0", "no", "None", "a, b", "Auto", "[1]", "{a: 1}", "-1"]
ODD += ["x", "10k", "1e400", "''", "~", "true", "0", "1e-30"]


@QUIET(max_examples=100)
@given(st.sampled_from(LEAVES), st.sampled_from(ODD))
def test_a_fault_is_told_once_in_its_line_and_what_it_says_to_write_is_taken(faults, place, text):
    found = faults(written_in(place, text))
    own = [fault for fault in found if ".".join(place) in fault]
    assert len(own) == len(found) <= 2, found  # two: of settings that need one another
    for fault in own:
        if hint := re.search(r"; write (.*?)( for .*| without quotes| \(.*\))?$", fault):
            assert fault.startswith(f"line {line_of(place)}: {'.'.join(place)}: ")
            assert f"{'.'.join(place)}: expected" not in "".join(faults(written_in(place, hint[1])))


@QUIET(max_examples=60)
@given(st.decimals("0.01", "0.99", places=2), st.data())
def test_a_share_is_understood_however_people_write_it(faults, share, data):
    forms = [f"{100 * share:g}%", f"{100 * share:g} %", str(share).replace(".", ","), f"{share:.2e}".replace(".", ""),
             f"'{share}'", f"{100 * share:g}"]  # fmt: skip
    form = data.draw(st.sampled_from(forms[:3] + forms[4:]))
    place = data.draw(st.sampled_from([("allocate", "ratio"), ("tokenize", "evaluation_share")]))
    (fault,) = faults(written_in(place, form)) or [f"line {line_of(place)}: {'.'.join(place)}: ; write {share}"]
    assert fault.startswith(f"line {line_of(place)}: {'.'.join(place)}: ")
    said = re.search(r"; write (\S+)", fault)
    assert (said and Decimal(said[1]) == share) or form == "1"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1e-3", [0.001]),
        ("30 %", [0.3]),
        ("7%", [0.07]),
        ("0,3", [0.3]),
        (",5", [0.5]),
        ("1,000", [1000, 1, 1.0]),
        ("1 024", [1024, 1024.0]),
        ("4k", [4000, 4000.0]),
        ("1/3", [0.333333]),
        ("128 tokens", []),
        ("1.2.3", []),
        ("1/0", []),
        ("", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, numbers):
    assert list(numbers_in(text)) == numbers


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none()))
def test_what_is_to_be_written_is_read_again(value):
    again = yaml.safe_load(written(value))
    assert again == value and type(again) is type(value)


@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 3), st.sampled_from("xyz"))
@QUIET(max_examples=30)
def test_a_misspelled_preset_is_one_fault(faults, preset, at, letter):
    (fault,) = faults(written_in(("preset",), preset[:at] + letter + preset[at + 1 :]))
    assert fault.startswith(f"line {line_of(('preset',))}: preset: expected fast, balanced, best, hgsp")


@pytest.mark.parametrize("place", [("prepare",), ("tokenize",), ("prepare", "model"), ("tokenize", "text")])
def test_a_key_that_is_misspelled_is_not_missing_too(faults, place):
    lines = SHIPPED.read_text().splitlines()
    number = line_of(place) - 1
    lines[number] = lines[number].replace(place[-1], place[-1][:-1] + "x", 1)
    (fault,) = faults("\n".join(lines))
    assert re.match(rf"line {number + 1}: unknown key '\S+'; did you mean '{place[-1]}'\?", fault)


def test_a_key_of_another_section_is_told_where_it_belongs(faults):
    (fault,) = faults(SHIPPED.read_text().replace("  ratio: 0.2", "  ratio: 0.2\n  criterion: taylor"))
    assert "unknown key 'allocate.criterion'; it is a key of score" in fault


def test_a_comma_in_a_list_of_keys_is_told(faults):
    (fault,) = faults(SHIPPED.read_text().replace("weight_stats: {l2: 0.3", "weight_stats: {l2: 0,3"))
    assert "score.weight_stats: 3 is no key; write decimals with a point" in fault


def test_settings_that_do_not_go_together_are_all_told_each_in_its_line(faults):
    text = written_in(("slice", "drift"), "0.5").replace("producer_steps: auto", "producer_steps: 3")
    text = text.replace("collapse_below: 0.0", "collapse_below: 0.2").replace("hidden_states: 0.0", "hidden_states: 1")
    text = text.replace("top_k: null", "top_k: 3").replace("teacher: null", "teacher: ./other")
    assert [fault.partition(":")[0] for fault in faults(text)] == [
        f"line {line_of(('recover', 'hidden_states'))}",
        f"line {line_of(('recover', 'hidden_states'))}",
    ]
    text = text.replace("hidden_states: 1", "hidden_states: 0")
    places = [("allocate", "collapse_below")] * 2 + [("slice", "drift"), ("slice", "producer_steps")]
    assert [fault.partition(":")[0] for fault in faults(text)] == [f"line {line_of(place)}" for place in places]


def test_a_file_of_faults_is_not_told_without_end(faults):
    found = faults(SHIPPED.read_text() + "".join(f"key{n}: 1\n" for n in range(300)))
    assert len(found) == MOST + 1 and found[-1].endswith("and 200 more faults")


def test_no_secret_of_an_address_is_told(faults):
    text = written_in(("allocate", "method"), "https://me:secret@host/x")
    assert "secret" not in "".join(faults(text))
