"""Pieces of Markdown: tables, pictures, and text from elsewhere that must not be taken for markup."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CODE = re.compile(r"(`[^`]+`)")
_INLINE = re.compile(r"([\\`*_\[\]<>&~])")
_BLOCK = re.compile(r"^(\d*)([#+\-=.)])")


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        name: the file's, without `.png`.
        alt: what it shows, for who cannot see it.
        caption: what exactly is drawn.
        png: the file's bytes.
    """

    name: str
    alt: str
    caption: str
    png: bytes

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.png"


def prose(text: str) -> str:
    """A text as one line in which only code between backticks is markup."""
    parts = _CODE.split(" ".join(text.split()))
    escaped = (part if i % 2 else _INLINE.sub(r"\\\1", part) for i, part in enumerate(parts))
    return _BLOCK.sub(r"\1\\\2", "".join(escaped))


def code(text: str) -> str:
    """A text as one line of code, whatever backticks it has."""
    line = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


def markdown_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A table, the first column left and the others right aligned; the cells are Markdown in which a pipe may stand."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)


def picture(folder: str, shown: Picture) -> list[str]:
    """Paragraphs of a picture and its caption; the picture lies in a folder beside the text."""
    return [f"![{prose(shown.alt)}]({folder}/{shown.file})", f"*{prose(shown.caption)}*"]
