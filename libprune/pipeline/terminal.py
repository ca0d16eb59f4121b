"""Text for the terminal: tables, numbers of bytes, and text from elsewhere, without control codes and secrets."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
Rows = list[tuple[str, ...]]
"""Rows of a table; each cell is a text."""


def printable(text: str) -> str:
    """A text whose control characters, but for line ends and tabs, are shown by their numbers.

    Names and texts from elsewhere could otherwise move the cursor, change the title or write to the clipboard of a
    terminal, or turn the direction of what follows.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
