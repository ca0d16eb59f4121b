"""Text for the terminal: tables hold every cell, and sizes are rounded to what can be read."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.pipeline.terminal import gigabytes, masked, printable, text_table

CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=4))
def test_tables_hold_every_cell_in_columns(rows):
    header = ("what", "one", "two")
    text = text_table(rows, header).split("\n")
    assert len(text) == len(rows) + 2
    assert len({len(line) for line in text}) == 1
    for line, row in zip([text[0], *text[2:]], [header, *rows], strict=True):
        assert line.split() == [cell for cell in row if cell]


@given(st.text() | st.text("ab\n\t\r\x1b\x07\x9b\u202e\u2067\ud800"))
def test_nothing_that_a_terminal_obeys_is_printed_and_other_text_is_left_alone(text):
    shown = printable(text)
    assert shown.encode().decode() == shown, "no halves of surrogate pairs"
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for character in set(shown) - {"\n", "\t"}:
        assert unicodedata.category(character) != "Cc"
        assert unicodedata.bidirectional(character) not in turning
    harmless = "".join(c for c in text if unicodedata.category(c)[0] != "C")
    assert printable(harmless) == harmless
    assert printable("\x1b]0;title\x07 a\rb") == "\\x1b]0;title\\x07 a\\rb"


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


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:pass@host/a?b=1", "https://***@host/a?b=1"),
        ("no s3://key@bucket/t.txt and ftp://u:p@h", "no s3://***@bucket/t.txt and ftp://***@h"),
        ("https://h/t?X-Amz-Signature=abc&b=1&auth_token=x", "https://h/t?***&b=1&***"),
        ("hf_abcdefghijklmnopqrst of me", "hf_*** of me"),
        ("package://name/a@b", "package://name/a@b"),
        ("owner/hf_text", "owner/hf_text"),
    ],
)
def test_what_is_secret_in_an_address_is_masked(address, shown):
    assert masked(address) == shown
