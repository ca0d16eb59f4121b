"""The page needs nothing beside itself, and runs no script and no style but its own."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import ArtifactError
from libprune.report.markdown import Picture, markdown_table, picture_paragraphs
from libprune.report.page import html_page
from tests.support.page import SKELETON, TABLE, Page

SVG = '<svg viewBox="0 0 1 1" aria-label="what"><rect><title>five</title></rect></svg>'
SHOWN = Picture("one", "what | is * shown", "said <of> it", b"", SVG)
HOSTILE = "<script>1</script><style>*{}</style><img src=x onerror=1> <svg onload=1>"


def page_of(text: str) -> str:
    return html_page(text, "t", {"folder/one.png": SVG})


def test_pictures_become_part_of_the_page_and_nothing_is_fetched():
    html = page_of("\n\n".join(["# Title", *picture_paragraphs("folder", SHOWN), "[a link](https://example.com/x)"]))
    page = Page(html)
    assert html.count(f'<p class="picture">{SVG}</p>') == 1
    assert "<em>said &lt;of&gt; it</em>" in html
    loading = {"link", "iframe", "object", "embed", "base", "source", "video", "audio", "img"}
    assert not loading & {tag for tag, _ in page.tags}
    assert all("src" not in attrs for _, attrs in page.tags)
    assert "url(" not in page.texts["style"][0]
    assert "@import" not in page.texts["style"][0]


@given(st.text(max_size=9), st.sampled_from(["", "| a | b |\n|---|---:|\n| 1 | 2 |", HOSTILE]))
def test_the_policy_allows_the_one_script_and_the_one_style_by_their_digests_and_no_attribute_needs_more(words, text):
    page = Page(html_page(text, words, {}))
    policy = next(attrs["content"] or "" for _, attrs in page.tags if attrs.get("http-equiv"))
    allowed = dict(entry.strip().split(" ", 1) for entry in policy.split(";"))
    assert allowed.keys() == {"default-src", "base-uri", "form-action", "img-src", "style-src", "script-src"}
    assert {allowed[name] for name in ("default-src", "base-uri", "form-action")} == {"'none'"}
    assert allowed["img-src"] == "data:"
    for tag in ("style", "script"):
        (content,) = page.texts[tag]
        assert allowed[f"{tag}-src"] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert {tag for tag, _ in page.tags} <= {*SKELETON, *TABLE}


def test_a_table_lies_in_a_box_that_scrolls_and_numbers_are_marked():
    html = page_of(markdown_table([("x", "1")], ("one", "two")))
    assert html.count('<div class="table"><table>') == html.count("</table></div>") == 1
    assert re.findall(r'<t[hd] class="number">(\w+)', html) == ["two", "1"]


def test_a_picture_that_is_not_given_is_refused():
    with pytest.raises(ArtifactError, match=r"folder/on\.png"):
        page_of("![x](folder/on.png)")
