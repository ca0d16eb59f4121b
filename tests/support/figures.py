"""Reading what a figure says."""

from libprune.report.canvas import Figure


def titles(figure: Figure) -> list[str]:
    """The titles of its panels, each in one line."""
    return [" ".join(axes.get_title(loc="left").split()) for axes in figure.axes if axes.get_title(loc="left")]


def legend(figure: Figure) -> list[str]:
    """The texts of its legends."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for one in legends if one is not None for text in one.get_texts()]
