# SPDX-License-Identifier: Apache-2.0
"""The backward kernel's tables, walked as the kernel walks them."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.kernels import tiles
from magi_attention.testing.masks import rectangular_masks
from magi_attention.testing.oracle import dense_mask
from magi_kernels_hopper import tables as hopper_tables
from magi_kernels_hopper.backward_order import QuerySizes, WorkSizes, clusters
from magi_kernels_hopper.backward_plan import adders, column_tables, ranks, rests, shortest_tables, starts_at_changes
from magi_kernels_hopper.plan import FULL
from magi_kernels_hopper.tables import device_column_tables
from tests.hopper.backward_walk import pair_counts, walk

always_joining = mock.patch.multiple(tiles, BANDS_OF_A_ROW=0, ROWS_OF_A_PIECE=0)


@settings(max_examples=400, deadline=None)
@given(
    rectangular_masks(150), st.sampled_from([1, 4, 10, 24]), st.sampled_from([8, 16, 32]), st.booleans(), st.booleans()
)
def test_every_pair_counts_once(mask, tile_q, tile_k, at_changes, joins):
    (num_q, num_k), slices = mask
    starts = starts_at_changes(slices.bands(), num_k, tile_k) if at_changes else None
    with always_joining if joins else nullcontext():
        tables = column_tables(slices.bands(), num_q, num_k, tile_q, tile_k, starts)
        left_out = rests(tables, slices.bands(), num_q, num_k, tile_q, tile_k)
    counts = pair_counts(tables, left_out, num_q, num_k, tile_q, tile_k)
    np.testing.assert_array_equal(counts, dense_mask(slices, num_q, num_k).numpy())
    tiles_q = -(-num_q // tile_q)
    met = [step.tile for tile in range(len(tables.tiles)) for step in walk(tables, tile, tile_q, tile_k)]
    np.testing.assert_array_equal(adders(tables, tiles_q), np.bincount(met, minlength=tiles_q))


@settings(max_examples=100, deadline=None)
@given(rectangular_masks(150), st.sampled_from([4, 10]), st.sampled_from([8, 16]))
def test_ranks_count_up_in_the_order_of_work(mask, tile_q, tile_k):
    (num_q, num_k), slices = mask
    tables = shortest_tables(slices.bands(), num_q, num_k, tile_q, tile_k)
    order = clusters(tables)
    table = ranks(tables, order).tolist()
    reached = dict.fromkeys(range(-(-num_q // tile_q)), 0)
    for tile in order.tolist():
        steps = list(walk(tables, tile, tile_q, tile_k))
        for left, step in zip(range(len(steps), 0, -1), steps, strict=True):
            assert table[tables.tiles[tile, 3] + left - 1] == reached[step.tile]
            reached[step.tile] += 1
    assert len(table) == sum(reached.values())


@pytest.mark.parametrize(
    ("rows", "num_steps", "num_runs"),
    [
        ([[0, 256, 0, 256, 0]], [16] * 8, [1] * 8),  # one full run
        (
            [[0, 256, 0, 256, 1]],
            [16, 14, 12, 10, 8, 6, 4, 2],
            [2] * 7 + [1],
        ),  # the diagonal's two tiles, then full ones
        ([[16, 48, 0, 32, 0], [48, 80, 0, 32, 0]], [4] + [0] * 7, [1] + [0] * 7),  # slices that touch make one run
        ([], [0] * 8, [0] * 8),
    ],
)
def test_runs(rows, num_steps, num_runs):
    tables = column_tables(SliceTable(rows).bands(), 256, 256, 16, 32)
    assert tables.tiles[:, 2].tolist() == num_steps
    assert tables.tiles[:, 1].tolist() == num_runs


def test_masked_tiles_meet_only_their_own_pieces():
    rows = [[128 * i, 128 * i + 60, 0, 128, 0] for i in range(50)]
    tables = column_tables(SliceTable(rows).bands(), 6400, 128, 64, 128)
    assert set(tables.runs[:, 3].tolist()) == {1}
    assert FULL not in tables.runs[:, 3]


def test_long_runs_stay_short_tables():
    tables = column_tables(SliceTable([[0, 1 << 20, 0, 1 << 20, 1]]).bands(), 1 << 20, 1 << 20, 8, 128)
    assert len(tables.runs) == 2 * len(tables.tiles) - 1
    assert len(tables.pieces) == len(tables.tiles)


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        ([[0, 120, 0, 120, 1], [120, 300, 120, 300, 1]], [0, 32, 64, 96, 120, 152, 184, 216, 248, 280, 300]),
        ([[0, 300, 0, 300, 1]], [0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 300]),
        # Where all see the keys on both sides, no step is saved.
        ([[0, 300, 0, 40, 0], [0, 300, 40, 300, 0]], [0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 300]),
        ([], [0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 300]),
    ],
)
def test_tiles_of_keys_begin_where_it_saves_steps(rows, starts):
    tables = shortest_tables(SliceTable(rows).bands(), 300, 300, 16, 32)
    assert [*tables.keys[:, 0], tables.keys[-1, 1]] == starts


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    [
        ([[0, 256, 0, 256, 1]], 0, 1),  # of the diagonal's two tiles, the earlier one sees no key of the second half
        ([[0, 256, 0, 256, 0]], 0, 0),
        ([[64, 128, 0, 16, 0], [0, 16, 16, 32, 0]], 1, 4 << 16),  # from the last tile of queries down
        ([[0, 64, 0, 16, 0]], 0, 4 << 16),  # nothing sees the second half
    ],
)
def test_halves_of_tiles_rest(rows, first, second):
    bands = SliceTable(rows).bands()
    assert rests(column_tables(bands, 256, 256, 16, 32), bands, 256, 256, 16, 32)[0].tolist() == [first, second]


def test_steps_to_rest_are_counted_of_the_chosen_tables_alone():
    """Of two kernels and two ways to cut keys, which takes as long as to build the tables."""
    rows = [[1000 * i, 1000 * i + 1000, 1000 * i, 1000 * i + 1000, 1] for i in range(6)]
    sizes = (WorkSizes(80, 128, 2, 4, 132), WorkSizes(64, 64, 2, 4, 132, queries=QuerySizes(16, 64, 2)))
    with mock.patch.object(hopper_tables, "rests", side_effect=rests) as asked:
        found = device_column_tables(SliceTable(rows), 6000, 6000, sizes, torch.device("cpu"), ordered=False)
    asked.assert_called_once()
    assert found.keys[:, :2].tolist() == asked.call_args.args[0].keys.tolist()
    assert found.keys[:, 2:].tolist() == rests(*asked.call_args.args).tolist()
    assert found.keys[:, 2:].any()


def test_staircases_have_few_pieces():
    """As block-causal masks, of which a key is in up to 1024 slices."""
    total, step = 1 << 18, 256
    bands = SliceTable([[start, start + step, 0, start + step, 0] for start in range(0, total, step)]).bands()
    tables = column_tables(bands, total, total, 40, 128)
    num_tiles = total // 128
    assert len(tables.pieces) <= num_tiles
    assert len(tables.runs) <= 2 * num_tiles
    np.testing.assert_array_equal(tables.tiles[:, 2], -(-total // 40) - np.arange(num_tiles) // 2 * step // 40)


def test_masks_too_large_for_an_order_are_refused():
    slices = SliceTable([[0, 1 << 22, 0, 1 << 22, 0]])
    sizes = (1 << 22, 1 << 22, (WorkSizes(64, 128, 8, 2, 132),), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="for each of 4294967296 pairs of tiles"):
        device_column_tables(slices, *sizes, ordered=True)
    assert device_column_tables(slices, *sizes, ordered=False).ranks is None
