"""What should make a reader careful is a warning of the report."""

import pytest

from libprune.report.cautions import find_cautions, trust
from tests.support.evaluated import EVALUATION, PROVENANCE, RECOVERY, changed, report_of, trained


def test_a_good_result_has_no_warning():
    for result in (EVALUATION, trained()):
        assert find_cautions(result, PROVENANCE.text) == []
        assert "## Warnings" not in report_of(result)


ADVICE = {"advice": ["1. mind `x.y` and <b>", "# second", "layers lose much"]}
SLOW = {"decode_spread": [0.9, 1.1]}
HARM = EVALUATION["pruning"] | {"repair": EVALUATION["pruning"]["repair"] | {"lost_held_out_after": 0.3}}
UNSEEN = EVALUATION["pruning"] | {"repair": {"lost_before": 0.22, "lost_after": 0.1}}
WORSE = {"perplexity_ratio": {"value": 2.5, "se": 0.1}}
STILL_WORSE = {"recovered": trained()["recovered"] | WORSE}
HARMED = {"recovered": trained()["recovered"] | {"perplexity_ratio": {"value": 1.4, "se": 0.1}}}
SAME, MIXED = "some text", [{"text": "some text", "share": 0.5}, {"text": "other", "share": 0.5}]
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
    "nothing held out": (EVALUATION | {"pruning": UNSEEN}, []),
    "much worse before recovery": (trained() | WORSE, []),
    "much worse after recovery": (trained() | WORSE | STILL_WORSE, ["2.50 times the dense model's after reco"]),
    "recovered on the evaluated text": (trained(text=SAME), ["parts of one text, `some text`: a part of the gain is"]),
    "recovered on it and another": (
        trained(params=RECOVERY["params"] | {"text": MIXED}, text="50 % some text, 50 % other"),
        ["Name another `tokenize.evaluation_text`, or train on another text (`recover.text`)"],
    ),
    "recovered in vain": (trained(step=0, text=SAME), ["No step of the recovery lowered the held-out loss"]),
    "recovered too long": (trained(step=20), ["rose again after step 20 of 40"]),
    "recovered to its harm": (trained() | HARMED, ["worse, × 1.400 after × 1.272"]),
    "without a gain on one text": (trained(text=SAME) | HARMED, ["worse, × 1.400 after × 1.272"]),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_should_make_a_reader_careful_is_a_warning(case):
    result, expected = WARNED[case]
    lines = find_cautions(result, PROVENANCE.text)
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line
        assert f"- {line}\n" in report_of(result)


TRUSTED = {
    "for the tasks in the table": EVALUATION,
    "measure your own tasks": EVALUATION | {"tasks": {}},
    "measure it on yours": changed(protocol={"text": PROVENANCE.text}),
    "on 2 window(s)": changed(protocol={"windows": 2, "text": PROVENANCE.text}),
    "text of the dense model's own": changed(protocol={"windows": 2, "text": "self"}),
    "do not use it": changed(perplexity_ratio={"value": 2.5}, protocol={"windows": 2}),
    "its text is visibly worse": changed(perplexity_ratio={"value": float("nan")}),
}


@pytest.mark.parametrize("words", TRUSTED)
def test_the_verdict_is_the_gravest_that_is_known(words):
    assert words in trust(TRUSTED[words], PROVENANCE.text)
    assert f"**{trust(TRUSTED[words], PROVENANCE.text)}**" in report_of(TRUSTED[words])


def test_the_verdict_of_a_recovered_model_is_of_its_own_perplexity():
    assert trust(trained() | WORSE, PROVENANCE.text) == trust(trained(), PROVENANCE.text)
    assert "do not use it" in trust(trained() | STILL_WORSE, PROVENANCE.text)


@pytest.mark.parametrize(
    ("evaluation", "calibration", "same"),
    [
        ("a.txt", "a.txt", True),
        ("wikitext2", "wikitext2, Salesforce/wikitext, wikitext-2-raw-v1, train, 0123", True),
        ("70 % a.txt, 30 % b.txt", "70 % a.txt, 30 % b.txt", True),
        ("70 % a.txt, 30 % b.txt", "35 % a.txt, 15 % b.txt, 50 % self", True),
        ("a.txt", "1e-05 % self, 100 % a.txt", True),
        ("c.txt", "70 % a.txt, 30 % b.txt", False),
        ("self", "50 % a.txt, 50 % self", False),
    ],
)
def test_parts_of_one_text_are_told_among_several(evaluation, calibration, same):
    result = changed(protocol={"text": evaluation})
    assert any("parts of one text" in line for line in find_cautions(result, calibration)) is same
    assert ("measure it on yours" in trust(result, calibration)) is same
