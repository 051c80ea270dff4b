# SPDX-License-Identifier: Apache-2.0
"""AttnRanges against plain sets and counters of positions."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, AttnRanges
from magi_attention.common.protocols import AttnRangesProtocol
from magi_attention.common.ranges import check_valid_cu_seqlens, is_valid_cu_seqlens

pair = st.tuples(st.integers(-6, 24), st.integers(0, 7)).map(lambda p: (p[0], p[0] + p[1]))
some_ranges = st.lists(pair, max_size=7).map(AttnRanges.from_ranges)


def covered(ranges):
    """How often each position is held."""
    return Counter(i for each in ranges for i in range(each.start, each.end))


def assert_merged(ranges, wanted):
    assert set(covered(ranges)) == set(wanted)
    assert ranges.is_merged()
    assert ranges.is_sorted()
    assert ranges.is_non_overlap()
    assert all(not each.is_empty() for each in ranges)


@given(some_ranges)
def test_merging_gives_the_sorted_union(ranges):
    before = ranges.clone()
    assert_merged(ranges.merge(), covered(ranges))
    assert ranges == before


@given(some_ranges, st.integers(1, 6))
def test_merging_with_alignment_rounds_outwards(ranges, alignment):
    wanted = {i // alignment * alignment + step for i in covered(ranges) for step in range(alignment)}
    assert_merged(ranges.merge_with_split_alignment(alignment), wanted)


@given(some_ranges, some_ranges)
def test_two_lists_behave_like_sets(a, b):
    kept_a, kept_b = a.clone(), b.clone()
    assert_merged(a.find_overlap_ranges(b), covered(a).keys() & covered(b).keys())
    assert_merged(a.find_hole_ranges(b), covered(a).keys() - covered(b).keys())
    a_merged, b_merged = a.merge(), b.merge()
    assert a_merged.find_overlap_ranges(b_merged, True, True) == a.find_overlap_ranges(b)
    assert a_merged.find_hole_ranges(b_merged, True, True) == a.find_hole_ranges(b)
    assert a.intersect_size_with(b) == len(covered(a).keys() & covered(b).keys())
    assert a.union_size_with(b) == covered(a).total() + covered(b).total()
    assert (a, b, a_merged, b_merged) == (kept_a, kept_b, kept_a.merge(), kept_b.merge())


@given(some_ranges)
def test_sizes_and_questions_agree_with_counting(ranges):
    count, pairs = covered(ranges), ranges.to_naive_ranges()
    assert ranges.total_seqlen == ranges.union_size() == count.total()
    assert ranges.intersect_size() == sum(times - 1 for times in count.values())
    assert ranges.is_non_overlap() == all(times == 1 for times in count.values())
    assert ranges.is_sorted() == (pairs == sorted(pairs, key=lambda p: p[0]))
    assert ranges.is_merged() == all(a[1] < b[0] for a, b in pairwise(pairs))
    assert ranges.sort().to_naive_ranges() == sorted(pairs, key=lambda p: p[0])
    assert ranges.clear_empty().to_naive_ranges() == [p for p in pairs if p[0] < p[1]]
    assert ranges.points == sorted({point for p in pairs for point in p})
    assert ranges.size == len(ranges) == len(pairs)
    assert ranges.is_empty() == (not pairs)
    assert ranges.max_seqlen == max((p[1] - p[0] for p in pairs), default=0)
    assert ranges.to_tensor().tolist() == [list(p) for p in pairs]
    assert ranges.to_tensor().dtype == torch.int32
    assert ranges.to_tensor().shape == (len(pairs), 2)
    if pairs:
        assert (ranges.start, ranges.end) == (min(p[0] for p in pairs), max(p[1] for p in pairs))


@given(some_ranges, st.integers(-8, 30), st.integers(-8, 30))
def test_truncating_keeps_what_lies_between(ranges, start, end):
    kept = ranges.truncate(start, end)
    assert covered(kept) == Counter({i: n for i, n in covered(ranges).items() if start <= i < end})
    assert all(not each.is_empty() for each in kept)


@given(some_ranges, st.integers(1, 9))
def test_chunks_hold_consecutive_positions_in_the_order_of_the_ranges(ranges, size):
    chunks = ranges.chunk(size, check=False)
    order = [i for each in ranges for i in range(each.start, each.end)]
    wanted = [order[start : start + size] for start in range(0, len(order), size)]
    assert [[i for each in chunk for i in range(each.start, each.end)] for chunk in chunks] == wanted


@given(some_ranges, st.data())
def test_packed_storage_keeps_every_position_in_its_place(ranges, data):
    merged = ranges.merge()
    assume(len(merged))
    stored = {i: at for at, i in enumerate(i for each in merged for i in range(each.start, each.end))}
    inside = AttnRanges()
    for _ in range(3):
        home = data.draw(st.sampled_from(list(merged)))
        start = data.draw(st.integers(home.start, home.end - 1))
        inside.append(AttnRange(start, data.draw(st.integers(start + 1, home.end))))
    local = ranges.make_ranges_local(inside)
    assert local == merged.make_ranges_local(inside, is_self_merged=True)
    for each, moved in zip(inside, local, strict=True):
        assert [stored[i] for i in range(each.start, each.end)] == list(range(moved.start, moved.end))
        one, target = ranges.make_range_local(each)
        assert one == moved
        assert each.is_subrange_of(target)
        assert target in list(merged)


def test_the_place_of_each_merged_range_may_be_given():
    ranges = AttnRanges.from_ranges([(0, 4), (10, 14)])
    local, target = ranges.make_range_local(AttnRange(11, 13), is_self_merged=True, prefix_offset=[100, 200])
    assert (local, target) == (AttnRange(201, 203), AttnRange(10, 14))


def test_changing_a_list():
    a, b = AttnRange(3, 5), AttnRange(0, 2)
    ranges = AttnRanges()
    ranges.append(a)
    ranges.insert(0, b)
    ranges.extend(AttnRanges.from_ranges([(7, 9)]))
    assert ranges.to_naive_ranges() == [(0, 2), (3, 5), (7, 9)]
    assert ranges[0] is b
    assert ranges[1] is a
    assert ranges[:2][1] is a
    assert isinstance(ranges[1:], AttnRanges)
    assert ranges.pop() == AttnRange(7, 9)
    ranges[0] = AttnRange(1, 1)
    ranges[0:2] = AttnRanges.from_ranges([(4, 6), (6, 8)])
    assert repr(ranges) == "[[4, 6), [6, 8)]"
    assert repr(AttnRanges()) == "[[,)]"
    assert isinstance(ranges, AttnRangesProtocol)


def test_results_share_nothing_with_the_list():
    ranges = AttnRanges.from_ranges([(0, 4), (6, 9)])
    for made in (
        ranges.clone(),
        AttnRanges.from_ranges(ranges),
        ranges.merge(),
        ranges.sort(),
        ranges.clear_empty(),
        ranges.truncate(),
        ranges.find_overlap_ranges(ranges),
        ranges.chunk(100)[0],
    ):
        made[0].end = 2
        made.append(AttnRange(50, 60))
    assert ranges.to_naive_ranges() == [(0, 4), (6, 9)]
    assert ranges.find_overlap_ranges(ranges) == ranges


def test_equality_and_hash_go_by_content():
    a, b = AttnRanges.from_ranges([(0, 4)]), AttnRanges.from_ranges([[0, 4]])
    assert a == b
    assert hash(a) == hash(b)
    assert a != AttnRanges.from_ranges([(0, 4), (4, 4)])
    assert a != [(0, 4)]


@given(st.lists(st.integers(0, 6), max_size=5), st.integers(-1, 8))
@example([0, 2, 5], 5)
def test_cumulative_lengths(cu_seqlens, seq_len):
    rises = all(a < b for a, b in pairwise(cu_seqlens))
    valid = bool(cu_seqlens) and rises and cu_seqlens[0] == 0 and cu_seqlens[-1] == seq_len
    assert is_valid_cu_seqlens(cu_seqlens, seq_len) == valid
    if valid:
        check_valid_cu_seqlens(cu_seqlens, seq_len)
        ranges = AttnRanges.from_cu_seqlens(cu_seqlens, seq_len)
        assert [each.seqlen for each in ranges] == [b - a for a, b in pairwise(cu_seqlens)]
        if len(cu_seqlens) > 1:
            assert ranges.is_cu_seqlens(seq_len)
            assert ranges.to_cu_seqlens(seq_len) == cu_seqlens
    else:
        with pytest.raises(ValueError, match="cu_seqlens"):
            AttnRanges.from_cu_seqlens(cu_seqlens, seq_len)


@given(some_ranges, st.integers(0, 20))
@example(AttnRanges.from_ranges([(0, 2), (2, 5)]), 5)
@example(AttnRanges.from_ranges([(0, 2), (3, 5)]), 5)
def test_only_gapless_ranges_from_zero_are_cumulative(ranges, seq_len):
    pairs = ranges.to_naive_ranges()
    starts, ends = [p[0] for p in pairs], [p[1] for p in pairs]
    follows = bool(pairs) and starts == [0, *ends[:-1]] and ends[-1] == seq_len and all(p[0] < p[1] for p in pairs)
    assert ranges.is_cu_seqlens(seq_len) == follows


@pytest.mark.parametrize(
    ("mistake", "error", "words"),
    [
        (lambda r: AttnRanges().start, ValueError, "no start"),
        (lambda r: AttnRanges().end, ValueError, "no end"),
        (lambda r: AttnRanges().pop(), IndexError, "pop"),
        (lambda r: AttnRanges.from_ranges([(3, 1)], check=True), ValueError, r"\[3, 1\)"),
        (lambda r: r.append((0, 3)), TypeError, "AttnRange"),
        (lambda r: r.extend([(0, 3)]), TypeError, "AttnRange"),
        (lambda r: r.__setitem__(slice(0, 1), AttnRanges()), ValueError, "replace 1 ranges by 0"),
        (lambda r: r.to_cu_seqlens(14), AssertionError, "follow one another"),
        (lambda r: r.to_cu_seqlens(14), ValueError, "follow one another"),
        (lambda r: r.make_range_local(AttnRange(2, 11)), ValueError, "does not lie inside"),
        (lambda r: r.make_range_local(AttnRange(2, 11)), AssertionError, "does not lie inside"),
        (lambda r: r.make_ranges_local(AttnRanges.from_ranges([(-1, 2)])), ValueError, r"\[-1, 2\)"),
        (lambda r: AttnRanges().make_range_local(AttnRange(0, 1)), ValueError, "does not lie inside"),
        (lambda r: AttnRanges.from_ranges([(0, 4), (2, 6)]).chunk(2), AssertionError, "overlap"),
        (lambda r: r.chunk(0), ValueError, "chunk_size"),
        (lambda r: r.merge_with_split_alignment(0), ValueError, "split_alignment"),
    ],
)
def test_mistakes(mistake, error, words):
    ranges = AttnRanges.from_ranges([(0, 4), (10, 14)])
    with pytest.raises(error, match=words):
        mistake(ranges)
    assert ranges.is_valid()
    ranges.check_valid()


def test_many_ranges_take_few_steps(monkeypatch):
    """The work on n ranges is counted in Python-level range operations, which must not grow like n squared."""
    calls = Counter()
    original = AttnRange.__init__

    def counting(self, start, end):
        calls["made"] += 1
        original(self, start, end)

    n = 5000
    pairs = [(3 * i, 3 * i + 2) for i in range(n)]
    monkeypatch.setattr(AttnRange, "__init__", counting)
    for method in ("is_overlap_with", "intersect", "is_subrange_of", "union", "diff_by", "truncate"):
        monkeypatch.delattr(AttnRange, method)  # pairwise comparisons have no place in the algebra of lists
    a, b = AttnRanges.from_ranges(pairs), AttnRanges.from_ranges([(s + 1, e + 1) for s, e in pairs])
    assert a.merge() == a
    assert a.find_overlap_ranges(b).total_seqlen == n
    assert a.find_hole_ranges(b).total_seqlen == n
    assert a.make_ranges_local(a).end == 2 * n
    assert hash(a) == hash(a.clone())
    assert calls["made"] <= 10 * n
