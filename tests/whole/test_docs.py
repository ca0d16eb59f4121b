"""The examples of the documents run, and their links lead somewhere."""

import doctest
import re

import pytest

from tests.support import tiny
from tests.support.closure import ROOT

DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if ">>> " in path.read_text()], ids=lambda path: path.stem)
def test_examples_give_what_the_document_says(path, tmp_path, monkeypatch, quick_proof):
    """They run in an empty folder; `model` is a tiny model, and `text` a text."""
    monkeypatch.chdir(tmp_path)
    model, text = tiny.write_model(tmp_path / "model"), tiny.write_text(tmp_path / "text.txt", documents=1000)
    found = doctest.testfile(str(path), module_relative=False, encoding="utf-8", globs={"model": model, "text": text})
    assert found.failed == 0
    assert found.attempted > 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_to_files_that_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target
