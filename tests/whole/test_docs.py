"""The examples of the documents run, and their links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.closure import ROOT

DOCUMENTS = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


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
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            leads_to = path.parent / file if file else path
            assert leads_to.exists(), target
            assert not anchor or anchor in anchors(leads_to), target


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The names that git hosts and the site give to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
