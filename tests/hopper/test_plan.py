# SPDX-License-Identifier: Apache-2.0
"""The forward kernel's tables, walked as the kernel walks them."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.kernels import tiles
from magi_attention.testing.masks import rectangular_masks
from magi_attention.testing.oracle import dense_mask
from magi_kernels_hopper.plan import FULL, row_tables
from magi_kernels_hopper.split import most_boxes
from magi_kernels_hopper.tables import device_row_tables
from magi_kernels_hopper.variants import ForwardVariant
from tests.hopper.walk import pair_counts, walk

always_joining = mock.patch.multiple(tiles, BANDS_OF_A_ROW=0, ROWS_OF_A_PIECE=0)


@settings(max_examples=400, deadline=None)
@given(rectangular_masks(150), st.sampled_from([1, 4, 16, 24]), st.sampled_from([8, 10, 16]), st.booleans())
def test_every_pair_counts_once(mask, tile_q, box_k, joins):
    (num_q, num_k), slices = mask
    with always_joining if joins else nullcontext():
        tables = row_tables(slices.bands(), num_q, num_k, tile_q, box_k)
    counts = pair_counts(tables, num_q, num_k, tile_q, box_k)
    np.testing.assert_array_equal(counts, dense_mask(slices, num_q, num_k).numpy())
    assert sorted(tables.order.tolist()) == list(range(-(-num_q // tile_q)))
    assert (tables.parts == 1).all()


@settings(max_examples=400, deadline=None)
@given(rectangular_masks(150), st.sampled_from([4, 24]), st.sampled_from([8, 10]), st.integers(1, 9))
def test_every_pair_counts_once_in_parts(mask, tile_q, box_k, most_boxes):
    (num_q, num_k), slices = mask
    tables = row_tables(slices.bands(), num_q, num_k, tile_q, box_k, most_boxes)
    counts = pair_counts(tables, num_q, num_k, tile_q, box_k)
    np.testing.assert_array_equal(counts, dense_mask(slices, num_q, num_k).numpy())
    there = [part * len(tables.parts) + tile for tile, parts in enumerate(tables.parts) for part in range(parts)]
    assert sorted(tables.order.tolist()) == sorted(there)
    assert (np.diff(tables.boxes[tables.order]) <= 1).all()  # one that is masked counts for a bit more
    assert tables.boxes.max() <= most_boxes + 1
    whole = row_tables(slices.bands(), num_q, num_k, tile_q, box_k)
    assert 0 <= tables.boxes.sum() - whole.boxes.sum() <= len(whole.parts)  # a last part of one box has two


def boxes_of_parts(num_q: int, num_k: int, copies: int = 8) -> tuple[int, int]:
    """The most boxes of a part of a full mask, and of a tile, where 132 blocks work."""
    bands = SliceTable([[0, num_q, 0, num_k, 0]]).bands()
    whole = row_tables(bands, num_q, num_k, 24, 40)
    limit = most_boxes(whole.boxes, copies, 132)
    parts = whole if limit is None else row_tables(bands, num_q, num_k, 24, 40, limit)
    return int(parts.boxes.max()), int(whole.boxes.max())


def test_few_tiles_are_cut_for_all_multiprocessors():
    part, whole = boxes_of_parts(1, 32768)
    assert part * 25 < whole  # 8 tiles for 132
    part, whole = boxes_of_parts(512, 32768)
    assert part * 2 < whole  # 176, which would take two rounds


@pytest.mark.parametrize(("num_q", "num_k"), [(4096, 4096), (1, 300), (2000, 100), (1, 0)])
def test_others_are_not(num_q, num_k):
    part, whole = boxes_of_parts(num_q, num_k)
    assert part == whole


def test_one_long_tile_among_short_ones_is_cut():
    boxes = np.array([4] * 100 + [4000])
    limit = most_boxes(boxes, 1, 132)
    assert limit is not None
    assert limit <= 200
    assert most_boxes(np.array([4] * 100), 1, 132) is None


@pytest.mark.parametrize(
    ("rows", "num_tiles", "num_masked"),
    [
        ([[0, 256, 0, 256, 0]], [2] * 16, [0] * 16),  # nothing to mask
        ([[0, 256, 0, 200, 0]], [2] * 16, [1] * 16),  # the last box is cut off
        # One partial box on the diagonal: alone, beside a full one, or last and alone after full ones.
        ([[0, 256, 0, 256, 1]], None, [1] * 8 + [0] * 4 + [1] * 4),
        ([[0, 256, 1, 129, 0]], [1] * 16, [0] * 16),  # spans begin where they like
        ([[0, 8, 0, 128, 0], [8, 16, 0, 128, 0]], [1] + [0] * 15, [0] * 16),  # full by two slices together
        ([], [0] * 16, [0] * 16),
    ],
)
def test_boxes(rows, num_tiles, num_masked):
    tables = row_tables(SliceTable(rows).bands(), 256, 256, 16, 64)
    if num_tiles is not None:
        assert tables.tiles[:, 1].tolist() == num_tiles
    assert tables.tiles[:, 2].tolist() == num_masked


def test_an_odd_box_is_the_last_and_has_its_tile_alone():
    """It is a partial one if their number is odd, so that full ones stay in pairs."""
    tables = row_tables(SliceTable([[0, 16, 0, 5 * 64 - 20, 0]]).bands(), 16, 5 * 64, 16, 64)
    (tile,) = tables.tiles.tolist()
    assert tile[1:3] == [3, 0]
    assert tables.runs[tile[3]].tolist()[:2] == [4 * 64, 5 * 64 - 20]
    tables = row_tables(SliceTable([[0, 16, 0, 5 * 64, 0]]).bands(), 16, 5 * 64, 16, 64)
    assert tables.runs[tables.tiles[0, 3], 3] == FULL
    tables = row_tables(SliceTable([[0, 16, 0, 4 * 64, 0]]).bands(), 16, 5 * 64, 16, 64)
    assert tables.tiles[0, 3] == -1
    tables = row_tables(SliceTable([[0, 16, 0, 64, 0]]).bands(), 16, 5 * 64, 16, 64)
    assert tables.tiles[0, 3] == -1


def test_longest_come_first():
    tables = row_tables(SliceTable([[0, 256, 0, 256, 1]]).bands(), 256, 256, 16, 16)
    assert tables.order.tolist()[0] in (14, 15)
    work = tables.tiles[tables.order, 1]
    assert (np.diff(work) <= 0).all()


def test_masked_boxes_meet_only_their_own_pieces():
    """However many slices a tile of queries meets, a box looks at those that it meets itself."""
    rows = [[0, 128, 128 * i, 128 * i + 64, 0] for i in range(0, 50, 2)]
    rows += [[0, 64, 128 * i, 128 * i + 64, 0] for i in range(1, 50, 2)]
    tables = row_tables(SliceTable(rows).bands(), 128, 6400, 128, 64)
    assert set(tables.runs[:, 3].tolist()) == {FULL, 1}
    assert sum(box.masked for box in walk(tables, 0, 128, 64)) == 26


def test_long_runs_stay_short_tables():
    tables = row_tables(SliceTable([[0, 1 << 20, 0, 1 << 20, 1]]).bands(), 1 << 20, 1 << 20, 16, 64)
    assert len(tables.runs) < 4 * (1 << 16)
    assert len(tables.pieces) <= 1 << 16


@pytest.mark.parametrize(
    "name", ["full", "causal", "swa_causal_1024", "varlen_causal", "shared_question", "varlen_full"]
)
def test_tiles_are_tall_where_that_is_faster(name):
    """What was measured to be faster with 64 heads, eight of them sharing keys, at 8k tokens."""
    slices, variant = workloads.make(name, 8192), ForwardVariant(128, 128, "bf16")
    assert device_row_tables(slices, 8192, 8192, 8, variant, torch.device("cpu"), copies=8, blocks=132).tall
    capped = ForwardVariant(128, 128, "bf16", softcap=True)
    assert not device_row_tables(slices, 8192, 8192, 8, capped, torch.device("cpu"), copies=8, blocks=132).tall


def test_tiles_are_not_tall_where_queries_see_different_blocks():
    starts = 64 * np.random.default_rng(0).integers(0, 64, (64, 2))
    rows = [[64 * i, 64 * i + 64, start, start + 64, 0] for i, row in enumerate(starts) for start in np.unique(row)]
    tables = device_row_tables(
        SliceTable(rows), 4096, 4096, 8, ForwardVariant(128, 128, "bf16"), torch.device("cpu"), copies=8, blocks=132
    )
    assert not tables.tall
