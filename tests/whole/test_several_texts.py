"""Two texts of one's own and one that the model writes, through the whole pipeline."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml

from libprune.foresight.foresee import foresee
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from tests.support import tiny
from tests.support.closure import ROOT

SHARES = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def project(tmp_path_factory, by_forks) -> Path:
    """A project in which every stage has run."""
    folder = tmp_path_factory.mktemp("several")
    write_documents(folder)
    names = ("plain.txt", "chat.jsonl", "self")
    texts = [{"text": name, "share": share} for name, share in zip(names, SHARES, strict=True)]
    texts[1]["column"] = "messages"
    with pytest.MonkeyPatch.context() as patch, by_forks():
        patch.chdir(folder)
        tiny.write_params(
            folder / "params.yaml",
            str(tiny.write_model(folder / "model")),
            "plain.txt",
            tokenize={"text": texts, "calibration_sequences": 12, "calibration_length": 16, "evaluation_windows": 6}
            | {"repair_sequences": 16, "repair_length": 20},
            recover={"method": "full"},
        )
        foresee(folder / "params.yaml")
        for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]:
            import_module(f"stages.{stage}").main()
    return folder


def write_documents(folder: Path) -> None:
    """Lines, and conversations, each of words of its own."""
    rng = np.random.default_rng(0)
    plain, told = ([" ".join(rng.choice(words, 24)) for _ in range(80)] for words in (tiny.WORDS[:5], tiny.WORDS[5:10]))
    (folder / "plain.txt").write_text("".join(f"{line}\n" for line in plain))
    chat = ({"messages": [{"role": "user", "content": line}]} for line in told)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))


def test_every_text_gives_its_share_of_what_statistics_are_collected_on(project):
    layout = Layout(project / "artifacts")
    sequences, meta = read_tokens(layout.calibration_tokens, read_architecture(layout).fingerprint)
    assert [len(source["rows"]) for source in meta["sources"]] == [6, 3, 3]
    plain, told = (sequences.ids[source["rows"]] for source in meta["sources"][:2])
    assert set(plain.flatten().tolist()) <= set(range(2, 7))
    assert set(told.flatten().tolist()) <= set(range(7, 12))
    _, gradients = read_table(layout.gradients / "units.parquet", "gradients")
    assert gradients["tokens"] == meta["tokens"]


def test_the_repair_sees_the_same_shares_of_text_of_its_own(project):
    _, meta = read_table(Layout(project / "artifacts").repair_tokens, "tokenize")
    assert [len(source["rows"]) for source in meta["sources"]] == [8, 4, 4]


def test_the_texts_that_are_read_judge(project):
    evaluation = json.loads((project / "artifacts/evaluation.json").read_text())
    assert evaluation["protocol"]["text"] == "66.7 % plain.txt, 33.3 % chat.jsonl"
    assert evaluation["protocol"]["windows"] == 6


def test_the_model_is_trained_on_the_same_texts(project):
    _, meta = read_table(Layout(project / "artifacts").recovery_tokens, "teacher")
    assert meta["text"] == "50 % plain.txt, 25 % chat.jsonl, 25 % self"
    assert [source["part"] for source in meta["sources"][:2]] == ["the first 56 documents"] * 2


def test_the_report_names_them_and_warns_of_parts_of_one_text(project):
    report = (project / "report/report.md").read_text()
    assert "`50 % plain.txt, 25 % chat.jsonl, 25 % self`, 12 sequences of 16 tokens" in report
    assert "Calibrated and evaluated on parts of one text" in report
    assert "| gradients | calibration | 6 | 16 | 96 |" in report
    assert "| repair, sequential | repair | 16 | 20 | 320 |" in report
    assert "| evaluation | evaluation | 6 | 16 | 96 |" in report


def test_all_files_are_watched(project):
    links = project / "artifacts/sources"
    assert [(links / f"text-{number}").is_symlink() for number in range(1, 9)] == [True, True, *[False] * 6]
    assert (links / "text-2").resolve() == project / "chat.jsonl"
