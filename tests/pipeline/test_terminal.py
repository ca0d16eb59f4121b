"""Text for the terminal: tables hold every cell, sizes are rounded to what can be read, and a stage shows its way."""

import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.pipeline import terminal
from libprune.pipeline.terminal import (
    VERBOSE,
    Bar,
    at_the_end,
    continued,
    gigabytes,
    logging_to,
    masked,
    note,
    printable,
    say,
    say_last,
    text_table,
    ticking,
)
from tests.support.closure import ROOT

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


# What a stage shows


def test_details_go_to_the_log_of_a_stage_and_are_printed_without_one_or_if_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(VERBOSE, raising=False)
    with logging_to(tmp_path / "logs/score.log"):
        note("a detail")
        say("a line")
        monkeypatch.setenv(VERBOSE, "1")
        note("shown")
    note("outside")
    assert capsys.readouterr().out == "a line\nshown\noutside\n"
    assert (tmp_path / "logs/score.log").read_text() == "a detail\na line\nshown\n"


def test_a_log_that_cannot_be_written_stops_no_stage_and_loses_no_line(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    with logging_to(tmp_path / "logs/score.log"):
        note("a detail")
    assert capsys.readouterr().out == "a detail\n"


def test_lines_for_the_end_wait_for_it_in_a_stage(tmp_path, capsys):
    with logging_to(tmp_path / "x.log"):
        at_the_end("last")
        say("first")
        say_last()
        say_last()
    at_the_end("at once")
    assert capsys.readouterr().out == "first\nlast\nat once\n"


def test_a_stage_that_goes_on_from_a_saved_state_is_known_until_the_next_stage(tmp_path):
    with logging_to(tmp_path / "x.log"):
        say(f"{terminal.CONTINUES}: 2 of 3 are done")
        assert continued()
    with logging_to(tmp_path / "x.log"):
        assert not continued()


@pytest.fixture
def stderr(monkeypatch, capsys) -> Callable[[], str]:
    """Reads what was written to the stream of errors, which is no terminal; a line is due every tenth of a second."""
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(terminal, "_TICK_SECONDS", 0.02)
    return lambda: str(capsys.readouterr().err)


def test_in_a_file_a_bar_is_a_line_now_and_then_without_carriage_returns(stderr):
    with Bar(total=1000, desc="gradients", unit="tok") as bar:
        for _ in range(5):
            time.sleep(0.07)
            bar.set_postfix(loss=0.5, refresh=False)
            bar.update(200)
    written = stderr()
    lines = written.splitlines()
    assert 1 <= len(lines) <= 4
    assert "\r" not in written
    assert all(re.fullmatch(r"gradients: \d+ %, [\d,]+ of 1,000 tok, 00:0\d, 00:0\d left, loss=0\.5", x) for x in lines)


def test_a_bar_that_ends_soon_or_belongs_to_another_process_leaves_no_line(stderr):
    for _ in Bar(range(3), desc="short"):
        pass
    with Bar(total=3, disable=True) as bar:
        time.sleep(0.15)
        bar.update(3)
    assert stderr() == ""


def test_a_stretch_without_a_bar_is_not_silent(stderr):
    with ticking("slice"):
        time.sleep(0.35)
    lines = stderr().splitlines()
    assert 1 <= len(lines) <= 4
    assert all(re.fullmatch(r"slice: 00:0\d", line) for line in lines)


def test_in_a_file_a_stage_with_a_bar_has_one_line_at_a_time(stderr):
    with ticking("recover"), Bar(total=40, desc="training", unit="tok") as bar:
        for _ in range(40):
            time.sleep(0.015)
            bar.update()
    lines = stderr().splitlines()
    assert 2 <= len(lines) <= 7
    assert all(line.startswith("training: ") for line in lines)


ON_A_TERMINAL = """
import time
from libprune.pipeline.terminal import Bar, say, ticking
with ticking("slice"):
    time.sleep(1.1)
    say("a line")
    with Bar(total=4, desc="repair", unit="map") as bar:
        for _ in range(4):
            time.sleep(0.3)
            bar.update()
    say("the end")
"""


def test_items_are_counted_once_though_the_stage_has_shown_the_bar_meanwhile(stderr):
    shown = []
    with ticking("slice"):
        for _ in (bar := Bar(range(40), desc="repair", unit="layer")):
            shown.append(bar.n)
            time.sleep(0.02)
    assert shown == list(range(40))
    assert bar.n == 40


def test_on_a_terminal_the_bar_moves_in_place_and_vanishes_and_lines_stand_alone():
    """In a pseudo-terminal without a size, as those of programs are."""
    program = f"import os, pty, sys; sys.exit(pty.spawn([sys.executable, '-c', {ON_A_TERMINAL!r}]))"
    nowhere = subprocess.DEVNULL
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdin=nowhere, capture_output=True)
    assert done.returncode == 0, done.stdout
    printed = done.stdout.decode()
    left = [re.split(r"\r(?:\x1b\[K)?", line.removesuffix("\r"))[-1].strip() for line in printed.split("\n")]
    assert left == ["a line", "the end", ""], "what is left of each line once it has been overwritten"
    assert "slice: 00:01" in printed
    assert re.search(r"repair:  (50|75)%", printed)
