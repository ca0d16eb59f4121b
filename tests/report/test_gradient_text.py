"""The gradients in numbers follow their definitions."""

from statistics import fmean, stdev

import numpy as np
import pytest

from libprune.report.gradient_text import gradient_report, layer_summary
from libprune.statistics.gradient_health import gradient_by_layer, gradient_ratio
from tests.support.tables import gradient_rows


@pytest.mark.parametrize(("layers", "batches"), [(1, 1), (3, 1), (4, 6)])
def test_the_summary_of_layers_follows_its_definitions(layers, batches):
    rows, summary = gradient_rows(layers, batches), layer_summary(gradient_rows(layers, batches))
    for i in range(layers):
        here = [k for k in range(len(rows["batch"])) if rows["layer_idx"][k] == i]
        by_batch = [fmean(rows["mean_abs"][k] for k in here if rows["batch"][k] == b) for b in range(batches)]
        assert summary["mean_abs"][i] == pytest.approx(fmean(by_batch))
        assert summary["std"][i] == pytest.approx(fmean(rows["std"][k] ** 2 for k in here) ** 0.5)
        variation = stdev(by_batch) / fmean(by_batch) if batches > 1 else float("nan")
        assert summary["variation"][i] == pytest.approx(variation, nan_ok=True)


def test_the_text_has_every_layers_figures_the_ratio_and_the_advice():
    rows = gradient_rows(3)
    rows["mean_abs"] *= np.array([3.0, 1.0, 50.0])[rows["layer_idx"]]
    advice = {"fix": "adaptive", "gradient_ratio_after_fix": None, "advice": ["do\nthis"]}
    text = gradient_report(rows, advice)
    for layer, mean in enumerate(gradient_by_layer(rows)["mean_abs"]):
        assert f"{layer:>5}{mean:>13.3e}" in text
    assert f"{gradient_ratio(rows):.1f} (fine)" in text
    assert "smallest mean |g|: layer 1; largest: layer 2" in text
    assert "adaptive; the ratio after it: infinite" in text
    assert "advice: do this\n" in text
    assert "fix" not in gradient_report(rows, {"fix": "none"})
