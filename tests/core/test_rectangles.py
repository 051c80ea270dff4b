# SPDX-License-Identifier: Apache-2.0
"""AttnRectangle and AttnRectangles against plain sets of pairs."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from magi_attention.common import AttnMaskType, AttnRange, AttnRanges, AttnRectangle, AttnRectangles
from magi_attention.common.protocols import AttnRectangleProtocol, AttnRectanglesProtocol

pair = st.tuples(st.integers(-2, 8), st.integers(1, 6)).map(lambda p: (p[0], p[0] + p[1]))
diagonals = st.none() | st.tuples(st.integers(-8, 8), st.integers(0, 6)).map(lambda p: (p[0], p[0] + p[1]))
given_as = st.tuples(pair, pair, diagonals, st.sampled_from(AttnMaskType))


def meant(q, k, d, kind):
    """The pairs that the arguments of a rectangle mean, by the definition of the mask types."""
    lower = k[0] - q[0] if kind in (AttnMaskType.INVCAUSAL, AttnMaskType.BICAUSAL) else -99
    upper = k[1] - q[1] if kind in (AttnMaskType.CAUSAL, AttnMaskType.BICAUSAL) else 99
    lower, upper = (max(lower, d[0]), min(upper, d[1])) if d else (lower, upper)
    return {(i, j) for i in range(*q) for j in range(*k) if lower <= j - i <= upper}


def make(q, k, d, kind):
    return AttnRectangle(AttnRange(*q), AttnRange(*k), AttnRange(*d) if d else None, kind)


def pairs(rect):
    if rect is None:
        return set()
    q, k, d = (r.to_naive_range() for r in (rect.q_range, rect.k_range, rect.d_range))
    return meant(q, k, d, AttnMaskType.FULL)


@st.composite
def rectangles(draw):
    arguments = draw(given_as)
    assume(meant(*arguments))
    return make(*arguments)


@given(given_as)
def test_a_rectangle_keeps_what_its_arguments_mean_and_is_tight(arguments):
    wanted = meant(*arguments)
    if not wanted:
        with pytest.raises(ValueError, match="no pair"):
            make(*arguments)
        return
    rect = make(*arguments)
    assert pairs(rect) == wanted
    assert rect.area() == len(wanted)
    rows, columns = {i for i, _ in wanted}, {j for _, j in wanted}
    assert rect.q_range == AttnRange(min(rows), max(rows) + 1)
    assert rect.k_range == AttnRange(min(columns), max(columns) + 1)
    assert rect.d_range == AttnRange(min(j - i for i, j in wanted), max(j - i for i, j in wanted))
    assert rect.is_valid()
    assert rect.get_valid_or_none() is rect


@given(rectangles(), st.integers(-4, 16))
def test_cuts_part_the_pairs(rect, at):
    before, after = rect.cut_q(at)
    assert pairs(before) == {(i, j) for i, j in pairs(rect) if i < at}
    assert pairs(after) == {(i, j) for i, j in pairs(rect) if i >= at}
    before, after = rect.cut_k(at)
    assert pairs(before) == {(i, j) for i, j in pairs(rect) if j < at}
    assert pairs(after) == {(i, j) for i, j in pairs(rect) if j >= at}


@given(rectangles(), st.integers(-4, 14), st.integers(0, 6))
def test_segments_keep_what_lies_inside(rect, start, length):
    stop = start + length
    assert pairs(rect.get_rect_within_q_segment(start, stop)) == {p for p in pairs(rect) if start <= p[0] < stop}
    assert pairs(rect.get_rect_within_k_segment(start, stop)) == {p for p in pairs(rect) if start <= p[1] < stop}


@given(rectangles())
def test_slices_of_a_rectangle_keep_its_pairs_once(rect):
    slices = rect.to_qk_range_mask_type()
    assert 1 <= len(slices) <= 3
    parts = [
        meant(q.to_naive_range(), k.to_naive_range(), None, AttnMaskType.from_int_type(kind)) for q, k, kind in slices
    ]
    assert set().union(*parts) == pairs(rect)
    assert sum(map(len, parts)) == rect.area()


@given(rectangles())
def test_types_and_boundaries_by_definition(rect):
    box = (rect.q_range.to_naive_range(), rect.k_range.to_naive_range(), None)
    assert rect.is_full() == (pairs(rect) == meant(*box, AttnMaskType.FULL))
    assert rect.is_causal() == (pairs(rect) == meant(*box, AttnMaskType.CAUSAL))
    assert rect.is_inv_causal() == (pairs(rect) == meant(*box, AttnMaskType.INVCAUSAL))
    assert rect.is_bi_causal() == (pairs(rect) == meant(*box, AttnMaskType.BICAUSAL))
    left, right = rect.intersection_q_id_on_left_boundary(), rect.intersection_q_id_on_right_boundary()
    assert rect.k_range.start - left == rect.d_range.start
    assert rect.k_range.end - 1 - right == rect.d_range.end


def test_ranges_are_neither_changed_nor_shared():
    q, k = AttnRange(0, 9), AttnRange(5, 8)
    rect = AttnRectangle(q, k, mask_type=AttnMaskType.CAUSAL)
    assert (q, k) == (AttnRange(0, 9), AttnRange(5, 8))
    assert rect.q_range == AttnRange(6, 9)  # the first rows of a CAUSAL slice with more queries than keys see nothing
    rect.q_range.end = 100
    copy = rect.clone()
    copy.q_range = AttnRange(7, 9)
    assert rect.q_range == AttnRange(6, 9)
    assert copy != rect
    assert rect == AttnRectangle(q, k, mask_type=1)
    assert hash(rect) == hash(rect.clone())
    assert len(rect) == 1
    assert isinstance(rect, AttnRectangleProtocol)


def test_setting_a_range_and_shrinking():
    rect = AttnRectangle(AttnRange(0, 8), AttnRange(0, 8), mask_type=AttnMaskType.CAUSAL)
    rect.k_range = AttnRange(5, 8)
    assert rect.q_range == AttnRange(0, 8)
    assert rect.shrink_q_range()
    assert rect.q_range == AttnRange(5, 8)
    rect.d_range = AttnRange(-50, 0)
    assert rect.shrink_d_range()
    assert rect.d_range == AttnRange(-2, 0)
    rect.q_range = AttnRange(5, 6)
    assert rect.shrink_k_range()
    assert rect.k_range == AttnRange(5, 6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("q_range", AttnRange(3, 3)), ("k_range", AttnRange(9, 12)), ("d_range", AttnRange(8, 9))],
)
def test_a_range_that_leaves_nothing_is_refused(name, value):
    rect = AttnRectangle(AttnRange(0, 8), AttnRange(0, 8), mask_type=AttnMaskType.CAUSAL)
    assert not rect.is_valid(**{name: value})
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="pair"):
            setattr(rect, name, value)
        with pytest.raises(error, match="pair"):
            rect.check_valid(**{name: value})
    assert rect == AttnRectangle(AttnRange(0, 8), AttnRange(0, 8), mask_type=AttnMaskType.CAUSAL)


def test_mask_types_are_enum_or_integer():
    box = AttnRange(0, 4), AttnRange(0, 4)
    with pytest.raises(TypeError, match="mask type"):
        AttnRectangle(*box, mask_type="causal")
    with pytest.raises(ValueError, match="0 to 3"):
        AttnRectangle(*box, mask_type=4)


lists = st.lists(st.tuples(pair, pair, st.sampled_from(AttnMaskType)), max_size=5)


def make_list(arguments):
    q, k, kinds = zip(*arguments, strict=True) if arguments else ((), (), ())
    return AttnRectangles.from_ranges(AttnRanges.from_ranges(q), k, kinds, check=True)


@given(lists, st.integers(-4, 16), st.integers(0, 6))
def test_lists_of_rectangles_do_as_each_of_them(arguments, start, length):
    rects = make_list(arguments)
    wanted = [meant(q, k, None, kind) for q, k, kind in arguments]
    wanted = [each for each in wanted if each]
    assert [pairs(each) for each in rects] == wanted
    assert rects.area == sum(map(len, wanted))
    assert rects.size == len(rects) == len(wanted)
    assert rects.is_empty() == (not wanted)
    queries, keys = {i for each in wanted for i, _ in each}, {j for each in wanted for _, j in each}
    assert {i for r in rects.get_qo_ranges_union() for i in range(r.start, r.end)} == queries
    assert {j for r in rects.get_kv_ranges_union() for j in range(r.start, r.end)} == keys
    assert rects.total_seqlen_qo() == len(queries)
    assert rects.total_seqlen_kv() == len(keys)
    for axis, cut, within in (
        (0, rects.cut_q, rects.get_rects_within_q_segment),
        (1, rects.cut_k, rects.get_rects_within_k_segment),
    ):
        before, after = cut(start)
        inside = within(start, start + length)
        for part, keeps in (
            (before, lambda p, axis=axis: p[axis] < start),
            (after, lambda p, axis=axis: p[axis] >= start),
            (inside, lambda p, axis=axis: start <= p[axis] < start + length),
        ):
            parts = [{p for p in each if keeps(p)} for each in wanted]
            assert [pairs(each) for each in part] == [each for each in parts if each]


def test_a_list_of_rectangles_is_a_list():
    rects = make_list([((0, 4), (0, 4), AttnMaskType.FULL), ((4, 8), (0, 8), AttnMaskType.CAUSAL)])
    again = AttnRectangles()
    again.append(rects[0])
    again.extend(rects[1:])
    assert rects[1:] == make_list([((4, 8), (0, 8), AttnMaskType.CAUSAL)])
    assert again == rects
    assert hash(again) == hash(rects)
    again[0] = rects[1]
    assert again != rects
    again[0:2] = rects
    assert list(again) == list(rects)
    assert rects.is_valid()
    rects.check_valid()
    assert isinstance(rects, AttnRectanglesProtocol)


def test_slices_that_keep_nothing_are_dropped():
    kinds = [AttnMaskType.FULL, 0, AttnMaskType.BICAUSAL, 3]
    rects = AttnRectangles.from_ranges([(0, 0), (0, 4), (0, 4), (0, 4)], [(0, 4), (2, 2), (0, 3), (0, 4)], kinds)
    assert [each.area() for each in rects] == [4]


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda r: AttnRectangles.from_ranges([(0, 1)], [(0, 1)], []), AssertionError),
        (lambda r: AttnRectangles.from_ranges([(0, 1)], [], [0]), ValueError),
        (lambda r: AttnRectangles.from_ranges([(0, 1)], [(0, 1)], ["full"]), TypeError),
        (lambda r: AttnRectangles.from_ranges([(1, 0)], [(0, 1)], [0]), ValueError),
        (lambda r: r.append(AttnRange(0, 1)), TypeError),
        (lambda r: r.extend([None]), TypeError),
        (lambda r: r.__setitem__(slice(0, 1), []), ValueError),
    ],
)
def test_mistakes(mistake, error):
    rects = make_list([((0, 4), (0, 4), AttnMaskType.FULL)])
    with pytest.raises(error):
        mistake(rects)
