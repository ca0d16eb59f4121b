"""What can be freed is told first, and only what is named goes."""

import os
import subprocess
import sys
import tempfile

import pytest
from typer.testing import CliRunner

from libprune.cli.cleaning import clean, stocks
from libprune.cli.main import app
from libprune.engine.errors import LibpruneError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with 3 MB of unfinished work, and 2 MB in the cache of data sets."""
    for name, size in ((".work/gradients/a.safetensors", 3_000_000), ("cache/text/b.arrow", 2_000_000)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))  # where no other test leaves files
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_name_it_is_only_told(project):
    done = CliRunner().invoke(app, ["clean"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["leftovers", "0.0", "MB"],
        ["work", "3.0", "MB"],
        ["datasets", "2.0", "MB"],
        ["dvc", "0.0", "MB"],
    ]
    assert lines[4].startswith("nothing was removed")
    assert (project / ".work/gradients/a.safetensors").exists()


def test_what_is_named_goes_and_the_rest_stays(project):
    assert list(clean(project, ["work"]))[-1] == "freed work: 3.0 MB"
    assert not list((project / ".work").iterdir())
    assert (project / "cache/text/b.arrow").exists()
    assert list(clean(project, ["datasets"]))[-1] == "freed datasets: 2.0 MB"
    assert [stock.size for stock in stocks(project)] == [0, 0, 0, 0]


def test_an_unknown_name_is_refused_with_the_known_ones(project):
    with pytest.raises(LibpruneError, match="'wrok' is nothing to clean; name some of leftovers, work, datasets, dvc"):
        list(clean(project, ["wrok"]))


def test_nothing_goes_while_a_stage_runs(project):
    named = os.environ | {"DVC_STAGE": "slice", "DVC_ROOT": str(project)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], env=named, **pipes) as stage:
        stage.stdout.readline()
        with pytest.raises(LibpruneError, match=f"runs here \\(process {stage.pid}\\)"):
            list(clean(project, ["work"]))
        stage.communicate(b"\n")
    assert (project / ".work/gradients/a.safetensors").exists()


def test_a_lock_that_a_kill_left_empty_is_mended(project):
    (project / ".dvc/tmp").mkdir(parents=True)
    (project / ".dvc/tmp/rwlock").write_text("")
    done = CliRunner().invoke(app, ["clean"])
    assert done.output.splitlines()[0] == ".dvc/tmp/rwlock: unreadable since a kill, mended"
    assert not (project / ".dvc/tmp/rwlock").exists()


def test_where_dvc_cannot_collect_it_is_told(project):
    with pytest.raises(LibpruneError, match=r"dvc gc --workspace .* failed: .*not inside of a DVC repository"):
        list(clean(project, ["dvc"]))
