"""The report says what was cut, what it cost and how it was made."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.report.cautions import trust
from libprune.report.headline import HEADER, decision, headline_rows
from libprune.report.markdown import markdown_table
from libprune.report.page import html_page
from libprune.report.programs import how_to_load
from libprune.report.report import compose_report
from tests.support.evaluated import EVALUATION, LAYOUT, PICTURES, PROVENANCE, ROUTING, changed, report_of, trained
from tests.support.page import SKELETON, TABLE, Page


@pytest.mark.parametrize("shape", ["uniform", "per_layer"])
def test_the_report_says_what_was_cut_what_it_cost_and_how_to_load_it(shape):
    text = report_of(changed(plan={"shape": shape}))
    assert markdown_table(headline_rows(EVALUATION), HEADER) in text
    assert decision(EVALUATION, trust(EVALUATION, PROVENANCE.text)) in text
    assert text.startswith(r"# \<b\>my\</b\> \*model\*, pruned" + "\n\n")
    for words in ("Remove 20.0 %", "20.00 %", "15.78 %", "15.81 %", "`taylor_2nd`", "`global`", "`local`", "0.9877"):
        assert words in text
    assert "24 windows of 1024 tokens of `some text`" in text
    assert "2.5e-06 of 33.1" in text
    assert "20.0 % of the decoder macs" in text
    for share in ("22.1 %", "13.2 %", "22.3 %", "16.4 %"):
        assert share in text
    assert "| 0 | 3 of 3 | 1,200 of 1,536 |" in text
    assert "| 1 | 2 of 3 | 1,111 of 1,536 |" in text
    assert how_to_load("out/pruned", shape, "causal_lm") in text
    assert ("trust_remote_code=True" in text) is (shape == "per_layer")


def test_the_multiple_of_the_channels_is_named_where_there_is_one():
    assert "mlp in channels, of which a multiple of 32 stays." in report_of(changed(plan={"channel_multiple": 32}))
    assert "mlp in channels." in report_of(EVALUATION)


def test_trained_layers_are_told_of_beside_the_maps():
    pruning = EVALUATION["pruning"]
    trained = pruning | {"repair": pruning["repair"] | {"layer_before": 0.0612, "layer_after": 0.0345}}
    sentence = "missed 6.1 % of what the dense ones gave before it, and 3.5 % after it."
    assert sentence in report_of(changed(pruning=trained))
    assert "trained" not in report_of(EVALUATION).split("## How it was repaired")[1].split("##")[0]


def test_a_repair_without_held_out_text_is_told_as_that():
    fitted = EVALUATION["pruning"] | {"repair": {"lost_before": 0.22, "lost_after": 0.1}}
    assert "the repair left 10.0 %; no calibration sequence was held out" in report_of(changed(pruning=fitted))


def test_layers_that_keep_the_same_share_a_row():
    kept = [{"attention": 3, "mlp": n} for n in (9, 9, 9, 8, 9, 9)]
    rows = re.findall(r"^\| (\d.*?) \| 3 of 3 \| (\d) of 1,536", report_of(changed(kept=kept)), re.MULTILINE)
    assert rows == [("0 to 2", "9"), ("3", "8"), ("4 to 5", "9")]


def test_query_heads_are_told_with_the_groups_that_they_lie_in():
    kept = [{"attention": 6, "mlp": 9}, {"attention": 6, "mlp": 9}, {"attention": 0, "mlp": 9}]
    of = [{"attention": 3}, {"attention": 2}, {"attention": 0}]
    result = changed(kept=kept, units={"attention": 9, "mlp": 9}, unit_kinds={"attention": "heads", "mlp": "channels"})
    text = report_of(result | {"groups": {"attention": 3}, "kept_groups": of})
    assert "attention in query heads (as many in each group that stays" in text
    rows = re.findall(r"^\| (\d.*?) \| (\d of 9 in \d of 3 groups) \|", text, re.MULTILINE)
    assert rows == [
        (str(layer), f"{k['attention']} of 9 in {o['attention']} of 3 groups")
        for layer, (k, o) in enumerate(zip(kept, of, strict=True))
    ]


def test_a_narrower_residual_stream_is_told():
    text = report_of(changed(plan={"width": 432}))
    assert "The residual stream has 432 of 576 columns" in text
    assert "The residual stream has" not in report_of(changed(plan={"width": None}))


def test_every_picture_given_is_shown_once_and_no_other():
    for pictures in (PICTURES, PICTURES[:2], PICTURES[3:5], []):
        shown = re.findall(r"!\[.*?\]\(gradient_analysis/(.*?)\.png\)", report_of(trained(), pictures))
        assert sorted(shown) == sorted(picture.name for picture in pictures)


def test_provenance_names_model_texts_seed_versions_commit_and_params():
    text = report_of(EVALUATION)
    table = dict(re.findall(r"^\| (.*?) \| (.*) \|$", text.partition("## Provenance")[2], re.MULTILINE))
    assert table["model"] == r"``a\|b `<model>` of mine``, family `llama`, 2 layers"
    assert table["calibration text"] == r"`some \| *text*`, 64 sequences of 128 tokens"
    assert table["seed of the calibration text"] == "7"
    assert table["versions"] == "libprune `9.8.7`, torch `6.5.4`, transformers `5.99`"
    assert table["git commit of the project"] == "`0123abcd`, with changes that are not committed"
    assert table["`ratio`"] == "`0.2`"
    assert table["`minutes`"] == "`none`"
    assert table["`slice.repair`"] == "`local`"
    assert not {"`gradient_orders`", "`kept_set_overlap`", "`model`"} & table.keys()
    mixed = report_of(
        changed(plan={"criterion": "gradient_flow", "gradient_flow": {"snr": 0.25}, "cooperative": {"a": 1}})
    )
    assert "| `gradient_flow.snr` | `0.25` |" in mixed
    assert "cooperative" not in mixed
    assert "git commit" not in compose_report(EVALUATION, LAYOUT, replace(PROVENANCE, commit=None), [], None)


def test_what_was_done_behind_whole_layers_is_told():
    factors = {"14": 0.9, "15": 0.9, "19": 0.75}
    text = report_of(changed(pruning={"repair": {}, "rescale": {"factors": factors, "why_not": ""}}))
    assert "## How it was repaired" in text
    assert "multiplied by as much: from layer 14 on 0.900, from layer 19 on 0.750, with" in text
    left = report_of(changed(pruning={"rescale": {"factors": {}, "why_not": "its stream stays"}}))
    assert "gone were not rescaled: its stream stays." in left
    assert "rescaled" not in report_of(EVALUATION)


def test_the_routing_of_a_mixture_is_told_in_the_headline_and_layer_by_layer():
    result = trained() | {"routing": ROUTING}
    text = report_of(result)
    assert "21.5 % of the weight that routers give" in text
    assert "45.6 % in the pruned and 44.4 % in the recovered model" in text
    assert "| 2 | 6 of 8 | 33.0 % | 71.2 % | 67.8 % |" in text
    rows = {row[0]: row[1:] for row in headline_rows(result)}
    assert rows["tokens sent to other experts"] == ("", "45.6 %", "")
    assert rows["tokens sent to other experts, recovered"] == ("", "44.4 %", "")
    for other in (report_of(trained()), report_of(EVALUATION)):
        assert "experts" not in other


def test_the_order_of_whole_layers_is_told_with_what_went():
    nan = float("nan")
    step = {"removed": "layer", "standard_error": 0.01, "single_divergence": 0.2, "change": 0.3}
    steps = [
        step | {"step": 1, "layer": 7, "divergence": 0.2, "gone": True},
        step | {"step": 2, "layer": 3, "divergence": 0.5, "gone": False, "removed": "mlp"},
    ]
    text = report_of(changed(plan={"depth": "joint"}) | {"depth": steps})
    assert "all that is left is measured again" in text
    assert "| 1 | layer 7 | 0.2000 ± 0.0100 | 0.2000 | 0.300 | yes |" in text
    assert "| 2 | mlp of layer 3 | 0.5000 ± 0.0100 | 0.2000 | 0.300 | no |" in text
    bare = [steps[0] | {"standard_error": nan, "single_divergence": nan}]
    assert "| 1 | layer 7 | 0.2000 |  | 0.300 | yes |" in report_of(changed(plan={"depth": "cosine"}) | {"depth": bare})
    assert "go whole" not in report_of(EVALUATION)


# Recovery


def test_a_recovered_model_is_said_wherever_the_result_is():
    text = report_of(trained())
    assert "recovery `full` on 40,960 tokens." in text
    assert text.partition("\n")[0].endswith(", pruned and trained")
    assert markdown_table(headline_rows(trained()), HEADER) in text
    assert "Sizes and speed are those of the pruned model" in text
    assert how_to_load("out/recovered", "uniform", "causal_lm") in text
    assert "| `recover.held_out` | `16` |" in text


def test_without_recovery_the_report_speaks_of_none():
    text = report_of(EVALUATION)
    assert "no training afterwards" in text
    assert "recover" not in text


# Drafts


def test_the_report_says_whether_a_draft_pays():
    text = report_of(trained())
    assert "| pruned | 78.1 ± 0.3 % | 74.6 ± 0.5 % | 0.82 |" in text
    assert "| recovered | 95.0 ± 0.3 % | 74.6 ± 0.5 % | 0.82 |" in text
    assert "With the pruned model as draft, decoding is expected to be × 0.98 as fast" in text
    assert "in drafts of one token, the best length: it does not pay." in text
    assert "With the recovered model as draft, decoding is expected to be × 1.08 as fast" in text
    assert "in drafts of 2 tokens, the best length: it pays." in text


def test_of_a_model_that_does_not_write_the_report_speaks_of_no_draft():
    assert "draft" in report_of(EVALUATION)
    assert "draft" not in report_of(changed(pruned={"draft": None}))


# Gradients


@pytest.mark.parametrize(
    ("ratio", "words"), [(12.34, "12.3 (fine)"), (float("inf"), "infinite (severe vanishing)"), (None, "")]
)
def test_the_gradient_ratio_is_said_with_its_verdict(ratio, words):
    text = report_of(EVALUATION, ratio=ratio)
    assert words in text
    assert ("## Gradients" in text) is (ratio is not None)


def test_a_fix_of_the_gradients_is_said_with_the_ratio_after_it():
    fixed = {"fix": "adaptive", "gradient_ratio": None, "gradient_ratio_after_fix": 3.21, "verdict": "severe vanishing"}
    assert "the fix `adaptive`; the ratio after it is 3.2" in report_of(changed(plan={"diagnosis": fixed}))
    assert "the fix" not in report_of(changed(plan={"diagnosis": fixed | {"fix": "none"}}))


# Continuations


HARSH = st.text(st.sampled_from("ab<>&|`*_[]()!#-+.:/\\~\"'\n\t1é日ש"), max_size=24)


@given(st.lists(HARSH, min_size=4, max_size=5))
def test_continuations_show_every_letter_of_models_and_text_and_nothing_of_it_is_markup(texts):
    names = ("prompt", "text", "dense", "pruned", "recovered")
    entry = {"window": 7, **dict(zip(names, texts, strict=False)), "agree": 1, "agree_recovered": 2}
    report = report_of(changed(continuations=[entry]))
    text = report[report.index("## The same beginnings") : report.index("## How to load it")]
    page = Page(html_page(text, "t", {}))
    rows = page.texts["tr"][-len(texts) :]
    labels = ("beginning", "the text itself", "dense", "pruned", "recovered")[: len(texts)]
    for row, label, shown in zip(rows, labels, texts, strict=True):
        lines = (" ".join(line.split()) for line in shown.strip().split("\n"))
        assert row.split() == f"{label} {' ↵ '.join(line for line in lines if line)}".split()
    assert {tag for tag, _ in page.tags} <= {*SKELETON, *TABLE, "h2", "code"}
    assert "agree in the first 1 of 2 tokens" in text
    assert ("dense and recovered in the first 2." in text) is (len(texts) == 5)


def test_without_continuations_the_report_does_not_speak_of_them():
    assert "beginnings" in report_of(EVALUATION)
    assert "beginnings" not in report_of(changed(continuations=[]))


def test_a_smaller_vocabulary_has_its_sizes_and_its_price():
    found = {
        "text": "news.txt",
        "documents": 3,
        "tokens": {"before": 49_152, "after": 9_984},
        "rows": {"before": 49_152, "after": 9_984},
        "parameters": {"before": 134_515_008, "after": 111_954_240},
        "bytes": {"before": 269_030_016, "after": 223_908_480},
        "evaluation": {"characters": 2_000, "tokens": {"before": 400, "after": 410}},
        "per_1000_characters": {"before": 200.0, "after": 205.0},
    }
    told = report_of(changed(vocabulary=found))
    assert "## What went with the vocabulary" in told
    for row in (
        "| tokens of the tokenizer | 49,152 | 9,984 |",
        "| parameters of the whole model | 134,515,008 | 111,954,240 |",
        "| weights, MB | 269.0 | 223.9 |",
        "| tokens in 1,000 characters of the evaluation text | 200.0 | 205.0 |",
        "The evaluation text has 2.5 % more tokens",
    ):
        assert row in told
    assert "vocabulary" not in report_of(EVALUATION)
