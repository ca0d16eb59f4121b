"""The guide to a comparison: it says of each setting what its figures say."""

import re

from libprune.experiments.guide import compose_guide
from libprune.experiments.summary import summarize
from libprune.scoring.criteria import CRITERIA
from tests.support.compared import AFTER, PRICED, RATIOS, gathered, priced


def sections(text: str) -> dict[str, str]:
    """The guide's sections by setting."""
    return {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}


def test_the_guide_says_of_each_setting_what_its_figures_say(tmp_path):
    data = priced(tmp_path)
    found = sections(compose_guide(data, summarize(data)))
    assert set(found) == set(PRICED)
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
    data = gathered(tmp_path, PRICED)
    text = compose_guide(data, summarize(data))
    assert "cost less" not in text and "costs less" not in text and "no more time" not in text
    assert text.count("What it costs is not on record") == len(PRICED)


def test_a_setting_that_costs_about_the_same_is_said_to(tmp_path):
    data = gathered(tmp_path, {"a": [1.2, 1.21], "b": [1.2, 1.21]}, seconds={"a": 100.0, "b": 105.0})
    found = sections(compose_guide(data, summarize(data)))
    assert "Not distinguishable from b (× 1.000, 105 s), which costs the same." in found["a"]


def test_the_guide_shows_both_figures_and_weighs_what_leads_to_the_compared_one(tmp_path):
    data = gathered(tmp_path, RATIOS, seconds=dict.fromkeys(RATIOS, 8.0), after=AFTER)
    text = compose_guide(data, summarize(data))
    found = sections(text)
    assert "The settings are ordered and compared by the perplexity after recovery." in text
    assert re.search(r"before bad \(× 1\.04\d, 12 s\), which loses less", found["good"])
    assert "- loses before recovery: × 2.13" in found["bad"]
    assert "- loses after recovery: × 1.100 (" in found["bad"]
    assert "recovering 4.0 s, 2 MB" in found["bad"]
    assert "- then runs: score, allocate, slice, teacher, recover\n" in found["bad"]
    plain = gathered(tmp_path, RATIOS)
    assert "recover" not in compose_guide(plain, summarize(plain))
