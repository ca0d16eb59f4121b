"""The report in a real browser: it fits a phone and a desk, in both themes, and its script does what it says."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from libprune.curves.beside import describe_beside
from libprune.report.gallery import cut_gallery, gradient_gallery, recovery_gallery, sensitivity_gallery
from libprune.report.page import html_page
from libprune.report.report import PICTURES, compose_report
from tests.support.browser import VARIABLE, Tab, browsing, find_chromium
from tests.support.evaluated import LAYOUT, PROVENANCE, RECOVERY, trained
from tests.support.swept import swept
from tests.support.tables import PLAN_META, gradient_rows, plan_rows, sensitivity_rows

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"there is no Chromium on the PATH, and {VARIABLE} does not name one"
)
LONG = "verylongname" * 12
BOXES = """[...document.querySelectorAll("body *")].filter((one) => !one.closest(".table, pre, svg")
  && one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map((one) => one.outerHTML)"""
"""What is wider than the page, but for what lies in a box that scrolls."""
LUMINANCE = """(colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((one) => (one / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
CONTRASTS = f"""(() => {{ const luminance = {LUMINANCE};
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = (one) => (Math.max(one, paper) + 0.05) / (Math.min(one, paper) + 0.05);
  return [...document.querySelectorAll("h1, p, td, th, li, svg text")].map((one) => {{
    const look = getComputedStyle(one);
    return ratio(luminance(one.closest("svg") ? look.fill : look.color)); }}); }})()"""
"""Contrasts of all texts with the page, by the definition of WCAG with a plain gamma."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with every picture and table, long words, and words that look like scripts."""
    rows = swept(1, words=1)
    beside, curve = describe_beside(rows, rows[0])
    plan = plan_rows(30, np.random.default_rng(0).normal(size=300))
    pictures = [*gradient_gallery(gradient_rows(30)), *cut_gallery(plan, PLAN_META), curve]
    pictures += sensitivity_gallery(sensitivity_rows(30)) + recovery_gallery(RECOVERY)
    result = trained(text=LONG)
    hostile = {"prompt": "<script>document.title = 'run'</script>", "dense": f"<img src=x onerror=alert(1)>{LONG}"}
    result["continuations"][0] |= hostile
    result["exported"] = [EXPORTED]
    text = compose_report(result, LAYOUT, PROVENANCE, pictures, 12.3, beside)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html_page(text, "a title", {f"{PICTURES}/{one.file}": one.svg for one in pictures}))
    return path


EXPORTED = {
    "format": "gguf f16",
    "file": f"exported/{LONG}.gguf",
    "program": "llama.cpp",
    "bytes": 226_000_000,
    "dense_bytes": 269_000_000,
    "quantised_bytes": None,
    "dense_quantised_bytes": None,
    "agreement": {"divergence": 1e-5, "same_written": 31, "written": 32},
    "speed": {"prefill_ratio": 1.1, "decode_ratio": 1.2},
    "not_tried": None,
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Iterator[Tab]:
    with browsing(str(CHROMIUM), tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_and_can_be_read_and_nothing_is_complained_of(tab, page, width, theme):
    tab.show(page, width, theme)
    assert tab.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [width, width]
    assert tab.value(BOXES) == []
    assert tab.value("document.querySelector('.table').scrollWidth <= document.querySelector('.table').clientWidth")
    assert tab.value("matchMedia('(prefers-color-scheme: dark)').matches") is (theme == "dark")
    contrasts = tab.value(CONTRASTS)
    assert len(contrasts) > 300
    assert min(contrasts) > 4.5
    assert (
        tab.value(
            "Math.min(...[...document.querySelectorAll('svg text')].map((one) => one.getBBox().height"
            " * one.ownerSVGElement.getScreenCTM().a))"
        )
        > 7
    )
    assert tab.value("document.title") == "a title"
    assert tab.complaints() == []
    assert tab.fetched() == [page.as_uri()]


def test_without_the_script_all_is_there_and_values_are_titles(tab, page):
    tab.show(page, 400, "light", script=False)
    assert tab.value("document.querySelectorAll('th button, .value').length") == 0
    without = tab.value("document.body.innerText.replace(/[↕\\s]/g, '')")
    assert tab.value("document.querySelectorAll('.spots title').length") > 500
    assert tab.complaints() == []
    tab.show(page, 400, "light")
    assert tab.value("document.body.innerText.replace(/[↕\\s]/g, '')") == without


COLUMN = """(() => { const tables = [...document.querySelectorAll("table")];
  const table = tables.find((one) => one.tHead.innerText.includes("decoder removed"));
  return [...table.tBodies[0].rows].map((row) => row.cells[%d].innerText); })()"""


def test_the_head_of_a_column_sorts_the_table_up_and_down_and_back(tab, page):
    tab.show(page, 1280, "light")
    heads = """[...document.querySelectorAll("table")].find((one) => one.tHead.innerText.includes("decoder removed"))
      .tHead.rows[0].cells"""
    names = tab.value(f"[...{heads}].map((one) => one.innerText)")
    column = next(place for place, name in enumerate(names) if name.startswith("perplexity"))
    first = tab.value(COLUMN % column)
    assert len(first) == len(set(first)) == 3
    seen = []
    for _ in range(3):
        tab.value(f"{heads}[{column}].scrollIntoView({{block: 'center'}})")
        x, y, wide, tall = tab.value(
            f"(() => {{ const box = {heads}[{column}].querySelector('button').getBoundingClientRect();"
            " return [box.x, box.y, box.width, box.height]; })()"
        )
        tab.click(x + wide / 2, y + tall / 2)
        seen.append((tab.value(f"{heads}[{column}].getAttribute('aria-sort')"), tab.value(COLUMN % column)))
    assert seen == [("ascending", sorted(first)), ("descending", sorted(first)[::-1]), ("none", first)]


@pytest.mark.parametrize("width", [400, 1280])
def test_a_point_says_its_value_under_the_mouse_inside_the_window(tab, page, width):
    tab.show(page, width, "dark")
    for place in (0, -1):
        x, y = tab.value(
            f"(() => {{ const spot = [...document.querySelectorAll('.spots rect')].at({place});"
            " spot.scrollIntoView({block: 'center'}); const box = spot.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        tab.mouse("mouseMoved", 1, 1)
        assert tab.value("document.querySelector('.value').hidden")
        tab.mouse("mouseMoved", x, y)
        said, left, right = tab.value(
            "(() => { const value = document.querySelector('.value'), box = value.getBoundingClientRect();"
            " return [value.innerText, box.left, box.right]; })()"
        )
        assert ": " in said
        assert 0 <= left < right <= width
    assert tab.complaints() == []
