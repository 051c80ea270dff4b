# SPDX-License-Identifier: Apache-2.0
"""SliceTable against dense matrices."""

import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import slices
from magi_attention.common.slices import SliceTable, distinct, expand_counts, find_double_cover

SIZE = 16
row = st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 9), st.integers(0, 6), st.integers(0, 3)).map(
    lambda r: (r[0], r[0] + r[1], r[2], r[2] + r[3], r[4])
)
tables = st.lists(row, max_size=6).map(SliceTable)


def dense(one):
    q0, q1, k0, k1, kind = (int(x) for x in one)
    i, j = np.mgrid[:SIZE, :SIZE]
    kept = (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1)
    if kind & 1:
        kept &= j <= i + (k1 - q1)
    if kind & 2:
        kept &= j >= i + (k0 - q0)
    return kept


def cover(table):
    return sum((dense(one).astype(int) for one in table.rows), np.zeros((SIZE, SIZE), int))


@given(tables)
def test_areas(table):
    assert table.areas().tolist() == [dense(one).sum() for one in table.rows]
    assert table.area() == cover(table).sum()


@given(tables, st.integers(0, SIZE), st.integers(0, SIZE))
def test_clipping_is_exact(table, start, stop):
    inside = np.zeros(SIZE, int)
    inside[start:stop] = 1
    assert np.array_equal(cover(table.clip_rows(start, stop)), cover(table) * inside[:, None])
    columns = table.clip_columns(start, stop)
    assert np.array_equal(cover(columns), cover(table) * inside[None, :])
    assert len(columns) <= 3 * len(table)
    assert (columns.areas() > 0).all()


@given(tables)
def test_from_bands_of_a_table_is_the_table_without_what_keeps_nothing(table):
    again = SliceTable.from_bands(table.bands())
    assert np.array_equal(cover(again), cover(table))
    assert len(again) == len(table.without_empty())
    assert [dense(a).tolist() for a in again.rows] == [dense(b).tolist() for b in table.without_empty().rows]


@given(tables, st.integers(0, 1), st.integers(0, 1))
def test_shifting(table, rows, columns):
    moved = np.zeros((SIZE, SIZE), int)
    moved[rows:, columns:] = cover(table)[: SIZE - rows, : SIZE - columns]
    assert np.array_equal(cover(table.shift(rows, columns)), moved)


@given(tables)
def test_double_cover_is_found_exactly_when_there_is_one(table):
    doubles = {
        (a, b) for a, b in combinations(range(len(table)), 2) if (dense(table.rows[a]) & dense(table.rows[b])).any()
    }
    found = find_double_cover(table)
    assert (found in doubles) if doubles else found is None


def test_double_cover_among_many_slices():
    documents = [(100 * n, 100 * n + 100, 100 * n, 100 * n + 100, 1) for n in range(5000)]
    assert find_double_cover(SliceTable(documents)) is None
    extra = (123_456, 123_457, 123_400, 123_401, 0)
    assert find_double_cover(SliceTable([*documents, extra])) == (1234, 5000)


def test_overlapping_rectangles_with_disjoint_pairs_are_no_double_cover():
    # Two triangles in one square: what a CAUSAL slice leaves out, shifted by one key.
    assert find_double_cover(SliceTable([[0, 8, 0, 8, 1], [0, 7, 1, 8, 2]])) is None
    assert find_double_cover(SliceTable([[0, 8, 0, 8, 1], [0, 8, 0, 8, 2]])) == (0, 1)


def test_a_table_is_an_immutable_value():
    source = np.array([[0, 4, 0, 4, 1]])
    table = SliceTable(source)
    source[0, 0] = 3
    assert table == SliceTable.from_lists([(0, 4)], [(0, 4)], [1])
    assert hash(table) == hash(SliceTable([[0, 4, 0, 4, 1]]))
    assert table != SliceTable([[0, 4, 0, 4, 0]])
    assert pickle.loads(pickle.dumps(table)) == table
    assert len(SliceTable([])) == 0
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        SliceTable.from_lists([(0, 4)], [], [0])


def test_derived_values_are_built_once():
    table, built = SliceTable([[0, 4, 0, 4, 1]]), []

    def build():
        built.append("area")
        return table.area()

    assert table.derived("area", build) == table.derived("area", build) == 10
    assert built == ["area"]
    table.forget_derived()
    assert table.derived("area", build) == 10
    assert built == ["area", "area"]


def test_derived_values_are_returned_though_another_thread_drops_them_at_once():
    class Dropping(dict):
        def __setitem__(self, name, value):
            pass

    table = SliceTable([[0, 4, 0, 4, 1]])
    table._derived = Dropping()
    assert table.derived("area", table.area) == 10


def test_double_cover_is_found_along_the_axis_with_fewer_pieces():
    # Nested queries over neighboring keys: cut along the queries, n slices would be n * n / 2 pieces.
    rows = [[64 * i, 6400, 64 * i, 64 * i + 64, 0] for i in range(100)]
    assert find_double_cover(SliceTable(rows)) is None
    assert find_double_cover(SliceTable([*rows, [6399, 6400, 128, 129, 0]])) == (2, 100)
    transposed = [[k0, k1, q0, q1, kind] for q0, q1, k0, k1, kind in rows]
    assert find_double_cover(SliceTable([*transposed, [128, 129, 6399, 6400, 0]])) == (2, 100)


@pytest.mark.parametrize("swapped", [False, True])
def test_slices_that_share_no_queries_or_no_keys_are_not_cut_up(monkeypatch, swapped):
    monkeypatch.setattr(slices, "cut_into_slabs", None)
    # Neighbors that touch, in no order, over the same keys.
    rows = np.array([[64, 96, 0, 96, 1], [0, 64, 0, 96, 2], [96, 100, 0, 96, 3], [70, 70, 0, 96, 0]])
    table = SliceTable(rows[:, [2, 3, 0, 1, 4]] if swapped else rows)
    assert find_double_cover(table) is None
    assert find_double_cover(SliceTable([])) is None


def test_expand_counts():
    owner, step = expand_counts(np.array([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert step.tolist() == [0, 1, 0, 1, 2]


def test_distinct():
    assert distinct(np.array([[7, 2], [2, -3], [7, 7]])).tolist() == [-3, 2, 7]
    assert distinct(np.array([5])).tolist() == [5]
    nothing = distinct(np.empty((0, 2), np.int64))
    assert nothing.shape == (0,)
    assert nothing.dtype == np.int64
