"""The headline and its summary hold the measured numbers."""

from libprune.report.headline import headline_rows, summarize
from tests.support.evaluated import EVALUATION


def test_the_headline_holds_the_measured_numbers():
    rows = {row[0]: row[1:] for row in headline_rows(EVALUATION)}
    assert rows["perplexity"] == ("20.74 ± 0.31", "26.37 ± 0.41", "× 1.272 ± 0.009")
    assert rows["decoder parameters"] == ("106,168,320", "84,934,656", "-20.0 %")
    assert rows["all parameters"] == ("134,515,008", "113,281,344", "-15.8 %")
    assert rows["weights, MB"] == ("269", "227", "-15.8 %")
    assert rows["KV cache, bytes a token"] == ("23,040", "15,360", "-33.3 %")
    assert rows["prefill, tokens/s"][:2] == ("1,234", "1,481")
    assert "1.20" in rows["prefill, tokens/s"][2]
    assert rows["decode, tokens/s"][2] == "× 1.22 (1.15 to 1.26)"
    assert rows["piqa, acc_norm, %"] == ("67.1 ± 1.1", "61.0 ± 1.1", "-6.1")
    assert rows["winogrande, acc, %"] == ("51.0 ± 1.4", "52.0 ± 1.4", "+1.0")


def test_the_summary_has_size_speed_and_loss_each_with_its_uncertainty():
    size, speed, loss = summarize(EVALUATION).split("\n")
    assert "20.0 %" in size
    assert "exact" in size
    assert "× 1.20 (1.11 to 1.29)" in speed
    assert "× 1.22 (1.15 to 1.26)" in speed
    assert "× 1.272 ± 0.009" in loss
