"""The pictures of the gradients show what the table says."""

import numpy as np
import pytest

from libprune.report.gradient_pictures import (
    draw_grad_comparison,
    draw_grad_dist,
    draw_grad_heatmap,
    draw_layer_variance,
)
from libprune.statistics.gradient_health import gradient_ratio
from tests.support.figures import legend, titles
from tests.support.tables import gradient_rows, shortened, without_layer


def test_titles_say_ratio_and_verdict_and_zeros_are_marked():
    rows = gradient_rows(3)
    assert f"{gradient_ratio(rows):.1f} times" in titles(draw_grad_dist(rows))[0]
    assert "(fine)" in titles(draw_grad_dist(rows))[0]
    broken = shortened(without_layer(rows))
    assert "infinite (severe vanishing)" in titles(draw_grad_dist(broken))[0]
    assert "some parameter has no gradient" in legend(draw_grad_dist(broken))
    assert "some parameter has no gradient" not in legend(draw_grad_dist(rows))
    assert legend(draw_grad_heatmap(broken)) == ["zero", "not in the table"]
    assert legend(draw_grad_heatmap(rows)) == []


@pytest.mark.parametrize(("batches", "shown"), [(1, 1), (9, 5)])
def test_the_comparison_shows_the_first_five_batches(batches, shown):
    rows = gradient_rows(4, batches)
    figure = draw_grad_comparison(rows)
    assert f"first {shown} of {batches} batches" in titles(figure)[0]
    for number, line in enumerate(figure.axes[0].lines):
        here = rows["batch"] == number
        expected = [rows["mean_abs"][here & (rows["layer_idx"] == layer)].mean() for layer in range(4)]
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(figure.axes[0].lines) == shown


def test_one_batch_has_no_variation_to_show():
    assert len(draw_layer_variance(gradient_rows(2, batches=1)).axes) == 1
    assert len(draw_layer_variance(gradient_rows(2, batches=2)).axes) == 2
