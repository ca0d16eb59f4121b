"""Pictures of a comparison: every seed, interval and overlap is drawn."""

import numpy as np
import pytest

from libprune.experiments.pictures import draw_overlaps, draw_ratios
from libprune.experiments.summary import overlap_matrix, summarize
from libprune.report.canvas import BLUE, ORANGE
from tests.support.compared import AFTER, RATIOS, gathered, priced


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return priced(tmp_path_factory.mktemp("data"))


def test_every_seed_is_a_dot_and_every_interval_a_line(data):
    found = summarize(data)
    (axes,) = draw_ratios(found, found[0]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [one.name for one in found]
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    for one in found:
        assert tuple(one.before.ratios.values()) in drawn
        assert (one.before.ratio.low, one.before.ratio.high) in drawn
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


def test_the_ratios_after_recovery_are_drawn_beside_those_before(tmp_path):
    found = summarize(gathered(tmp_path, RATIOS, after={"bad": AFTER["bad"]}))
    (axes,) = draw_ratios(found, found[0]).axes
    drawn = {(tuple(line.get_xdata()), line.get_color()) for line in axes.lines}
    for one in found:
        assert ((one.before.ratio.low, one.before.ratio.high), BLUE) in drawn
    bad = found[-1]
    assert ((bad.after.ratio.low, bad.after.ratio.high), ORANGE) in drawn
    assert sum(colour == ORANGE for _, colour in drawn) == 2
    assert "orange: after it" in axes.get_xlabel()
