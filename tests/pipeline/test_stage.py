"""The command line of a stage: its help, its summary, and errors in one line."""

import os

import psutil
import pytest
import typer
from typer.testing import CliRunner

from libprune.engine.errors import ArtifactError
from libprune.pipeline import stage


def main(artifacts: stage.Root = stage.ROOT, number: int = 1) -> None:
    """Divide one by a number."""
    if artifacts != stage.ROOT:
        raise ArtifactError(f"{artifacts} is\n  not there")
    typer.echo(f"{1 / number}")


@pytest.fixture
def run(monkeypatch):
    """Runs the command as no stage of DVC; the settings of libraries are undone afterwards."""
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_MININTERVAL"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return lambda *words: CliRunner().invoke(stage.app(main), words)


def test_the_help_is_the_docstring_of_the_stage(run):
    assert "Divide one by a number." in run("--help").output


def test_a_stage_ends_with_its_name_time_and_memory(run):
    done = run()
    printed, summary = done.stdout.splitlines()
    assert (done.exit_code, printed) == (0, "1.0")
    name, _, rest = summary.partition(": ")
    assert name == __name__.rpartition(".")[2]
    assert " s, peak memory " in rest
    assert rest.endswith(" MB")


def test_of_several_processes_only_the_first_says_how_long_it_took(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not stage.first_process()
    assert run().stdout == "1.0\n"


def test_an_error_that_the_user_can_mend_is_one_line_and_another_is_raised(run):
    done = run("--artifacts", "nowhere")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "error: nowhere is not there\n")
    assert isinstance(run("--number", "0").exception, ZeroDivisionError)


def test_the_peak_memory_is_in_bytes_and_no_less_than_what_is_held_now():
    held = psutil.Process().memory_info().rss
    assert 0.99 * held <= stage.peak_memory() <= psutil.virtual_memory().total
