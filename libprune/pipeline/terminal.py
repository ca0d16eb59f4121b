"""What the terminal shows: lines, tables and numbers, and of a stage one bar that moves, with details in a log file.

On a terminal a bar is drawn in place. Elsewhere, such as in a file, it is a line every half minute. While no bar is
shown, a line with the time that has gone stands in for it.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TextIO

import typer
from tqdm import tqdm

from libprune.engine.errors import printable
from libprune.pipeline.processes import in_background

Rows = list[tuple[str, ...]]
"""Rows of a table; each cell is a text."""


def text_table(rows: Rows, header: tuple[str, ...]) -> str:
    """A table for the terminal, the first column left and the others right aligned; control characters are shown."""
    header, rows = tuple(map(printable, header)), [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def gigabytes(size: int) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def masked(address: str) -> str:
    """An address, or a text that holds one, without the name, password or token that it may carry."""
    for secret in (
        r"(?<=://)[^/\s@]*(?=@)",
        r"(?<=[?&])[^=&\s]*(?:token|key|secret|password|signature)[^=&\s]*=[^&\s]*",
    ):
        address = re.sub(secret, "***", address, flags=re.IGNORECASE)
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", address)


VERBOSE = "LIBPRUNE_VERBOSE"
"""Environment variable that, if it is set, shows the details on the terminal too."""
LINE_SECONDS = 30.0
"""Seconds between two lines of a bar, where the output is no terminal."""
CONTINUES = "continues from a saved state"
"""How a line begins that says that a stage goes on where an earlier run of it was stopped."""
_TICK_SECONDS = 1.0


class _Open:
    """What is shown now: the log of the stage, whether a line without an end stands on the terminal, and the last bar.

    Attributes:
        log: details are written to it; None outside a stage.
        unended: whether the terminal shows a line that the next one has to overwrite.
        continued: whether the stage has said that it continues an earlier run.
        moved: when a bar was last shown, in seconds of `time.monotonic`.
        last: lines that are to be printed when the stage has ended.
    """

    log: TextIO | None = None
    unended: bool = False
    continued: bool = False
    moved: float = 0.0
    last: ClassVar[list[str]] = []


def say(line: str) -> None:
    """Print a line, and write it to the log of the stage."""
    _Open.continued |= line.startswith(CONTINUES)
    _clear()
    typer.echo(printable(line))
    _write(line)


def note(line: str) -> None:
    """Write a detail to the log of the stage; print it where there is no log, or if `LIBPRUNE_VERBOSE` is set."""
    if _Open.log is None or os.environ.get(VERBOSE):
        say(line)
    else:
        _write(line)


def at_the_end(line: str) -> None:
    """Print a line behind all that a stage prints; at once outside a stage."""
    if _Open.log is None:
        say(line)
    else:
        _Open.last.append(line)


def say_last() -> None:
    """Print the lines that waited for the end of the stage."""
    for line in _Open.last:
        say(line)
    _Open.last.clear()


def continued() -> bool:
    """Whether the stage has gone on from a saved state, so that its time is that of the last piece alone."""
    return _Open.continued


def _write(line: str) -> None:
    if _Open.log is not None:
        _Open.log.write(line + "\n")
        _Open.log.flush()


class Bar(tqdm):
    """A progress bar: tqdm's on a terminal, from which it vanishes at its end, else a line every half minute."""

    disable: bool = True

    def __init__(self, *args: Any, **options: Any) -> None:
        """Show a bar; the arguments are tqdm's."""
        self._drawn = sys.stderr.isatty()
        options = {"disable": False, "leave": False, **_size(), "mininterval": 0.5} | options
        if not self._drawn:
            options |= {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        if not options["disable"]:
            _clear()
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[Any]:
        """The items, each counted when the next one is asked for.

        tqdm counts several at once by a clock of its own, and counts them again after `ticking` has shown the bar.
        """
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar as it stands."""
        _Open.moved = time.monotonic()
        if self._drawn:
            super().display(msg, pos)
        elif msg is None:
            self.fp.write(_line(**self.format_dict) + "\n")
            self.fp.flush()

    def shown(self) -> bool:
        """Whether the bar is open, and has lasted longer than its delay."""
        return not self.disable and time.time() >= self.start_t + self.delay

    def close(self) -> None:
        """End the bar."""
        if self._drawn or self.disable:
            super().close()
        else:
            self.disable = True
            self._decr_instances(self)


def _size() -> dict[str, Any]:
    """Options for the size of the terminal: it is followed, or supposed where there is none."""
    sized = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    return {"dynamic_ncols": True} if sized else {"ncols": 80, "nrows": 24}


def _line(n: float | int, total: float | int | None, elapsed: float, prefix: str, unit: str, **more: Any) -> str:
    """A bar as a line: the share and number that are done, the time that has gone and what is left."""
    gone, figures = tqdm.format_interval(elapsed), f", {more['postfix']}" if more.get("postfix") else ""
    name = prefix.removesuffix(": ")
    if not total:
        return f"{name}: {n:,.0f} {unit}, {gone}{figures}"
    pace = (n - more["initial"]) / elapsed
    left = f", {tqdm.format_interval((total - n) / pace)} left" if pace else ""
    return f"{name}: {100 * n / total:.0f} %, {n:,.0f} of {total:,.0f} {unit}, {gone}{left}{figures}"


def _clear() -> None:
    """Take a line without an end off the terminal."""
    if _Open.unended:
        _Open.unended = False
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Inside the context, details go to a file, which is begun anew; nowhere if it cannot be written."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _Open.log = path.open("w", encoding="utf-8")
    _Open.continued = False
    try:
        yield
    finally:
        if _Open.log is not None:
            _Open.log.close()
        _Open.log = None


@contextmanager
def ticking(name: str) -> Iterator[None]:
    """Inside the context, show the time that has gone wherever no bar is shown, so that no stretch is silent.

    Args:
        name: what the line begins with.
    """
    end, ended = threading.Event(), threading.Event()

    def tick() -> None:
        _tick(name, end, sys.stderr.isatty())
        ended.set()

    in_background(tick)
    try:
        yield
    finally:
        end.set()
        ended.wait(_TICK_SECONDS)  # no longer: it may have found no memory to begin
        _clear()


def _tick(name: str, end: threading.Event, drawn: bool) -> None:
    start = shown = time.monotonic()
    while not end.wait(_TICK_SECONDS):
        now = time.monotonic()
        text = f"{name}: {tqdm.format_interval(now - start)}"
        bars = [bar for bar in list(Bar._instances) if isinstance(bar, Bar) and not bar.disable]
        if drawn and (visible := [bar for bar in bars if bar.shown()]):
            for bar in visible:
                bar.refresh()  # so that the time moves on while a long step lasts
        elif drawn:
            _Open.unended = True
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()
        elif now - max(shown, _Open.moved) >= LINE_SECONDS:
            shown = now
            if bars:
                bars[-1].display()
                bars[-1].last_print_t = time.time()  # it has its line for this half minute
            else:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
