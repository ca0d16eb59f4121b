"""What should make a reader careful is a warning of the report."""

import pytest

from libprune.report.cautions import find_cautions
from tests.support.evaluated import EVALUATION, PROVENANCE, changed, report_of


def test_a_good_result_has_no_warning():
    assert find_cautions(EVALUATION, PROVENANCE.text) == []
    assert "## Warnings" not in report_of(EVALUATION)


ADVICE = {"advice": ["1. mind `x.y` and <b>", "# second", "layers lose much"]}
SLOW = {"decode_spread": [0.9, 1.1]}
HARM = EVALUATION["pruning"] | {"repair": EVALUATION["pruning"]["repair"] | {"lost_held_out_after": 0.3}}
WARNED = {
    "advice": (changed(plan={"diagnosis": ADVICE}), [r"1\. mind `x.y` and \<b\>", r"\# second", "Layers lose much."]),
    "worse": (changed(perplexity_ratio={"value": 2.5}), ["2.50 times"]),
    "undefined": (changed(perplexity_ratio={"value": float("nan")}), ["nan times"]),
    "few windows": (changed(protocol={"windows": 2}), ["2 window"]),
    "own text": (changed(protocol={"text": "self"}), ["that the dense model wrote itself"]),
    "one text": (changed(protocol={"text": PROVENANCE.text}), ["parts of one text, `some | *text*`"]),
    "no task": (EVALUATION | {"tasks": {}}, ["`evaluate.tasks`"]),
    "missed": (changed(plan={"objective": "parameters", "ratio": 0.3}), ["30.0 % was asked for and 20.0 %"]),
    "missed by biases": (
        changed(plan={"objective": "parameters", "ratio": 0.3}, pruning={"slice": {"repair": "bias"}}),
        ["and the biases that the repair adds count"],
    ),
    "part gone": (changed(kept=[{"attention": 0, "mlp": 1}, {"attention": 1, "mlp": 1}]), ["any attention left: 0"]),
    "speed": (changed(speed=SLOW), ["decode speed"]),
    "repair": (EVALUATION | {"pruning": HARM}, ["does harm"]),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_should_make_a_reader_careful_is_a_warning(case):
    result, expected = WARNED[case]
    lines = find_cautions(result, PROVENANCE.text)
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line
        assert f"- {line}\n" in report_of(result)
