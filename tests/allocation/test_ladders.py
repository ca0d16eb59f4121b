"""Ladders: the removals that are allowed in each block."""

import numpy as np
import pytest

from libprune.pipeline.sections import Allocate
from tests.support.shapes import Shape, ladders_of


@pytest.mark.parametrize("multiple", [3, 5, 6])
def test_the_ranks_of_a_ladder_never_descend_even_where_steps_differ_in_size(multiple):
    shape = Shape(ffn=13)
    params = Allocate(method="global", channel_multiple=multiple)
    for value in np.linspace(0.1, 1, 50):
        ladders = ladders_of(shape.architecture(), shape.table(np.full(len(shape.unit_costs()), value)), params)
        for steps in ladders.values():
            assert (np.diff([step.rank for step in steps]) >= 0).all()
