"""The report: its numbers, its sections and warnings, and the files that the stage writes."""

import copy
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import unit_index
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.terminal import text_table
from libprune.pipeline.writing import write_json
from libprune.report.cautions import cautions
from libprune.report.gallery import NAMES
from libprune.report.markdown import Picture, markdown_table
from libprune.report.page import html_page
from libprune.report.provenance import Origin, project_state
from libprune.report.publish import publish
from libprune.report.report import HEADER, headline, how_to_load, markdown, summary
from libprune.report.sections import continuations
from tests.support.closure import ROOT
from tests.support.models import FAMILIES
from tests.support.page import SKELETON, TABLE, Page
from tests.support.tables import gradient_rows, sensitivity_rows

ORIGIN = Origin("a|b `<model>`\nof mine", "llama", "some | *text*", 64, 128, 7, "0123abcd", changed=True)
PICTURES = [Picture(name, f"alt of {name}", f"caption of {name}", b"png") for name in NAMES]


EVALUATION: dict[str, Any] = {
    "plan": {
        "criterion": "taylor_2nd",
        "scaling": "none",
        "fusion": "none",
        "worth": "none",
        "ratio_asked": 0.2,
        "method": "global",
        "ratio": 0.2,
        "ratio_of": "decoder",
        "objective": "macs",
        "shape": "uniform",
        "model": "0f0f",
        "minutes": None,
        "kept_set_overlap": {"taylor": 0.98765},
        "gradient_orders": {"taylor": 1},
    },
    "dense": {
        "perplexity": 20.741,
        "perplexity_se": 0.311,
        "decoder_parameters": 106_168_320,
        "total_parameters": 134_515_008,
        "bytes": 269_030_016,
        "cache_bytes": 23_040,
        "macs_per_token": 134_479_872,
        "prefill": 1234.5,
        "decode": 56.7,
    },
    "pruned": {
        "perplexity": 26.372,
        "perplexity_se": 0.405,
        "decoder_parameters": 84_934_656,
        "total_parameters": 113_281_344,
        "bytes": 226_562_688,
        "cache_bytes": 15_360,
        "macs_per_token": 113_246_208,
        "prefill": 1481.4,
        "decode": 68.9,
        "decoder_share_removed": 0.2,
        "total_share_removed": 0.1578,
        "macs_share_removed": 0.1581,
    },
    "pruning": {
        "slice": {"repair": "local"},
        "repair": {
            "lost_before": 0.2211,
            "lost_after": 0.1322,
            "lost_held_out_before": 0.2233,
            "lost_held_out_after": 0.1644,
        },
        "proof": {"logit_difference": 2.5e-6, "logit_scale": 33.1},
        "versions": {"libprune": "9.8.7", "torch": "6.5.4", "transformers": "5.99"},
    },
    "model": {
        "type": "llama",
        "head": "causal_lm",
        "sizes": {"model": 576, "kv": 3, "q": 3, "d": 64, "ffn": 1536},
        "biases": [],
    },
    "units": {"attention": 3, "mlp": 1536},
    "kept": [{"attention": 3, "mlp": 1200}, {"attention": 2, "mlp": 1111}],
    "perplexity_ratio": {"value": 1.2715, "se": 0.0086},
    "tasks": {
        "piqa": {
            "dense": {"n": 1838.0, "acc": 0.68, "acc_se": 0.011, "acc_norm": 0.6714, "acc_norm_se": 0.01099},
            "pruned": {"n": 1838.0, "acc": 0.6, "acc_se": 0.012, "acc_norm": 0.6102, "acc_norm_se": 0.0114},
        },
        "winogrande": {"dense": {"acc": 0.51, "acc_se": 0.014}, "pruned": {"acc": 0.52, "acc_se": 0.014}},
    },
    "continuations": [
        {"window": 7, "prompt": "Once upon", "text": "a time", "dense": "a river", "pruned": "a a", "agree": 1}
    ],
    "speed": {
        "prefill_ratio": 1.204,
        "decode_ratio": 1.219,
        "prefill_spread": [1.11, 1.29],
        "decode_spread": [1.15, 1.26],
    },
    "protocol": {
        "text": "some text",
        "windows": 24,
        "length": 1024,
        "prompt_tokens": 256,
        "decode_tokens": 16,
        "rounds": 5,
        "continuation_tokens": 2,
        "dtype": "bfloat16",
        "device": "cpu",
    },
}


def test_the_headline_holds_the_measured_numbers():
    rows = {row[0]: row[1:] for row in headline(EVALUATION)}
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


CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=4))
def test_tables_hold_every_cell_in_columns(rows):
    header = ("what", "one", "two")
    text = text_table(rows, header).split("\n")
    assert len(text) == len(rows) + 2
    assert len({len(line) for line in text}) == 1
    for line, row in zip([text[0], *text[2:]], [header, *rows], strict=True):
        assert line.split() == [cell for cell in row if cell]
    marks = markdown_table(rows, header).split("\n")
    assert re.fullmatch(r"\|(---:?\|)+", marks[1])
    for line, row in zip([marks[0], *marks[2:]], [header, *rows], strict=True):
        assert tuple(cell.strip() for cell in line.strip("|").split("|")) == row


def changed(**sections: Any) -> dict[str, Any]:
    """The evaluation with some keys of some sections replaced."""
    result = copy.deepcopy(EVALUATION)
    for section, values in sections.items():
        result[section] = result[section] | values if isinstance(values, dict) else values
    return result


def report(result: dict[str, Any], pictures: list[Picture] = PICTURES, ratio: float | None = 12.34) -> str:
    return markdown(result, "out/pruned", ORIGIN, pictures, ratio)


@pytest.mark.parametrize("shape", ["uniform", "per_layer"])
def test_the_report_says_what_was_cut_what_it_cost_and_how_to_load_it(shape):
    text = report(changed(plan={"shape": shape}))
    assert markdown_table(headline(EVALUATION), HEADER) in text
    assert summary(EVALUATION) in text
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


def test_the_summary_has_size_speed_and_loss_each_with_its_uncertainty():
    size, speed, loss = summary(EVALUATION).split("\n")
    assert "20.0 %" in size
    assert "exact" in size
    assert "× 1.20 (1.11 to 1.29)" in speed
    assert "× 1.22 (1.15 to 1.26)" in speed
    assert "× 1.272 ± 0.009" in loss


def test_layers_that_keep_the_same_share_a_row():
    kept = [{"attention": 3, "mlp": n} for n in (9, 9, 9, 8, 9, 9)]
    rows = re.findall(r"^\| (\d.*?) \| 3 of 3 \| (\d) of 1,536", report(changed(kept=kept)), re.MULTILINE)
    assert rows == [("0 to 2", "9"), ("3", "8"), ("4 to 5", "9")]


def test_every_picture_given_is_shown_once_and_no_other():
    for pictures in (PICTURES, PICTURES[:2], PICTURES[3:5], []):
        shown = re.findall(r"!\[.*?\]\(gradient_analysis/(.*?)\.png\)", report(EVALUATION, pictures))
        assert sorted(shown) == sorted(picture.name for picture in pictures)


def test_provenance_names_model_texts_seed_versions_commit_and_params():
    text = report(EVALUATION)
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
    mixed = report(
        changed(plan={"criterion": "gradient_flow", "gradient_flow": {"snr": 0.25}, "cooperative": {"a": 1}})
    )
    assert "| `gradient_flow.snr` | `0.25` |" in mixed
    assert "cooperative" not in mixed
    assert "git commit" not in markdown(EVALUATION, "x", replace(ORIGIN, commit=None), [], None)


# Gradients and warnings


@pytest.mark.parametrize(
    ("ratio", "words"), [(12.34, "12.3 (fine)"), (float("inf"), "infinite (severe vanishing)"), (None, "")]
)
def test_the_gradient_ratio_is_said_with_its_verdict(ratio, words):
    text = report(EVALUATION, ratio=ratio)
    assert words in text
    assert ("## Gradients" in text) is (ratio is not None)


def test_a_fix_of_the_gradients_is_said_with_the_ratio_after_it():
    fixed = {"fix": "adaptive", "gradient_ratio": None, "gradient_ratio_after_fix": 3.21, "verdict": "severe vanishing"}
    assert "the fix `adaptive`; the ratio after it is 3.2" in report(changed(plan={"diagnosis": fixed}))
    assert "the fix" not in report(changed(plan={"diagnosis": fixed | {"fix": "none"}}))


def test_a_good_result_has_no_warning():
    assert cautions(EVALUATION, ORIGIN.text) == []
    assert "## Warnings" not in report(EVALUATION)


ADVICE = {"advice": ["1. mind `x.y` and <b>", "# second", "layers lose much"]}
SLOW = {"decode_spread": [0.9, 1.1]}
HARM = EVALUATION["pruning"] | {"repair": EVALUATION["pruning"]["repair"] | {"lost_held_out_after": 0.3}}
WARNED = {
    "advice": (changed(plan={"diagnosis": ADVICE}), [r"1\. mind `x.y` and \<b\>", r"\# second", "Layers lose much."]),
    "worse": (changed(perplexity_ratio={"value": 2.5}), ["2.50 times"]),
    "undefined": (changed(perplexity_ratio={"value": float("nan")}), ["nan times"]),
    "few windows": (changed(protocol={"windows": 2}), ["2 window"]),
    "own text": (changed(protocol={"text": "self"}), ["that the dense model wrote itself"]),
    "one text": (changed(protocol={"text": ORIGIN.text}), ["parts of one text, `some | *text*`"]),
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
    found = cautions(result, ORIGIN.text)
    assert len(found) == len(expected)
    for line, words in zip(found, expected, strict=True):
        assert words in line
        assert f"- {line}\n" in report(result)


# The stage's files


def write_artifacts(root: Path, measured: int) -> Layout:
    """What the report reads, of a tiny model whose sensitivity is measured for some layers."""
    layout = Layout(root)
    architecture = replace(describe(FAMILIES["llama"](0)), fingerprint="cafe")
    root.mkdir()
    layout.architecture.write_text(architecture.to_json())
    write_table(layout.weights, unit_index(architecture), {"model": "cafe", "source": "a <b>model</b>"})
    origin = {"model": "cafe", "source": "a text", "documents": 3, "seed": 0}
    write_tokens(layout.calibration_tokens, Sequences(torch.zeros((2, 4), dtype=torch.long)), origin)
    write_table(layout.gradients / "layers.parquet", gradient_rows(architecture.layers), {"model": "cafe"})
    rows = unit_index(architecture)
    scores = np.random.default_rng(0).normal(size=len(rows["layer_idx"]))
    plan = EVALUATION["plan"] | {"model": "cafe"}
    write_table(layout.plan, rows | {"score": scores, "keep": scores > -1}, plan)
    write_json(layout.evaluation, EVALUATION | {"plan": plan})
    write_table(layout.sensitivity, sensitivity_rows(measured), {"model": "cafe"})
    return layout


@pytest.mark.parametrize("layers", [0, 2])
def test_the_stage_writes_every_picture_that_the_text_shows_and_leaves_other_files(tmp_path, layers):
    layout, folder = write_artifacts(tmp_path / "artifacts", layers), tmp_path / "report"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    publish(layout, folder, tmp_path)
    text = (folder / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert all((folder / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    assert len(shown) == len(NAMES) - (not layers)
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == len(shown)
    assert {path.stem for path in (folder / "gradient_analysis").glob("*.png")} == set(NAMES)
    assert "gradient ratio" in (folder / "gradient_analysis/gradient_report.txt").read_text()
    assert {path.name for path in folder.iterdir()} == {"mine.txt", "report.md", "report.html", "gradient_analysis"}


@pytest.mark.parametrize("stale", ["plan", "gradients", "weights", "sensitivity"])
def test_a_report_of_artifacts_that_do_not_belong_together_is_refused(tmp_path, stale):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    table = gradient_rows(1)
    if stale == "plan":
        write_json(layout.evaluation, changed(plan={"model": "cafe", "ratio": 0.7}))
    else:
        path = layout.gradients / "layers.parquet" if stale == "gradients" else layout.root / f"{stale}.parquet"
        write_table(path, table, {"model": "beef", "source": "another"})
    with pytest.raises(ArtifactError, match="run `dvc repro`"):
        publish(layout, tmp_path / "report", tmp_path)
    assert not (tmp_path / "report").exists()


def test_the_commit_of_a_project_is_named_and_its_changes_noticed(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert project_state(tmp_path) == (None, False)
    git("init", "-q")
    assert project_state(tmp_path)[0] is None
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "notes.md").write_text("x\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (tmp_path / "notes.md").write_text("y\n")
    assert project_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert project_state(tmp_path)[1]


def test_the_pictures_are_the_plots_of_the_pipeline():
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    assert plots == [f"report/gradient_analysis/{name}.png" for name in NAMES]


# Continuations


HARSH = st.text(st.sampled_from("ab<>&|`*_[]()!#-+.:/\\~\"'\n\t1é日ש"), max_size=24)


@given(st.lists(HARSH, min_size=4, max_size=4))
def test_continuations_show_every_letter_of_models_and_text_and_nothing_of_it_is_markup(texts):
    names = ("prompt", "text", "dense", "pruned")
    entry = {"window": 7, **dict(zip(names, texts, strict=True)), "agree": 1}
    text = "\n\n".join(continuations(changed(continuations=[entry])))
    page = Page(html_page(text, "t", {}))
    rows = page.texts["tr"][-4:]
    for row, label, shown in zip(rows, ("beginning", "the text itself", "dense", "pruned"), texts, strict=True):
        lines = (" ".join(line.split()) for line in shown.strip().split("\n"))
        assert row.split() == f"{label} {' ↵ '.join(line for line in lines if line)}".split()
    assert {tag for tag, _ in page.tags} <= {*SKELETON, *TABLE, "h2", "code"}
    assert "agree in the first 1 of 2 tokens" in text


def test_without_continuations_the_report_does_not_speak_of_them():
    assert "beginnings" in report(EVALUATION)
    assert "beginnings" not in report(changed(continuations=[]))


# Which programs take the shape


def takers(result: dict[str, Any]) -> dict[str, str]:
    """What the report says of each program."""
    rows = re.findall(r"^\| (transformers|vLLM|llama\.cpp) \| (.*?) \|", report(result), re.MULTILINE)
    return {program: verdict.split(",")[0] for program, verdict in rows}


UNIFORM = changed(plan={"shape": "uniform"}, kept=[{"attention": 3, "mlp": 1280}] * 2)
FEWER_HEADS = [{"attention": 2, "mlp": 1280}] * 2


def of_type(name: str, kept: list[dict[str, int]] = UNIFORM["kept"], biases: tuple[str, ...] = ()) -> dict[str, Any]:
    return UNIFORM | {"model": UNIFORM["model"] | {"type": name, "biases": list(biases)}, "kept": kept}


TAKERS = {
    "a Llama": (of_type("llama"), "yes", "yes"),
    "a Llama with fewer heads": (of_type("mistral", FEWER_HEADS), "yes", "yes"),
    "a Llama with biases": (of_type("llama", biases=("mlp",)), "yes", "yes"),
    "a Qwen2 with all heads": (of_type("qwen2"), "yes", "yes"),
    "a Qwen2 with fewer heads": (of_type("qwen2", FEWER_HEADS), "not known", "no"),
    "a Qwen3 with biases": (of_type("qwen3", FEWER_HEADS, ("attention",)), "not known", "no"),
    "a model whose code was not read": (of_type("other"), "not known", "not known"),
    "widths by layer": (changed(plan={"shape": "per_layer"}), "no", "no"),
}


@pytest.mark.parametrize("case", TAKERS)
def test_programs_are_said_to_take_a_shape_only_where_their_code_says_so(case):
    result, vllm, llama_cpp = TAKERS[case]
    assert takers(result) == {"transformers": "yes", "vLLM": vllm, "llama.cpp": llama_cpp}
    assert ("vllm serve out/pruned" in report(result)) is (vllm == "yes")
    assert ("convert_hf_to_gguf.py out/pruned" in report(result)) is (llama_cpp == "yes")


def test_widths_that_quantization_cannot_cut_into_blocks_are_said():
    assert "1200 channels do not fill" in report(UNIFORM | {"kept": [{"attention": 3, "mlp": 1200}] * 2})
    assert "do not fill" not in report(UNIFORM)


def test_the_deleted_first_layer_of_a_uniform_result_does_not_hide_the_width_of_the_others():
    result = UNIFORM | {"kept": [{"attention": 0, "mlp": 0}, {"attention": 3, "mlp": 1280}]}
    assert "9 query heads, and 3 key-value heads" in report(result)
