"""A hook of mkdocs, so that the pages read on the site as they do on git hosts."""

import re
from typing import Any

_ITEM = re.compile(r"- |1\. ")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links out of docs/, which the site does not have, plain text, and let lists follow paragraphs directly."""
    outside = "../" * (page.file.src_uri.count("/") + 1)
    lines, fenced = [""], False
    for line in re.sub(rf"\[([^\]]*)\]\({re.escape(outside)}[^)]*\)", r"\1", markdown).split("\n"):
        fenced ^= line.startswith("```")
        if _ITEM.match(line) and not fenced and re.match(r"(?!- |\d+\. )\S", lines[-1]):
            lines.append("")
        lines.append(line)
    return "\n".join(lines[1:])
