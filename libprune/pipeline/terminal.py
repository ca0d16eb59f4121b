"""Text for the terminal: tables, and numbers of bytes."""

Rows = list[tuple[str, ...]]
"""Rows of a table; each cell is a text."""


def text_table(rows: Rows, header: tuple[str, ...]) -> str:
    """A table for the terminal, the first column left and the others right aligned."""
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
