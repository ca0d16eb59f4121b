"""The parts that all pictures share: style, palette, axes, and PNG bytes that depend on nothing but the data."""

import io
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["MPLBACKEND"] = "agg"
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# Matplotlib reads the environment once, at its import, and warns there of read-only homes and odd rc files.
import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

__all__ = [
    "Axes",
    "Bbox",
    "Figure",
    "LogLocator",
    "LogNorm",
    "NullFormatter",
    "Patch",
    "Rectangle",
    "StrMethodFormatter",
]  # pictures take these from here, never from matplotlib before it

BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"
"""Colours that colour-blind readers and grey print can distinguish (Okabe and Ito, Color Universal Design, 2008)."""
INK, GREY = "#222222", "#888888"
"""Colours of lines that mark a value, and of missing values."""

WIDTH = 8.5
"""Width of a picture that stands alone, in inches."""
PAGE_WIDTH = 5.4
"""Width of the pictures of the report, in inches: so narrow that their words can be read on a phone."""
_DPI = 140
PAGE_DPI = 220
"""Pixels an inch that give pictures of both widths as many pixels."""
_STYLE = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
}
_BACKENDS = {"backend", "backend_fallback"}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of the pictures on matplotlib's own defaults, whatever a matplotlibrc of the user says."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in _BACKENDS}
    with matplotlib.rc_context(defaults | _STYLE):
        yield


def new_figure(panels: int, panel_height: float) -> tuple[Figure, list[Axes]]:
    """A white page as wide as the report's, with panels below each other that share the x axis.

    Args:
        panels: number of panels.
        panel_height: height of each panel, in inches.
    """
    figure = Figure(figsize=(PAGE_WIDTH, panels * panel_height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


@styled()
def draw_note(text: str) -> Figure:
    """A picture that shows only a text."""
    figure, (axes,) = new_figure(1, 1.2)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color=INK)
    return figure


def png(figure: Figure, dpi: int = _DPI) -> bytes:
    """The picture as a PNG file without date or program name: the same figure gives the same bytes.

    Args:
        figure: the figure; it is drawn, and so laid out.
        dpi: pixels an inch.
    """
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def set_title(axes: Axes, text: str, width: int = 64) -> None:
    """Give a panel a title in lines of so many letters, which fit a picture of the report."""
    axes.set_title("\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width)), fontsize=9.5)


def layer_axis(axes: Axes, layers: Sequence[int] | NDArray[Any], most: int = 20) -> None:
    """Number the layers along x, each where there is room, else at even distances; the lowest panel names the axis.

    Args:
        axes: the panel.
        layers: the numbers of the layers.
        most: the largest number of even distances that there is room for.
    """
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    place = axes.get_subplotspec()
    axes.set_xlabel("layer" if place is not None and place.is_last_row() else "")


def value_scale(axes: Axes, values: NDArray[Any], which: str) -> None:
    """Scale an axis: logarithmic for positive values, else symmetric logarithmic; linear for a single value.

    Args:
        axes: the panel.
        values: the values that it shows; those that are not finite do not count.
        which: `x` or `y`.
    """
    set_scale = getattr(axes, f"set_{which}scale")
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() == finite.max():
        set_scale("linear")
    elif finite.min() > 0:
        set_scale("log")
    else:
        set_scale("symlog", linthresh=linear_below(finite), linscale=0.5)


_WIDE = 3.0
"""Ratio of largest to smallest value from which an axis of ratios is logarithmic."""
_DECADES = 30.0
"""Ratio from which only powers of ten are numbered."""


def ratio_scale(axes: Axes, values: Sequence[float], which: str) -> None:
    """Scale an axis of ratios: logarithmic where they differ much, with plain numbers at even steps.

    Args:
        axes: the panel.
        values: the ratios that it shows, at least one.
        which: `x` or `y`.
    """
    if min(values) <= 0 or max(values) <= _WIDE * min(values):
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    few = max(values) < _DECADES * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if few else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def linear_below(values: NDArray[Any]) -> float:
    """Size below which a symmetric logarithmic axis is linear: a power of ten near the 10 % quantile of |values|."""
    sizes = np.abs(values[values != 0])
    return float(10 ** np.floor(np.log10(np.quantile(sizes, 0.1)))) if len(sizes) else 1.0


def whole_numbers(axes: Axes) -> None:
    """Make the y axis one of counts: whole numbers, with room above the largest."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
