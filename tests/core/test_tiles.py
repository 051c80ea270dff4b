# SPDX-License-Identifier: Apache-2.0
"""Tile lists and interval tables against the dense mask."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.kernels import tiles as tiles_module
from magi_attention.kernels.tiles import bands_from_intervals, join_side_by_side, row_intervals, running_sums, tile_runs
from magi_attention.testing.masks import random_masks
from magi_attention.testing.oracle import dense_mask
from magi_attention.testing.tiles import IndexLists, classify_tiles


def lists_of(lists: IndexLists) -> list[list[int]]:
    return [lists.indices[a:b].tolist() for a, b in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)]


def dense_tiles(mask: np.ndarray, block_q: int, block_k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Full and partial tiles, looked at one by one."""
    full, partial = [], []
    for row in range(0, mask.shape[0], block_q):
        tiles = [mask[row : row + block_q, column : column + block_k] for column in range(0, mask.shape[1], block_k)]
        full.append([number for number, tile in enumerate(tiles) if tile.all()])
        partial.append([number for number, tile in enumerate(tiles) if tile.any() and not tile.all()])
    return full, partial


def dense_intervals(intervals, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for row in range(shape[0]):
        for slot in range(intervals.offsets[row], intervals.offsets[row + 1]):
            assert intervals.starts[slot] < intervals.stops[slot]
            if slot > intervals.offsets[row]:
                assert intervals.stops[slot - 1] < intervals.starts[slot]
            mask[row, intervals.starts[slot] : intervals.stops[slot]] = True
    return mask


def count_pairs(bands: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    counted = np.zeros(shape, int)
    for q0, q1, k0, k1, d0, d1 in bands.tolist():
        diagonal = np.arange(k0, k1) - np.arange(q0, q1)[:, None]
        counted[q0:q1, k0:k1] += (diagonal >= d0) & (diagonal <= d1)
    return counted


@settings(max_examples=150)
@given(random_masks(70), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_tiles_in_both_directions(mask, block_q, block_k, more_q, more_k):
    total, slices = mask
    num_q, num_k = total + more_q, total + more_k
    seen = dense_mask(slices, num_q, num_k).numpy()
    tiles = classify_tiles(slices.bands(), num_q, num_k, block_q, block_k)
    assert (lists_of(tiles.full), lists_of(tiles.partial)) == dense_tiles(seen, block_q, block_k)
    num_k_blocks = -(-num_k // block_k)
    transposed = lists_of(tiles.full.transposed(num_k_blocks)), lists_of(tiles.partial.transposed(num_k_blocks))
    assert transposed == dense_tiles(seen.T, block_k, block_q)


@settings(max_examples=100)
@given(random_masks(70), st.integers(0, 9))
def test_intervals_in_both_directions(mask, more):
    total, slices = mask
    seen = dense_mask(slices, total + more, total).numpy()
    bands = slices.bands()
    assert np.array_equal(dense_intervals(row_intervals(bands, total + more), seen.shape), seen)
    transposed = row_intervals(band.transpose(bands), total)
    assert np.array_equal(dense_intervals(transposed, seen.T.shape), seen.T)


@settings(max_examples=100)
@given(random_masks(70), st.integers(1, 3))
def test_intervals_become_bands_again(mask, width):
    total, slices = mask
    seen = dense_mask(slices, total, total).numpy()
    intervals = row_intervals(slices.bands(), total)
    most = int(intervals.counts.max(initial=0))
    parts = [bands_from_intervals(intervals, i, min(i + width, most)) for i in range(0, most, width)]
    counted = sum((count_pairs(part, seen.shape) for part in parts), np.zeros(seen.shape, int))
    assert np.array_equal(counted, seen)


always_joining = mock.patch.multiple(tiles_module, BANDS_OF_A_ROW=0, ROWS_OF_A_PIECE=0, ROWS_OF_A_PIECE_BY_ROW=0)


def cut_up(bands: np.ndarray, step: int) -> np.ndarray:
    """Bands of the same pairs: cut between some columns, and along some diagonals."""
    parts = [band.clip(bands, band.K0, start, start + step) for start in range(0, 70, step)]
    lower, upper = (part.copy() for part in (np.concatenate(parts), np.concatenate(parts)))
    middle = lower[:, band.K0] - lower[:, band.Q0]
    lower[:, band.D1] = np.minimum(lower[:, band.D1], middle)
    upper[:, band.D0] = np.maximum(upper[:, band.D0], middle + 1)
    return np.concatenate([lower, upper])


@settings(max_examples=150)
@given(random_masks(70), st.integers(3, 30))
def test_bands_that_are_joined_keep_every_pair_once(mask, step):
    total, slices = mask
    bands, _ = band.shrink(cut_up(slices.bands(), step))
    mask = dense_mask(slices, total, total).numpy()
    with always_joining:
        for each, seen in ((bands, mask), (band.transpose(bands), mask.T)):
            assert np.array_equal(count_pairs(join_side_by_side(each), seen.shape), seen)
            assert np.array_equal(dense_intervals(row_intervals(each, total), seen.shape), seen)


def test_what_touches_along_a_straight_line_or_a_diagonal_is_joined():
    staircase = SliceTable([[4 * i, 4 * i + 4, 0, 4 * i + 4, i % 2] for i in range(6)])
    window = SliceTable([[0, 20, 10, 30, 3]]).bands()
    halves = np.concatenate([window, window])
    halves[0, band.K1], halves[0, band.D1], halves[1, band.D0] = 25, 14, 15
    with always_joining:
        assert np.array_equal(join_side_by_side(band.shrink(cut_up(window, 70))[0]), band.shrink(window)[0])
        by_key = join_side_by_side(band.transpose(staircase.bands()))
        assert by_key[:, : band.K0].tolist() == [[4 * i, 4 * i + 4] for i in range(6)]
        assert (by_key[:, band.K1] == 24).all()


def test_a_staircase_of_many_steps_takes_no_more_rows_than_it_has():
    """As block-causal masks are by keys: every key is in up to 1024 slices, of one interval."""
    total, step = 1 << 18, 256
    slices = SliceTable([[start, start + step, 0, start + step, 0] for start in range(0, total, step)])
    by_key = band.transpose(slices.bands())
    joined = join_side_by_side(by_key)
    assert (joined[:, band.Q1] - joined[:, band.Q0]).sum() == total
    intervals = row_intervals(by_key, total)
    assert np.array_equal(intervals.starts, np.arange(total) // step * step)
    assert (intervals.stops == total).all()
    runs = tile_runs(by_key, total, total, 128, 128)
    assert not len(runs.partial.starts)
    assert np.array_equal(runs.full.starts, np.arange(total // 128) // 2 * 2)


def test_intervals_of_a_staircase_of_short_steps_are_found_by_its_own_rows():
    """Not by those of its bands, which are 8 million."""
    total, step = 1 << 15, 64
    bands = SliceTable([[start, total, start, start + step, 0] for start in range(0, total, step)]).bands()
    with mock.patch.object(tiles_module, "expand_counts", wraps=expand_counts) as expanded:
        intervals = row_intervals(bands, total)
    assert sum(int(each.args[0].sum()) for each in expanded.call_args_list) == total
    assert not intervals.starts.any()
    assert np.array_equal(intervals.stops, (np.arange(total) // step + 1) * step)


def test_scattered_blocks_are_left_as_they_are():
    """Though rows are in many of them: to search for neighbors takes longer than it saves."""
    rng = np.random.default_rng(0)
    rows = [[64 * i, 64 * i + 64, 64 * j, 64 * j + 64, 0] for i in range(64) for j in rng.choice(64, 16, replace=False)]
    bands = SliceTable(rows).bands()
    assert np.array_equal(join_side_by_side(bands), band.shrink(bands)[0])


def test_slices_complete_a_tile_together():
    slices = SliceTable([[0, 4, 0, 4, 1], [0, 3, 1, 4, 2]])  # a lower triangle, and the upper one beside it
    tiles = classify_tiles(slices.bands(), 4, 4, 4, 4)
    assert (lists_of(tiles.full), lists_of(tiles.partial)) == ([[0]], [[]])


def test_regular_runs_of_rows_stay_one_band():
    causal = SliceTable([[0, 50, 0, 50, 1]])
    assert len(bands_from_intervals(row_intervals(causal.bands(), 50), 0, 1)) == 1
    blocks = SliceTable(
        [[16 * i, 16 * i + 16, 32 * j + 16 * (i % 2), 32 * j + 16, 0] for i in range(4) for j in (0, 2)]
    )
    intervals = row_intervals(blocks.bands(), 64)
    assert len(bands_from_intervals(intervals, 0, 2)) == len(blocks.without_empty())


def test_intervals_that_touch_or_are_covered_twice_are_joined():
    slices = SliceTable([[0, 1, 0, 3, 0], [0, 1, 3, 5, 0], [0, 1, 1, 4, 0], [0, 2, 7, 8, 0]])
    intervals = row_intervals(slices.bands(), 2)
    assert intervals.offsets.tolist() == [0, 2, 3]
    assert (intervals.starts.tolist(), intervals.stops.tolist()) == ([0, 7, 7], [5, 8, 8])


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 7), (7, 0), (0, 0)])
def test_no_rows(num_q, num_k):
    slices = SliceTable([])
    tiles = classify_tiles(slices.bands(), num_q, num_k, 4, 4)
    assert lists_of(tiles.full) == lists_of(tiles.partial) == [[]] * -(-num_q // 4)
    assert row_intervals(slices.bands(), num_q).counts.tolist() == [0] * num_q


def test_a_million_causal_tokens_by_intervals_and_coarse_tiles():
    total = 1 << 20
    bands = SliceTable([[0, total, 0, total, 1]]).bands()
    tiles = classify_tiles(bands, total, total, 4096, 4096)
    assert len(tiles.full.indices) == 256 * 255 // 2
    assert len(tiles.partial.indices) == 256
    intervals = row_intervals(bands, total)
    assert np.array_equal(intervals.stops, np.arange(1, total + 1))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-(1 << 56), 1 << 56)), max_size=40))
def test_sums_of_what_comes_and_goes_are_exact(changes):
    places, amounts = np.array(changes, np.int64).reshape(-1, 2).T
    place, sums = running_sums(places, np.stack([amounts, -amounts]))
    assert place.tolist() == sorted({at for at, _ in changes})
    expected = [sum(amount for at, amount in changes if at <= each) for each in place.tolist()]
    assert sums.tolist() == [expected, [-each for each in expected]]


def test_padded_lists():
    lists = IndexLists.from_pairs(np.array([2, 0, 2]), np.array([5, 1, 3]), 3)
    assert lists.padded(3).tolist() == [[1, 0, 0], [0, 0, 0], [3, 5, 0]]


@settings(max_examples=150)
@given(random_masks(70), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_runs_of_tiles_in_both_directions(mask, block_q, block_k, more_q, more_k):
    """Runs of the transposed mask are the transposed tiles, and runs are as long as can be."""
    total, slices = mask
    num_q, num_k = total + more_q, total + more_k
    tiles = classify_tiles(slices.bands(), num_q, num_k, block_q, block_k)
    runs = tile_runs(band.transpose(slices.bands()), num_k, num_q, block_k, block_q)
    for by_query, by_key in ((tiles.full, runs.full), (tiles.partial, runs.partial)):
        assert lists_of(IndexLists.from_intervals(by_key)) == lists_of(by_query.transposed(-(-num_k // block_k)))
        same_row = np.diff(np.repeat(np.arange(len(by_key.counts)), by_key.counts)) == 0
        assert (by_key.starts[1:] > by_key.stops[:-1])[same_row].all()
        assert by_key.sizes.tolist() == IndexLists.from_intervals(by_key).counts.tolist()


def test_rows_cut_finer_than_tiles_cost_no_more_for_many_keys():
    total = 1 << 20
    cuts = np.arange(0, total, 1000)
    ends = np.minimum(cuts + 1000, total)
    slices = SliceTable(np.column_stack([cuts, ends, 0 * cuts, 0 * cuts + total, 0 * cuts]))
    runs = tile_runs(slices.bands(), total, total, 128, 128)
    assert len(runs.full.starts) == len(runs.full.counts) == total // 128
    assert len(runs.partial.starts) == 0
