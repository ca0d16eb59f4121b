"""The files of a comparison: all are written, and the same results give the same bytes."""

import re

import pytest

from libprune.engine.errors import LibpruneError
from libprune.experiments.report import write_comparison
from tests.support.compared import gathered, priced


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return priced(tmp_path_factory.mktemp("data"))


def test_files_are_written_and_the_same_results_give_the_same_bytes(tmp_path, data):
    for name in ("one", "two"):
        said = write_comparison(data, tmp_path / name, tmp_path / f"{name}.md")
    folder = tmp_path / "one/made-up"
    written = sorted(path.name for path in folder.iterdir())
    assert written == sorted(
        ["comparison.md", "settings.csv", "runs.csv", "overlaps.csv", "perplexity.png", "overlaps.png"]
    )
    for name in written:
        assert (folder / name).read_bytes() == (tmp_path / "two/made-up" / name).read_bytes()
        assert name in said
    assert (tmp_path / "one.md").read_text() == (tmp_path / "two.md").read_text()
    page = (folder / "comparison.md").read_text()
    assert page.startswith("# A \\*title\\*\n")
    assert all((folder / target).exists() for target in re.findall(r"\]\(([^)]+)\)", page))


def test_without_kept_sets_there_is_no_heat_map(tmp_path):
    write_comparison(gathered(tmp_path, {"a": [1.2, 1.3]}), tmp_path / "out", None)
    assert "overlaps.png" not in {path.name for path in (tmp_path / "out/made-up").iterdir()}


def test_a_file_in_the_way_is_refused(tmp_path, data):
    (tmp_path / "made-up").touch()
    with pytest.raises(LibpruneError, match="is a file"):
        write_comparison(data, tmp_path, None)
