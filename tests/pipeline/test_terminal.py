"""Text for the terminal: tables hold every cell, and sizes are rounded to what can be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.pipeline.terminal import gigabytes, text_table

CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=4))
def test_tables_hold_every_cell_in_columns(rows):
    header = ("what", "one", "two")
    text = text_table(rows, header).split("\n")
    assert len(text) == len(rows) + 2
    assert len({len(line) for line in text}) == 1
    for line, row in zip([text[0], *text[2:]], [header, *rows], strict=True):
        assert line.split() == [cell for cell in row if cell]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 MB"),
        (123_456, "0.1 MB"),
        (999_900_000, "999.9 MB"),
        (10**9, "1.0 GB"),
        (1_234_560_000_000, "1,234.6 GB"),
    ],
)
def test_bytes_are_said_in_gigabytes_from_one_on(size, text):
    assert gigabytes(size) == text
