# SPDX-License-Identifier: Apache-2.0
"""Interval algebra, against sets of rows."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common.intervals import intersect, merge, overlaps, split_at, subtract


def as_array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.int64).reshape(-1, 2)


def rows(intervals: np.ndarray) -> list[int]:
    return [row for start, stop in intervals.tolist() for row in range(start, stop)]


any_intervals = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6))).map(
    lambda each: as_array([(start, start + length) for start, length in each])
)
"""Sorted or not, empty ones among them."""


@st.composite
def sorted_intervals(draw):
    """Sorted, disjoint and not empty; some touch."""
    cuts = sorted(draw(st.sets(st.integers(0, 26), min_size=1)))
    return as_array([pair for pair in pairwise(cuts) if draw(st.booleans())])


@given(any_intervals)
def test_merged_intervals_are_the_runs_of_all_rows(intervals):
    merged = merge(intervals)
    assert rows(merged) == sorted({*rows(intervals)})
    assert (merged[:, 0] < merged[:, 1]).all()
    assert (merged[1:, 0] > merged[:-1, 1]).all()


@given(any_intervals, sorted_intervals())
def test_intervals_are_cut_along_the_tiles_that_they_meet(intervals, tiles):
    expected = {
        (i, t): [max(a, c), min(b, d)]
        for i, (a, b) in enumerate(intervals.tolist())
        for t, (c, d) in enumerate(tiles.tolist())
        if max(a, c) < min(b, d)
    }
    pieces, interval, tile = intersect(intervals, tiles)
    assert pieces.tolist() == [*expected.values()]
    assert [*zip(interval.tolist(), tile.tolist(), strict=True)] == [*expected]
    assert [each.tolist() for each in overlaps(intervals, tiles)] == [interval.tolist(), tile.tolist()]


@given(sorted_intervals(), sorted_intervals())
def test_what_is_left_has_no_rows_of_the_holes(intervals, holes):
    left = subtract(intervals, holes)
    assert rows(left) == [row for row in rows(intervals) if row not in {*rows(holes)}]
    assert (left[:, 0] < left[:, 1]).all()


@given(any_intervals, st.lists(st.integers(-2, 40)).map(lambda cuts: np.array(cuts, np.int64)))
def test_split_intervals_keep_their_rows_in_order(intervals, cuts):
    pieces, before = split_at(intervals, cuts)
    assert rows(pieces) == rows(intervals)
    lengths = (pieces[:, 1] - pieces[:, 0]).tolist()
    assert all(lengths)
    assert before.tolist() == [sum(lengths[:n]) for n in range(len(lengths))]
    total = sum(lengths)
    assert {*before.tolist()} >= {cut for cut in cuts.tolist() if 0 < cut < total}
    ends = np.cumsum(intervals[:, 1] - intervals[:, 0])
    assert {*before.tolist()} <= {0, *cuts.tolist(), *ends.tolist()}
