# SPDX-License-Identifier: Apache-2.0
"""Which rows travel when the sequence is rolled, carried out on arrays."""

import gc
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.plan.layout import Layout
from magi_attention.plan.roll import MOST_SHIFTS, roll_exchange
from tests.core.test_plan import cast, layouts, positions


@given(layouts(), st.integers(-200, 200))
def test_each_row_comes_from_where_it_was(case, shift):
    _, layout = case
    own = positions(layout)
    received = cast([roll_exchange(layout, rank, shift) for rank in range(layout.num_ranks)], own)
    for rows, got in zip(own, received, strict=True):
        real = rows[rows < layout.num_real]
        assert got.tolist() == ((real - shift) % layout.num_real).tolist()


def test_shifts_that_are_drawn_anew_fill_no_memory():
    layout = Layout(num_real=512, total=512, chunk_size=64, num_ranks=2, owner=np.array([0, 1, 1, 0, 0, 1, 1, 0]))
    tables = [weakref.ref(roll_exchange(layout, 0, shift)) for shift in range(1, 500)]
    gc.collect()
    assert 1 <= sum(table() is not None for table in tables) <= MOST_SHIFTS
    assert roll_exchange(layout, 0, 7) is roll_exchange(layout, 0, 7 - 512)
