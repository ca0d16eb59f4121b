"""The example of a mixture of experts: its parts, tokenizer and floor, and its command on a tiny model."""

import math
import re
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from examples import mixture
from examples.mixture import EVALUATION_SHARE, divide, learn_tokenizer, unigram_loss
from libprune.engine.describe import describe
from libprune.engine.errors import SourceError
from libprune.texts.windows import split_documents

APP = typer.Typer()
APP.command()(mixture.main)
TINY = ["--layers", "1", "--hidden", "32", "--inner", "8", "--vocabulary", "270"]


@given(st.integers(10, 300))
@settings(max_examples=30)
def test_the_pipeline_judges_on_the_documents_that_the_model_never_saw(number):
    documents = [str(one) for one in range(number)]
    parts = divide(documents)
    assert [*parts.training, *parts.validation, *parts.evaluation] == documents
    assert parts.evaluation == split_documents(documents, EVALUATION_SHARE)[1]
    assert len(parts.training) > len(parts.evaluation) >= len(parts.validation) > 0


@pytest.mark.parametrize("number", [1, 3])
def test_a_text_with_too_few_documents_is_refused(number):
    with pytest.raises(SourceError, match=f"{number} documents, too few"):
        divide(["a"] * number)


TOKENIZER = learn_tokenizer(["some words, and some more words"] * 3, 265)


@given(st.text())
@settings(max_examples=30)
def test_the_tokenizer_writes_any_text(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(number < 265 for number in ids)


def test_the_floor_is_the_cross_entropy_of_frequencies_with_one_added():
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert unigram_loss(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]), 3) == pytest.approx(expected)


def test_a_layer_that_uses_all_experts_alike_is_the_least_uneven():
    config = mixture.new_model(mixture.Shape(1, 32, 8), TOKENIZER, 0).config
    even, one = torch.eye(8), torch.tensor([9.0, *[0.0] * 7]).expand(8, 8)
    alike, uneven = (float(mixture._imbalance(config, (logits,))) for logits in (even, one))
    assert alike == pytest.approx(config.num_experts_per_tok, rel=0.1)
    assert uneven > 2 * alike
    assert float(mixture._imbalance(config, (even, one))) == pytest.approx((alike + uneven) / 2)


def run(*words: str):
    return CliRunner().invoke(APP, list(words))


def write_text(folder: Path, documents: int, length: int) -> str:
    path = folder / "text.txt"
    path.write_text(("so und so und anders. " * length + "\n") * documents)
    return str(path)


def test_a_tiny_mixture_learns_and_its_folder_is_one_that_libprune_prunes(tmp_path):
    text = write_text(tmp_path, 40, 20)
    first, again = (run(str(tmp_path / name), "--text", text, *TINY, "--epochs", "9") for name in ("one", "two"))
    assert first.exit_code == 0, first.output
    shown = [float(number) for number in re.findall(r"([\d.]+) validation", first.output)]
    assert len(shown) == 9
    assert shown[-1] < shown[0] / 2
    judged, floor = map(float, re.findall(r"token ([\d.]+) on the evaluation part, ([\d.]+) by", first.output)[0])
    assert judged < floor
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert again.exit_code == 0
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    architecture = describe(model)
    assert {part: architecture.units(part) for part in architecture.parts} == {"attention": 2, "experts": 8}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer("so und")["input_ids"][0] < architecture.sizes["vocab"]


def test_a_text_shorter_than_a_sequence_is_refused_in_one_line(tmp_path):
    done = run(str(tmp_path / "model"), "--text", write_text(tmp_path, 10, 1), *TINY)
    assert done.exit_code == 1
    assert "a sequence has 128; give a longer text" in done.output
    assert not (tmp_path / "model").exists()
