"""Running a comparison, as far as no DVC runs: names, arguments, reasons, times left, and the workspace put back."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from dvc.utils.hydra import apply_overrides, to_hydra_overrides
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.engine.yaml_file import read_yaml
from libprune.experiments.runs import (
    duration,
    find_experiment,
    missing_runs,
    overrides,
    reason_of,
    remaining,
    run_experiment,
    workspace_kept,
)
from tests.support.compared import comparison, experiment

words = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=8)
plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), words,
    st.lists(words, max_size=3),
)  # fmt: skip
mappings = st.dictionaries(st.sampled_from(["text", "share", "evaluation_split"]), plain_values)


@given(plain_values | st.lists(mappings, max_size=2))
def test_dvc_reads_every_value_as_it_was_meant(value):
    (read,) = to_hydra_overrides(overrides("score.criterion", value, present=True))
    assert read.key_or_group == "score.criterion"
    assert read.value() == value
    assert not read.is_force_add()


def test_a_param_that_the_file_lacks_is_added():
    (read,) = to_hydra_overrides(overrides("score.new", 1, present=False))
    assert read.is_force_add()
    assert (read.key_or_group, read.value()) == ("score.new", 1)


@pytest.mark.parametrize("there", ["", "vocabulary: null", "vocabulary: {text: a, keep: [b]}"])
@pytest.mark.parametrize("value", [{"text": "it's", "minimum": 2, "keep": ["é", "a, b"]}, None, {}])
def test_dvc_writes_a_mapping_in_the_place_of_what_the_file_has(tmp_path, there, value):
    """A setting with one passed all checks, and then DVC could not read it."""
    path = tmp_path / "params.yaml"
    path.write_text(f"prepare:\n  model: m\n  {there}\n")
    apply_overrides(path, overrides("prepare.vocabulary", value, present=there == "vocabulary: null"))
    assert read_yaml(path)["prepare"] == {"model": "m", "vocabulary": value}


def test_what_has_results_under_any_name_is_not_run_again(tmp_path):
    made = comparison(tmp_path)
    runs = list(made.runs())
    there = replace(experiment(runs[2], 1.3), names=("some-name",))
    assert missing_runs(made, [there], {}) == [run for run in runs if run is not runs[2]]
    assert find_experiment(runs[2], [there]) is there
    assert missing_runs(made, [experiment(run, 1.3) for run in runs], {}) == []
    assert missing_runs(made, [replace(there, revision="workspace")], {}) == runs


def test_of_several_results_of_the_same_params_the_last_counts_and_not_the_best(tmp_path):
    run = next(comparison(tmp_path).runs())
    best = replace(experiment(run, 1.2), made="2026-11-22T11:39:20")
    last = replace(experiment(run, 1.3), made="2026-11-23T08:00:00")
    here = replace(experiment(run, 1.25), revision="workspace")
    assert find_experiment(run, [best, here, last]) is last
    assert find_experiment(run, [here]) is here


def test_a_name_that_other_params_have_is_refused_with_the_difference(tmp_path):
    made = comparison(tmp_path)
    run = next(made.runs())
    other = replace(experiment(run, 1.3), params={**run.leaves, "allocate.ratio": 0.5})
    with pytest.raises(LibpruneError, match=r"made-up-fisher-s0 \(with allocate.ratio 0.5, not 0.2\).*dvc exp remove"):
        missing_runs(made, [other], {})


@pytest.mark.parametrize("reason", ["queued", "running", "no results in metrics/evaluation.json"])
def test_a_name_without_results_is_refused_and_a_failed_one_is_run_again(tmp_path, reason):
    made = comparison(tmp_path)
    with pytest.raises(LibpruneError, match=reason):
        missing_runs(made, [], {"made-up-plain-s1": reason})
    assert len(missing_runs(made, [], {"made-up-plain-s1": "failed"})) == 6


def test_the_time_left_is_what_each_setting_took_with_an_earlier_seed(tmp_path):
    runs = list(comparison(tmp_path).runs())
    assert remaining(runs[:1], runs[1:2], [100.0]) == 100.0
    assert remaining(runs[:2], runs[2:], [100.0, 10.0]) == 2 * (100 + 10)
    assert remaining(runs[:3], runs[3:], [100.0, 10.0, 60.0]) == 10 + 60 + 10


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (119.4, "119 s"), (150.0, "2 min"), (7200.0, "2.0 h")])
def test_times_are_said_in_a_unit_that_suits(seconds, text):
    assert duration(seconds) == text


def test_the_reason_is_the_stages_own_error_before_dvcs():
    log = "Running stage 'score':\nerror: no such criterion\nERROR: failed to reproduce 'score': exit 1\n"
    assert reason_of(log, 255) == "no such criterion"
    assert reason_of(log.replace("error: ", ""), 255).startswith("failed to reproduce")
    assert reason_of("", -9) == "DVC ended with -9"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("preset: best\n")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/slice.json").write_text("{}")
    (tmp_path / "metrics/learning_curve.csv").write_text("step\n")
    return tmp_path


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, LibpruneError])
def test_params_lock_and_metrics_are_put_back_however_it_ends(folder, ends):
    before, said = contents(folder), []
    try:
        with workspace_kept(said.append):
            (folder / "params.yaml").write_text("preset: fast\n")
            (folder / "dvc.lock").write_text("stages: {}\n")
            (folder / "metrics/slice.json").unlink()
            (folder / "metrics/learning_curve.csv").write_text("step\n1\n")
            (folder / "metrics/evaluation.json").write_text("{}")
            if ends is not None:
                raise ends
    except (KeyboardInterrupt, LibpruneError) as error:
        assert type(error) is ends
    assert contents(folder) == before
    assert said == []


def run_signalled(folder, program: str, sign: signal.Signals, monkeypatch) -> subprocess.CompletedProcess[str]:
    """Run a program, whose function `signalled` sends it a signal when DVC, or what is in its place, is ready."""
    before = (
        "import os, signal, threading, time\n"
        "from pathlib import Path\n"
        "from libprune.experiments.runs import run_experiment, workspace_kept\n"
        "def signalled():\n"
        "    while not Path('ready').exists(): time.sleep(0.01)\n"
        f"    os.kill(os.getpid(), {int(sign)})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{':'.join(sys.path)}")
    command = [sys.executable, "-c", before + program]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_what_ends_a_program_ends_dvc_and_puts_the_workspace_back(folder, monkeypatch, sign):
    """In the place of DVC a program that changes the params, and says when it is interrupted.

    The program that starts it ignores interrupts, as a job in the background does.
    """
    before = contents(folder)
    (folder / "dvc.py").write_text(
        "import time\n"
        "open('params.yaml', 'w').write('changed')\n"
        "open('ready', 'w').close()\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: open('ended', 'w').close()\n"
    )
    program = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"signal.signal({int(sign)}, signal.SIG_DFL)\n"
        "threading.Thread(target=signalled).start()\n"
        "try:\n"
        "    with workspace_kept(print): run_experiment('a', [], Path('logs/a.txt'))\n"
        "except KeyboardInterrupt: print(Path('ended').exists())\n"
    )
    done = run_signalled(folder, program, sign, monkeypatch)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
    assert {path: contents(folder)[path] for path in before} == before


def test_artifacts_that_cannot_be_put_back_are_said(folder):
    """There is a dvc.lock, but no repository."""
    (folder / "dvc.lock").write_text("stages: {}\n")
    said = []
    with workspace_kept(said.append):
        pass
    assert len(said) == 1
    assert "not all artifacts" in said[0]


def test_where_stages_have_never_run_the_artifacts_of_those_that_have_are_put_back(folder):
    """In the place of DVC a program that refuses what has never run, as DVC does."""
    (folder / "dvc.py").write_text("import sys\nraise SystemExit(sys.argv[1:] != ['checkout', 'one', 'two'])\n")
    (folder / "dvc.lock").write_text("stages: {one: {}, two: {}}\n")
    said = []
    with workspace_kept(said.append):
        pass
    assert said == []


def test_an_interrupt_ends_dvc_once_and_waits_for_it(folder, monkeypatch):
    """In the place of DVC a program that says when it is interrupted, and how often."""
    (folder / "dvc.py").write_text(
        "import json, os, signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "open('ready', 'w').close()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "json.dump(len(seen), open('seen', 'w'))\n"
    )
    program = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in jobs that run in the background
        "threading.Thread(target=signalled).start()\n"
        "try:\n"
        "    run_experiment('a', [], Path('logs/a.txt'))\n"
        "except KeyboardInterrupt:\n"
        "    print(Path('seen').read_text())\n"
    )
    done = run_signalled(folder, program, signal.SIGINT, monkeypatch)
    assert (json.loads(done.stdout), done.returncode) == (1, 0), done.stderr


def test_without_dvc_the_error_says_so(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    with pytest.raises(LibpruneError, match=r"DVC cannot be run .* pip install dvc"):
        run_experiment("a", [], folder / "logs/a.txt")
