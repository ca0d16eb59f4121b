"""What users give may be damaged in any way: it is used, or refused in one line, and soon."""

import pytest

from bench.torture import ATTACKS, at_most, outcome, project, torture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return project(tmp_path_factory.mktemp("torture"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ATTACKS)
def test_no_damage_ends_in_a_traceback_or_never(kind, place):
    tried, broken = torture(kind, 15, 1, place)
    assert tried == 15
    assert broken == []


def test_a_traceback_and_a_hang_are_found(monkeypatch, place):
    monkeypatch.setattr("libprune.pipeline.params.load_params", lambda path: 1 / 0)
    assert outcome(["params"]) == "ZeroDivisionError: division by zero"
    with pytest.raises(TimeoutError), at_most(1):
        while True:
            pass
