"""The table of widths: its rows, its parameters, and how it is printed."""

import numpy as np

from libprune.engine.describe import describe
from libprune.narrowing.table import empty_table, print_widths, width_table
from tests.support.models import FAMILIES


def test_the_table_counts_what_is_left_and_averages_over_sequences(capsys):
    architecture = describe(FAMILIES["llama"](0))
    table = width_table(architecture, [24, 18], np.array([[1.0, 3.0], [2.0, 6.0]]))
    assert table["width"].tolist() == [24, 18]
    assert table["divergence"].tolist() == [2.0, 4.0]
    assert table["standard_error"].tolist() == [1.0, 2.0]
    totals = [architecture.narrowed(width).total_parameters for width in (24, 18)]
    assert table["parameters"].tolist() == totals
    assert empty_table().keys() == table.keys()
    assert all(len(column) == 0 for column in empty_table().values())
    print_widths(table)
    assert "2000.0" in capsys.readouterr().out
