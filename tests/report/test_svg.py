"""A picture of the page says what the figure says, point by point, and asks for no style and no script."""

import re
from functools import cache
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.report.canvas import new_figure, styled
from libprune.report.cut_pictures import draw_kept_share, draw_scores, draw_sensitivity
from libprune.report.gradient_pictures import draw_grad_heatmap, draw_layer_variance
from libprune.report.recovery import draw_learning_curve
from libprune.report.svg import find_spots, svg
from tests.support.evaluated import RECOVERY
from tests.support.tables import PLAN_META, gradient_rows, plan_rows, sensitivity_rows

PLAN = plan_rows(3, np.random.default_rng(0).normal(size=30))
DRAWN = {
    "kept": lambda: draw_kept_share(PLAN, PLAN_META),
    "scores": lambda: draw_scores(PLAN, PLAN_META),
    "sensitivity": lambda: draw_sensitivity(sensitivity_rows(3)),
    "heatmap": lambda: draw_grad_heatmap(gradient_rows(3)),
    "variance": lambda: draw_layer_variance(gradient_rows(3)),
    "training": lambda: draw_learning_curve(RECOVERY),
}


@cache
def drawn(name: str) -> str:
    return svg(DRAWN[name](), name, "alt")


def texts(name: str) -> list[str]:
    """The titles in a drawn picture."""
    return [title.text or "" for title in ElementTree.fromstring(drawn(name)).iter("title")]


def test_the_same_figure_gives_the_same_text():
    assert svg(DRAWN["scores"](), "scores", "alt") == drawn("scores")


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_one_element_whose_names_are_its_own_and_whose_colours_follow_the_theme(name):
    text = drawn(name)
    root = ElementTree.fromstring(text)
    assert (root.tag, root.get("aria-label")) == ("svg", "alt")
    names = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(names) == len(set(names))
    used = re.findall(r'(?:href="|url\()#([\w-]+)', text)
    assert set(used) == set(names)
    assert all(one.startswith(f"{name}-") for one in names)
    assert not {"style", "script", "metadata"} & {element.tag for element in root.iter()}
    assert not any(key == "style" or key.startswith("on") or "{" in key for one in root.iter() for key in one.attrib)
    assert not re.search(r'"#(?:000000|222222|ffffff|dddddd)"', text)


@pytest.mark.parametrize("name", DRAWN)
def test_every_spot_lies_in_the_picture(name):
    root = ElementTree.fromstring(drawn(name))
    _, _, wide, tall = map(float, str(root.get("viewBox")).split())
    (group,) = (one for one in root.iter("g") if one.get("class") == "spots")
    assert len(group)
    for spot in group:
        x, y, width, height = (float(str(spot.get(key))) for key in ("x", "y", "width", "height"))
        assert -9 <= x <= x + width <= wide + 9
        assert -9 <= y <= y + height <= tall + 9
        assert min(width, height) > 0


def test_spots_say_the_values_of_the_tables():
    rows = gradient_rows(3)
    here = (rows["layer_idx"] == 2) & (rows["parameter"] == "mlp.up_proj.weight")
    assert f"layer 2, mlp.up_proj: {rows['mean_abs'][here].mean():.3g}" in texts("heatmap")
    table = sensitivity_rows(3)
    increase = table["loss_increase"][np.flatnonzero(table["removed"] == "mlp")[1]]
    assert f"layer 1, MLP only: {increase:.4g} ± 0.01" in texts("sensitivity")
    kept = 100 * PLAN["keep"][(PLAN["layer_idx"] == 1) & (PLAN["group_type"] == "mlp")].mean()
    assert f"layer 1, kept: {kept:.4g} %" in texts("kept")
    assert "tokens trained on 20,480, held-out sequences: 0.4321" in texts("training")
    assert any(
        text.startswith("layer 2, coefficient of variation: ") and text.endswith(" %") for text in texts("variance")
    )


def test_the_spots_of_a_histogram_count_every_unit_once():
    found = [re.fullmatch(r"score of a unit by .* to .*, (kept|removed): ([\d,]+)", text) for text in texts("scores")]
    counted = {fate: sum(int(one[2]) for one in found if one and one[1] == fate) for fate in ("kept", "removed")}
    assert counted == {"kept": PLAN["keep"].sum(), "removed": (~PLAN["keep"]).sum()}


def test_a_spot_lies_where_its_point_is_drawn():
    with styled():
        figure, (axes,) = new_figure(1, 2.0)
        axes.plot([1, 2], [3, 4], "o", label="line")
        axes.set_xlabel("x")
    root = ElementTree.fromstring(svg(figure, "a", ""))
    markers = [(float(str(use.get("x"))), float(str(use.get("y")))) for use in root.iter("use")][-2:]
    for (left, top, width, height), (x, y) in zip((spot.box for spot in find_spots(figure)), markers, strict=True):
        assert (left + width / 2, top + height / 2) == pytest.approx((x, y), abs=0.6)


WORDS = st.text(st.sampled_from("a<>&\"';{}\x00\x1b\u2028é日#"), min_size=1, max_size=12).map(lambda text: f"n{text}")


@settings(max_examples=10)
@given(WORDS, WORDS)
def test_words_from_elsewhere_stay_words(label, alt):
    with styled():
        figure, (axes,) = new_figure(1, 2.0)
        axes.plot([1], [3], "o", label=label)
        axes.set_xlabel("<a & b>")
    root = ElementTree.fromstring(svg(figure, "a", alt))
    allowed = {"svg", "g", "defs", "path", "use", "text", "tspan", "rect", "title", "clipPath"}
    assert {element.tag for element in root.iter()} <= allowed
    shown = re.sub("[\x00\x1b]", "\ufffd", label)
    assert [title.text for title in root.iter("title")] == [f"<a & b> 1, {shown}: 3"]
    assert root.get("aria-label") == re.sub("[\x00\x1b]", "\ufffd", alt)
