"""Pictures, page and guide of a comparison: every figure is one of the results, and nothing else is said."""

import re

import numpy as np
import pytest

from libprune.engine.errors import LibpruneError
from libprune.experiments.guide import compose_guide
from libprune.experiments.pictures import draw_overlaps, draw_ratios
from libprune.experiments.report import write_comparison
from libprune.experiments.summary import overlap_matrix, summarize
from libprune.scoring.criteria import CRITERIA
from tests.support.compared import UNITS, gathered

RATIOS = {"cheap": [2.0, 2.3, 2.1], "dear": [1.20, 1.22, 1.21], "twin": [1.205, 1.215, 1.21], "worst": [9.0, 9.5, 8.7]}
SECONDS = {"cheap": 4.0, "dear": 100.0, "twin": 50.0, "worst": 60.0}


def sets() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return {name: [rng.random(UNITS) < 0.8 for _ in values] for name, values in RATIOS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return gathered(tmp_path_factory.mktemp("data"), RATIOS, sets(), seconds=SECONDS, title="A *title*")


def test_every_seed_is_a_dot_and_every_interval_a_line(data):
    found = summarize(data)
    (axes,) = draw_ratios(found, found[0]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [one.name for one in found]
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    for one in found:
        assert tuple(one.ratios.values()) in drawn
        assert (one.ratio.low, one.ratio.high) in drawn
    assert axes.get_xscale() == "log"
    (axes,) = draw_ratios(found[:2], found[0]).axes
    assert axes.get_xscale() == "linear"


def test_the_heat_map_shows_every_overlap_and_what_chance_would_give(data):
    found = summarize(data)
    matrix = overlap_matrix(data, found)
    matrix[0, 1] = np.nan
    axes, bar = draw_overlaps(matrix, [one.name for one in found], 0.66).axes
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["–" if np.isnan(value) else f"{value:.2f}" for value in matrix.flat]
    assert "by chance, 0.66" in bar.get_ylabel()


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


def sections(text: str) -> dict[str, str]:
    """The guide's sections by setting."""
    return {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}


def test_the_guide_says_of_each_setting_what_its_figures_say(data):
    found = sections(compose_guide(data, summarize(data)))
    assert set(found) == set(RATIOS)
    assert "Not distinguishable from twin (× 1.000, 50 s), which costs less." in found["dear"]
    assert "No setting here loses less by more than the noise." in found["dear"]
    assert "Not distinguishable from dear (× 1.000, 100 s), which costs more." in found["twin"]
    assert re.search(r"Cheaper than dear \(× 1.76\d, 100 s\) and twin \(.*, 50 s\), which lose less\.", found["cheap"])
    assert re.search(
        r"No reason to choose it before twin \(× 7.\d+, 50 s\) and cheap \(.*\), which lose less", found["worst"]
    )
    for text in found.values():
        assert CRITERIA["unit_fisher"].source in text
        assert "- needs: gradients\n" in text
        assert "measured losses: not measured" in text


def test_of_many_like_settings_the_guide_names_three_and_counts_the_rest(tmp_path):
    others = {f"other{i}": [1.5 + i / 100, 1.51 + i / 100] for i in range(5)}
    costs = dict.fromkeys(others, 10.0) | {"dear": 99.0}
    data = gathered(tmp_path, others | {"dear": [3.0, 3.02]}, seconds=costs)
    text = compose_guide(data, summarize(data))
    said = sections(text)["dear"]
    assert re.search(
        r"before other0 \(× 2\.\d+, 10 s\), other1 \(.*\), other2 \(.*\) and 2 more, which lose less", said
    )
    assert all(text.count(f"\n| {name} |") == 1 for name in costs), "the table has each setting once"


def test_a_guide_without_recorded_costs_does_not_weigh_them(tmp_path):
    data = gathered(tmp_path, RATIOS)
    text = compose_guide(data, summarize(data))
    assert "cost less" not in text and "costs less" not in text and "no more time" not in text
    assert text.count("What it costs is not on record") == len(RATIOS)


def test_a_setting_that_costs_about_the_same_is_said_to(tmp_path):
    data = gathered(tmp_path, {"a": [1.2, 1.21], "b": [1.2, 1.21]}, seconds={"a": 100.0, "b": 105.0})
    found = sections(compose_guide(data, summarize(data)))
    assert "Not distinguishable from b (× 1.000, 105 s), which costs the same." in found["a"]
