"""What users give may be damaged, and the machine may fail: all is used or refused in one line, and nothing is lost."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from bench.faults import FAULTS, faults, possible
from bench.forks import ROOT, ready
from bench.torture import ATTACKS, outcome, place_in, torture


@pytest.fixture(scope="module")
def root(python) -> Path:
    with ready(python) as folder:
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def place(root) -> Path:
    return place_in(root)


@pytest.mark.parametrize("kind", ATTACKS)
def test_no_damage_ends_in_a_traceback_or_never(kind, place):
    _, broken = torture(kind, 5, 1, place)
    assert broken == []


def test_a_traceback_and_a_hang_are_found(monkeypatch):
    monkeypatch.setattr("bench.torture.used", lambda words: 1 / 0)
    assert "ZeroDivisionError: division by zero" in outcome(["params"])
    monkeypatch.setattr("bench.torture.used", lambda words: time.sleep(60))
    assert outcome(["params"], seconds=0.2) == "more than 0.2 s"


def test_what_a_machine_lacks_costs_nothing_that_was_finished(root):
    """Each fault that can be made here, on a stage that writes two files."""
    kinds = possible(list(FAULTS))
    found = faults(root, len(kinds), 0, kinds, ["tokenize"])
    assert [line for _, _, broken in found.values() for line in broken] == []
    assert sum(tried for tried, _, _ in found.values()) == len(kinds)
    assert sum(refused for _, refused, _ in found.values()) > 0


def test_killed_runs_go_on_with_no_help_to_the_same_bytes(python):
    """DVC, its stage and their group are hit while `dvc repro prepare` runs."""
    words = ["--kills", "1", "--target", "prepare", "--python", str(python), "--latest", "0.6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "bench.interrupts", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 broken" in done.stdout
