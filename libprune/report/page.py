"""The Markdown report as one HTML page that needs nothing beside itself: no network, no other file.

Its own style sheet and script are named in its policy by their digests, so that a browser runs no other: whatever a
text from elsewhere holds, it is shown and not obeyed. The page says everything without the script too.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from libprune.engine.errors import ArtifactError, missing_key

_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"  # a colour bar is an image
_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def html_page(text: str, title: str, pictures: Mapping[str, str]) -> str:
    """Render Markdown as a whole HTML page.

    Args:
        text: Markdown with tables; HTML in it is shown as text.
        title: the title of the window.
        pictures: SVG elements by the address under which the text shows them; they are trusted.

    Raises:
        ArtifactError: if the text shows a picture that is not given.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _open_table)
    parser.add_render_rule("table_close", _close_table)
    tokens = parser.parse(text)
    for paragraph, inline in pairwise(tokens):
        if "text-align:right" in str(paragraph.attrs.pop("style", "")):
            paragraph.attrSet("class", "number")
        for child in inline.children or ():
            if child.type == "image":
                _embed(child, pictures)
                paragraph.attrSet("class", "picture")
    body = parser.renderer.render(tokens, parser.options, {})
    own = f"style-src {_digest(_STYLE)}; script-src {_digest(_SCRIPT)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}; {own}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    """The source of a style sheet or script in a policy."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _open_table(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A table scrolls in a box of its own where it is wider than the page."""
    return f'<div class="table">{renderer.renderToken(tokens, index, options, env)}'


def _close_table(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return f"{renderer.renderToken(tokens, index, options, env).rstrip()}</div>\n"


def _embed(image: Token, pictures: Mapping[str, str]) -> None:
    """Put a picture in the place of its address."""
    address = str(image.attrGet("src"))
    if address not in pictures:
        raise ArtifactError(missing_key(address, pictures, "the pictures of the report"))
    image.type, image.content, image.children = "html_inline", pictures[address], None
