"""The page needs nothing beside itself."""

from base64 import b64encode

import pytest

from libprune.engine.errors import ArtifactError
from libprune.report.markdown import Picture, picture_paragraphs
from libprune.report.page import html_page
from tests.support.page import Page

PNG = b"\x89PNG made up"
SHOWN = Picture("one", "what | is * shown", "said <of> it", PNG)


def test_images_become_part_of_the_page_and_nothing_is_fetched():
    text = "\n\n".join(["# Title", *picture_paragraphs("folder", SHOWN), "[a link](https://example.com/x)"])
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
    html = html_page("\n\n".join(picture_paragraphs("folder", SHOWN)), "t", {"folder/one.png": PNG})
    assert '<p class="picture"><img' in html
    assert "<em>said &lt;of&gt; it</em>" in html


def test_an_image_that_is_not_given_is_refused():
    with pytest.raises(ArtifactError, match=r"folder/on\.png"):
        html_page("![x](folder/on.png)", "t", {"folder/one.png": PNG})
