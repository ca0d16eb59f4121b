"""Pieces of Markdown: tables, pictures, and text from elsewhere that must not be taken for markup."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CODE = re.compile(r"(`[^`]+`)")
_INLINE = re.compile(r"([\\`*_\[\]<>&~])")
_BLOCK = re.compile(r"^(\d*)([#+\-=.)])")


@dataclass(frozen=True)
class Picture:
    """A drawn picture and its texts.

    Attributes:
        name: the name of the file, without `.png`.
        alt: a description for readers who cannot see it.
        caption: what exactly is drawn.
        png: the content of the file.
        svg: the picture as an element of HTML.
    """

    name: str
    alt: str
    caption: str
    png: bytes
    svg: str

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.name}.png"


def prose(text: str) -> str:
    """A text as one line of Markdown, in which only code between backticks stays markup."""
    parts = _CODE.split(" ".join(text.split()))
    escaped = (part if i % 2 else _INLINE.sub(r"\\\1", part) for i, part in enumerate(parts))
    return _BLOCK.sub(r"\1\\\2", "".join(escaped))


def code(text: str) -> str:
    """A text as one line of code in Markdown, whatever backticks it has."""
    line = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


def markdown_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A Markdown table, the first column left and the others right aligned; cells are Markdown and may hold pipes."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)


def escaped_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A table like that of `markdown_table`, in whose cells nothing is markup."""
    escaped = [tuple(_INLINE.sub(r"\\\1", " ".join(cell.split())) for cell in row) for row in [header, *rows]]
    return markdown_table(escaped[1:], escaped[0])


def picture_paragraphs(folder: str, picture: Picture) -> list[str]:
    """Two paragraphs of Markdown: a picture, which lies in a folder beside the text, and its caption."""
    return [f"![{prose(picture.alt)}]({folder}/{picture.file})", f"*{prose(picture.caption)}*"]
