"""Files and folders are written whole or not at all, and never through a hard link."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from libprune.engine.errors import LibpruneError
from libprune.pipeline.artifacts import read_json, write_table
from libprune.pipeline.atomic import HERE, write_json, writing, writing_folder
from tests.support.files import tree


def write_old_and_new(target: Path, folder: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Writes an old and a new version through the library; what lies beside the target before and after."""
    versions = []
    for text in ("old", "new"):
        if folder:
            with writing_folder(target) as partial_folder:
                (partial_folder / text).write_text(text)
                (partial_folder / "inner").mkdir()
                (partial_folder / "inner" / "file").write_text(text)
        else:
            with writing(target) as partial_file:
                partial_file.write_text(text)
        versions.append(tree(target.parent))
    return versions[0], versions[1]


# Whole or not at all


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    old, new = write_old_and_new(tmp_path / "deep" / "file", folder=False)
    assert (old, new) == ({"file": b"old"}, {"file": b"new"})


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    old, new = write_old_and_new(tmp_path / "deep" / "folder", folder=True)
    assert old == {"folder/old": b"old", "folder/inner/file": b"old"}
    assert new == {"folder/new": b"new", "folder/inner/file": b"new"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_half_written_is_left_when_writing_fails(tmp_path, existing, folder, error):
    target = tmp_path / "target"
    if existing:
        write_old_and_new(target, folder)
    before = tree(tmp_path)
    with pytest.raises(error), writing_folder(target) if folder else writing(target) as unfinished:
        (unfinished / "part" if folder else unfinished).write_text("half")
        assert {path: content for path, content in tree(tmp_path).items() if path in before} == before
        raise error
    assert tree(tmp_path) == before
    assert target.exists() is existing


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_user_asks_of_new_files(tmp_path, mask, mode):
    """Whatever the library that wrote them gave them."""
    before = os.umask(mask)
    try:
        with writing_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "private").touch(0o600)
        with writing(tmp_path / "file") as file:
            file.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "folder/inner/private").stat().st_mode & 0o777 == mode
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder/inner").is_dir()


def test_a_file_takes_no_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own").write_text("mine")
    with pytest.raises(LibpruneError, match="folder is a folder, and a file is to be written there"):
        write_json(tmp_path / "folder", {})
    assert tree(tmp_path) == {"folder/own": b"mine"}


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json", "stage") == {"a": 1}
    assert list(tree(tmp_path)) == ["a.json"]


def test_what_an_ended_process_left_is_removed_though_nobody_took_note_of_its_end(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    left = tmp_path / f".target.{HERE}.{ended.pid}.partial"
    running = tmp_path / f".target.{HERE}.{os.getppid()}.partial"
    left.mkdir()
    running.touch()
    with writing(tmp_path / "target") as partial_file:
        partial_file.touch()
    assert not left.exists()
    assert running.exists()
    ended.wait()


# Links into a cache


def test_a_file_that_is_a_hard_link_is_replaced_and_the_cache_keeps_its_content(tmp_path):
    writers = {
        "a.json": lambda path, value: write_json(path, {"a": value}),
        "a.parquet": lambda path, value: write_table(path, {"a": np.array([value])}, {}),
        "a.txt": lambda path, value: write_old_and_new(path, folder=False),
    }
    for name, write in writers.items():
        target, cached = tmp_path / name, tmp_path / f"cached-{name}"
        write(target, 1)
        os.link(target, cached)
        content = cached.read_bytes()
        write(target, 2)
        assert cached.read_bytes() == content
        assert not target.samefile(cached)


def test_a_folder_of_hard_links_is_replaced_and_the_cache_keeps_its_content(tmp_path):
    target, cached = tmp_path / "folder", tmp_path / "cached"
    with writing_folder(target) as folder:
        (folder / "file").write_text("old")
    os.link(target / "file", cached)
    with writing_folder(target) as folder:
        (folder / "file").write_text("new")
    assert (cached.read_text(), (target / "file").read_text()) == ("old", "new")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_symbolic_link_is_replaced_and_what_it_points_to_stays(tmp_path, folder):
    kept = tmp_path / "cache" / "kept"
    write_old_and_new(kept, folder)
    before = tree(kept.parent)
    link = tmp_path / "out" / "link"
    link.parent.mkdir()
    link.symlink_to(kept)
    write_old_and_new(link, folder)
    assert not link.is_symlink()
    assert tree(kept.parent) == before


def test_where_space_lacks_the_target_is_named_with_what_is_free_and_nothing_is_left(tmp_path):
    program = (
        "import resource, sys; from pathlib import Path; from libprune.pipeline.atomic import writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from libprune.engine.errors import MeansError\n"
        "try:\n"
        "    with writing(Path('a.bin')) as partial:\n"
        "        partial.write_bytes(bytes(2000))\n"
        "except MeansError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"a\.bin cannot be written: File too large \([\d,]+ bytes are free in .*\)\n", done.stdout)
    assert not list(tmp_path.iterdir())
