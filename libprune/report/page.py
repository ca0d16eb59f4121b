"""The Markdown report as one HTML page that needs nothing beside itself: no network, no scripts, no other file."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from libprune.engine.errors import ArtifactError, missing_key

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 56rem; background: #fff; color: #1a1a1a;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.6rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; overflow-wrap: anywhere; }
td[style*="right"] { white-space: nowrap; }
th, td:first-child { overflow-wrap: normal; }
th { border-bottom: 2px solid #888; }
code { font: 0.88em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: #f3f3f3; padding: 0.1em 0.3em; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { background: #f3f3f3; padding: 0.8rem 1rem; overflow-x: auto; }
pre code { padding: 0; background: none; overflow-wrap: normal; }
p.picture { margin: 1.4rem 0 0.2rem; }
p.picture img { display: block; max-width: 100%; height: auto; }
p.picture + p { margin: 0 0 1.4rem; font-size: 0.88rem; color: #444; }
@page { margin: 15mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  p.picture { break-inside: avoid; break-after: avoid; }
  p.picture img { max-height: 110mm; width: auto; }
  tr, pre { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""


def html_page(text: str, title: str, images: Mapping[str, bytes]) -> str:
    """Render Markdown as a whole HTML page.

    Args:
        text: Markdown with tables; HTML in it is shown as text.
        title: the title of the window.
        images: PNG files by the address under which the text shows them.

    Raises:
        ArtifactError: if the text shows an image that is not given.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for paragraph, inline in pairwise(tokens):
        for child in inline.children or ():
            if child.type == "image":
                _embed(child, images)
                paragraph.attrSet("class", "picture")
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _embed(image: Token, images: Mapping[str, bytes]) -> None:
    """Put the bytes of an image in the place of its address."""
    address = str(image.attrGet("src"))
    if address not in images:
        raise ArtifactError(missing_key(address, images, "the pictures of the report"))
    image.attrSet("src", f"data:image/png;base64,{b64encode(images[address]).decode()}")
