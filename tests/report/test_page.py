"""The page: it needs nothing beside itself, and shows what users wrote as text."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import ArtifactError
from libprune.report.markdown import Picture, code, markdown_table, picture, prose
from libprune.report.page import html_page
from tests.support.page import SKELETON, TABLE, Page

PNG = b"\x89PNG made up"
SHOWN = Picture("one", "what | is * shown", "said <of> it", PNG)
HARSH = st.text(st.sampled_from("ab<>&|`*_[]()!#-+.:/\\~\"' \n1"), max_size=24)


def test_images_become_part_of_the_page_and_nothing_is_fetched():
    text = "\n\n".join(["# Title", *picture("folder", SHOWN), "[a link](https://example.com/x)"])
    page = Page(html_page(text, "t", {"folder/one.png": PNG}))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [image["src"] for image in images] == [f"data:image/png;base64,{b64encode(PNG).decode()}"]
    assert images[0]["alt"] == SHOWN.alt
    loading = {"script", "link", "iframe", "object", "embed", "base", "source", "video", "audio"}
    assert not loading & {tag for tag, _ in page.tags}
    assert all("src" not in attrs for tag, attrs in page.tags if tag != "img")
    assert "url(" not in page.texts["style"][0]
    assert "@import" not in page.texts["style"][0]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_the_caption_follows_its_picture_and_both_are_marked_for_print():
    html = html_page("\n\n".join(picture("folder", SHOWN)), "t", {"folder/one.png": PNG})
    assert '<p class="picture"><img' in html
    assert "<em>said &lt;of&gt; it</em>" in html


def test_an_image_that_is_not_given_is_refused():
    with pytest.raises(ArtifactError, match=r"folder/on\.png"):
        html_page("![x](folder/on.png)", "t", {"folder/one.png": PNG})


@given(HARSH)
def test_code_shows_a_users_text_letter_by_letter_in_one_line(text):
    line = " ".join(text.split())
    for markdown in (f"before {code(text)} after", markdown_table([("x", code(text))], ("one", "two"))):
        page = Page(html_page(markdown, text, {}))
        assert page.texts.get("code", [""]) == [line]
        assert {tag for tag, _ in page.tags} <= {*SKELETON, "code", *TABLE}
        assert page.texts["title"] == [text]


@given(HARSH)
def test_prose_shows_a_users_text_as_text_at_the_start_of_a_line_in_a_list_and_in_a_table(text):
    line = " ".join(text.split())
    table = markdown_table([("x", prose(text))], ("one", "two"))
    for markdown, around in ((prose(text), "p"), (f"- {prose(text)}", "li"), (table, "tr")):
        page = Page(html_page(markdown, "t", {}))
        assert {tag for tag, _ in page.tags} <= {*SKELETON, "code", *TABLE, "ul", "li"}
        shown = page.texts.get(around, [""])[-1].strip().removeprefix("x").strip()
        assert shown.replace("`", "").split() == line.replace("`", "").split()
