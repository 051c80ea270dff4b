# SPDX-License-Identifier: Apache-2.0
"""Which rows travel when the sequence is rolled, carried out on arrays."""

from hypothesis import given
from hypothesis import strategies as st

from magi_attention.plan.roll import roll_exchange
from tests.core.test_plan import cast, layouts, positions


@given(layouts(), st.integers(-200, 200))
def test_each_row_comes_from_where_it_was(case, shift):
    _, layout = case
    own = positions(layout)
    received = cast([roll_exchange(layout, rank, shift) for rank in range(layout.num_ranks)], own)
    for rows, got in zip(own, received, strict=True):
        real = rows[rows < layout.num_real]
        assert got.tolist() == ((real - shift) % layout.num_real).tolist()
