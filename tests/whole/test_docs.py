"""The examples of the documents run, their links lead somewhere, and their texts are plain."""

import doctest
import re
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.closure import ROOT

TOP = [ROOT / "README.md", ROOT / "SECURITY.md"]
DOCUMENTS = sorted([*TOP, *ROOT.glob("docs/**/*.md")])
PAGES = sorted([*TOP, *(path for path in ROOT.glob("docs/*.md") if path.name not in {"log.md", "methods.md"})])
"""Pages that are written by hand, but for the log and the decisions."""

BEGIN_OTHERWISE = {ROOT / "README.md", ROOT / "docs/README.md", ROOT / "docs/reliability.md"}

LONGEST = 110
"""Characters of a line of prose."""

LONGEST_SENTENCE = 45
"""Words of a sentence."""

HABITS = {
    r"\btold\b": "say who shows or prints it",
    r"(?<!set )\bapart\b": "separate, different",
    r"\bso many\b|manieth": "the number of ..., every N-th",
    r"\b(?:a|the|each|every|no) found(?= (?:is|was|of|that)\b|[.,;:])": "name the thing",
    r"\bforetold\b": "estimated",
    r"\b[Ww]hat (?:is|was) left\b|\b[Ww]hat (?:stays|goes)\b": "name it: the weights that stay",
    r"\b(?:config|version \d) (?:can|cannot) say\b": "can describe",
    r"\bmuch is to go\b": "much is removed",
    r"\bOf an? ": "name the subject: a network has ..., from a stream ...",
    r"\bwithout a word\b": "without a warning",
    r"\bby the way\b": "remarks",
}
"""What the documents may not use, and what to write."""


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
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            leads_to = path.parent / file if file else path
            assert leads_to.exists(), target
            assert not anchor or anchor in anchors(leads_to), target


def anchors(path: Path) -> set[str]:
    """The names that git hosts and the site give to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    """The text with empty lines in the place of fenced and indented code."""
    blank = re.compile(r"^( *)```.*?^\1```$|(?<=\n\n) {4}\S[^\n]*", re.DOTALL | re.MULTILINE)
    return blank.sub(lambda block: "\n" * block[0].count("\n"), text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_lines_of_prose_fit_a_terminal(path):
    """Code, tables, and lines that are one link or picture may be longer."""
    lines = enumerate(without_code(path.read_text()).splitlines(), start=1)
    prose = [(number, line) for number, line in lines if not re.match(r"\||\s*!?\[[^]]*\]\([^)]*\)$", line)]
    assert [(number, line) for number, line in prose if len(line) > LONGEST] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_sentences_are_short_and_in_plain_words(path):
    text = without_code(path.read_text())
    for habit, instead in HABITS.items():
        found = re.search(habit, re.sub(r"`[^`]*`", "", text))
        assert found is None, f"{found}: {instead}"
    prose = re.sub(r"^[|#].*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose):
        for sentence in re.split(r"(?<=[.!?:;])\s", paragraph):
            assert len(sentence.split()) <= LONGEST_SENTENCE, sentence


@pytest.mark.parametrize("path", [path for path in PAGES if path not in BEGIN_OTHERWISE], ids=lambda path: path.stem)
def test_a_page_begins_with_what_one_can_do_after_reading_it(path):
    _, first, *_ = path.read_text().split("\n\n")
    assert first.startswith(("After reading this page you ", "You can "))
