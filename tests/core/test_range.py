# SPDX-License-Identifier: Apache-2.0
"""AttnRange against plain sets of positions."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, RangeError
from magi_attention.common.protocols import AttnRangeProtocol
from magi_attention.common.range import InvalidRangeError

bounds = st.tuples(st.integers(-8, 12), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))
a_range = bounds.map(lambda pair: AttnRange(*pair))


def positions(*ranges):
    return set().union(*(range(each.start, each.end) for each in ranges))


@given(a_range, a_range)
def test_pairs_of_ranges_behave_like_sets(a, b):
    common = positions(a) & positions(b)
    assert positions(a.intersect(b)) == common
    assert a.intersect_size(b) == len(common)
    assert positions(*a.union(b)) == positions(a, b)
    assert a.union_size(b) == len(positions(a, b))
    assert positions(*a.diff_by(b)) == positions(b) - positions(a)
    assert all(not part.is_empty() for part in a.diff_by(b))
    if not a.is_empty() and not b.is_empty():
        assert a.is_overlap_with(b) == bool(common)
        assert a.is_subrange_of(b) == (positions(a) <= positions(b))
        assert (len(a.union(b)) == 1) == bool(common)


@given(a_range, st.none() | st.integers(-10, 20), st.none() | st.integers(-10, 20))
def test_truncate_keeps_what_lies_between_the_bounds(a, start, end):
    wanted = {i for i in positions(a) if (start is None or i >= start) and (end is None or i < end)}
    assert positions(a.truncate(start, end)) == wanted


@given(a_range, st.integers(-5, 5))
def test_copies_are_new_and_equal(a, shift):
    for copy in (a.clone(), AttnRange.from_range(a), AttnRange.from_range(a.to_naive_range()), a.offset(0)):
        assert copy == a
        assert copy is not a
        assert hash(copy) == hash(a)
    assert positions(a.offset(shift)) == {i + shift for i in positions(a)}
    assert pickle.loads(pickle.dumps(a)) == a


def test_what_disjoint_touching_and_empty_ranges_give():
    assert AttnRange(0, 3).intersect(AttnRange(5, 9)) == AttnRange(3, 3)
    assert AttnRange(0, 3).union(AttnRange(3, 5)) == [AttnRange(0, 3), AttnRange(3, 5)]
    assert AttnRange(4, 4).union(AttnRange(0, 9)) == [AttnRange(4, 4), AttnRange(0, 9)]
    assert AttnRange(0, 5).truncate(start=10) == AttnRange(10, 10)
    assert AttnRange(4, 4).is_overlap_with(AttnRange(0, 9))
    assert not AttnRange(0, 0).is_overlap_with(AttnRange(0, 9))


def test_basic_properties():
    a = AttnRange(2, 7)
    assert (a.start, a.end, a.seqlen, len(a), repr(a)) == (2, 7, 5, 5, "[2, 7)")
    assert not AttnRange(3, 3)
    assert a != (2, 7)
    assert AttnRange.from_range([2, 7]) == AttnRange.from_range(np.array([2, 7])) == a
    assert a.is_valid_open()
    assert a.is_valid_close(end=2)
    assert not a.is_valid_open(end=2)
    assert not a.is_valid_close(start=8)
    assert isinstance(a, AttnRangeProtocol)
    a.start, a.end = 4, 6
    assert a == AttnRange(4, 6)


def set_start():
    AttnRange(0, 5).start = 6


def set_end():
    AttnRange(2, 5).end = 1


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: AttnRange(5, 4),
        lambda: AttnRange.from_range((5, 4), check=True),
        lambda: AttnRange(0, 5).check_valid(start=6),
        set_start,
        set_end,
    ],
)
def test_an_invalid_range_is_both_a_range_error_and_a_value_error(mistake):
    with pytest.raises(InvalidRangeError, match=r"start behind its end: \[\d, \d\)") as caught:
        mistake()
    assert isinstance(caught.value, RangeError)
    assert isinstance(caught.value, ValueError)


def test_a_failed_setter_leaves_the_range_as_it_was_and_says_how_to_move_it():
    a = AttnRange(0, 5)
    with pytest.raises(RangeError, match="set the bound that leads first, or take offset"):
        a.start = 9
    assert a == AttnRange(0, 5)
    a.end, a.start = 14, 9
    assert a == AttnRange(0, 5).offset(9)


def test_range_error_is_a_direct_subclass_of_exception():
    assert RangeError.__bases__ == (Exception,)


@pytest.mark.parametrize("wrong", [3, (1, 2, 3), None])
def test_what_is_no_pair_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="pair"):
        AttnRange.from_range(wrong)


def test_bounds_must_be_integers():
    with pytest.raises(TypeError):
        AttnRange(0.5, 2)
