"""The command line of a stage: its help, its summary, and errors in one line."""

import errno
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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "error: /a/b: No space left on device. What was fini",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "error: /a/b: Permission denied. What was finished",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "error: /a/b: Not a directory"),
        (MemoryError(), "error: not enough memory (no more could be had); lower compute.batch_tokens"),
        (ArtifactError("\x1b[31mred\n"), "error: \\x1b[31mred"),
        (KeyboardInterrupt(), "stopped; what was finished is kept, unfinished work is saved in .work"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as end, stage.user_errors():
        raise error
    assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), OSError("no number"), BrokenPipeError(errno.EPIPE, "x")]
)
def test_a_defect_of_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)), stage.user_errors():
        raise error


def test_where_an_error_arose_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(stage.TRACEBACK, "1")
    with pytest.raises(ArtifactError), stage.user_errors():
        raise ArtifactError("gone")
