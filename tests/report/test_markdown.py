"""Markdown shows every cell of a table, and what users wrote as text."""

import re

from hypothesis import given
from hypothesis import strategies as st

from libprune.report.markdown import code, markdown_table, prose
from libprune.report.page import html_page
from tests.support.page import SKELETON, TABLE, Page

HARSH = st.text(st.sampled_from("ab<>&|`*_[]()!#-+.:/\\~\"' \n1"), max_size=24)


@given(HARSH)
def test_code_shows_a_users_text_letter_by_letter_in_one_line(text):
    line = " ".join(text.split())
    for markdown in (f"before {code(text)} after", markdown_table([("x", code(text))], ("one", "two"))):
        page = Page(html_page(markdown, text, {}))
        assert page.texts.get("code", [""]) == [line]
        assert {tag for tag, _ in page.tags} <= {*SKELETON, "code", *TABLE}
        assert page.texts["title"] == [text]


@given(HARSH)
def test_prose_shows_a_users_text_as_text_at_the_start_of_a_line_in_a_list_and_in_a_table(text):
    line = " ".join(text.split())
    table = markdown_table([("x", prose(text))], ("one", "two"))
    for markdown, around in ((prose(text), "p"), (f"- {prose(text)}", "li"), (table, "tr")):
        page = Page(html_page(markdown, "t", {}))
        assert {tag for tag, _ in page.tags} <= {*SKELETON, "code", *TABLE, "ul", "li"}
        shown = page.texts.get(around, [""])[-1].strip().removeprefix("x").strip()
        assert shown.replace("`", "").split() == line.replace("`", "").split()


CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=4))
def test_tables_hold_every_cell_in_columns(rows):
    header = ("what", "one", "two")
    marks = markdown_table(rows, header).split("\n")
    assert len(marks) == len(rows) + 2
    assert re.fullmatch(r"\|(---:?\|)+", marks[1])
    for line, row in zip([marks[0], *marks[2:]], [header, *rows], strict=True):
        assert tuple(cell.strip() for cell in line.strip("|").split("|")) == row
