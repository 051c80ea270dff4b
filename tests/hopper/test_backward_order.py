# SPDX-License-Identifier: Apache-2.0
"""The order in which the backward kernel's blocks take tiles of keys."""

import heapq
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.testing.masks import rectangular_masks
from magi_attention.testing.oracle import dense_mask
from magi_kernels_hopper.backward_order import LEFT_FOR_LAST, WorkSizes, clusters, drifts, order_work
from magi_kernels_hopper.backward_plan import column_tables


@settings(max_examples=200, deadline=None)
@given(
    rectangular_masks(150),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 4, 7]),
    st.sampled_from([16, 128]),
    st.booleans(),
    st.booleans(),
    st.sets(st.integers(0, 150)),
)
def test_every_item_is_taken_once(mask, group, num_kv_heads, blocks, tile_k, splits, ordered, borders):
    (num_q, num_k), slices = mask
    sizes = WorkSizes(16, tile_k, num_kv_heads, group, blocks, splits)
    awaited = np.array(sorted(borders)[: len(borders) // 2 * 2], np.int64).reshape(-1, 2)
    work = order_work(slices.bands(), num_q, num_k, sizes, ordered=ordered, first_keys=awaited)
    meets = [
        any(first < stop and start < end for start, stop in awaited) and not ordered for first, end in work.tables.keys
    ]
    np.testing.assert_array_equal(work.awaited, meets)
    packs = group // work.pack
    num_tiles = len(work.tables.tiles)
    assert work.pack * packs == group
    queries = np.flatnonzero(dense_mask(slices, num_q, num_k).numpy().any(axis=1))
    assert work.tables.runs[:, 1].max(initial=0) == (queries // (16 // work.pack)).max(initial=-1) + 1
    reached = dict.fromkeys(np.ndindex(num_tiles, num_kv_heads), 0)
    sizes_of_parts = defaultdict(set)
    for tile, head, first, size in work.items.tolist():  # parts of the same keys come in order
        assert reached[tile, head] == first
        reached[tile, head] += size
        sizes_of_parts[tile, head].add(size)
    assert set(reached.values()) <= {packs}
    assert all(len(each) == 1 for each in sizes_of_parts.values())
    assert work.split == any(each != {packs} for each in sizes_of_parts.values())
    assert splits or not work.split
    work_of = work.tables.tiles[work.items[:, 0], 2] * work.items[:, 3]
    comes_first = work.awaited[work.items[:, 0]]
    if comes_first.any():
        after = work_of[np.flatnonzero(comes_first)[-1] + 1 :].sum()
        assert after >= min(LEFT_FOR_LAST * work_of.sum(), work_of[~comes_first].sum())
    if ordered:
        for head, pack in np.ndindex(num_kv_heads, packs):
            first, size = work.items[:, 2], work.items[:, 3]
            chosen = (work.items[:, 1] == head) & (first <= pack) & (pack < first + size)
            np.testing.assert_array_equal(work.items[chosen, 0], work.order)


@pytest.mark.parametrize("name", ["full", "causal", "varlen_causal", "varlen_full", "swa_causal_1024"])
def test_blocks_are_done_at_about_the_same_time(name):
    """Were blocks never to wait, and items to begin at once, the last one would be done within a few per cent."""
    blocks = 132
    for total, most in ((8192, 1.07), (32768, 1.03)):
        work = order_work(workloads.make(name, total).bands(), total, total, WorkSizes(80, 128, 8, 8, blocks))
        costs = work.tables.tiles[work.items[:, 0], 2] * work.items[:, 3]
        free = [0] * blocks
        for cost in costs.tolist():
            heapq.heapreplace(free, free[0] + cost)
        assert max(free) < most * costs.sum() / blocks


@pytest.mark.parametrize(("group", "pack"), [(1, 1), (8, 2), (3, 1), (6, 2)])
def test_heads_share_tiles(group, pack):
    bands = workloads.make("causal", 1024).bands()
    assert order_work(bands, 1024, 1024, WorkSizes(64, 128, 2, group, 132)).pack == pack


def test_heads_share_no_tiles_that_drift():
    work = order_work(workloads.make("swa_causal_1024", 16384).bands(), 16384, 16384, WorkSizes(64, 128, 2, 8, 132))
    assert work.pack == 1
    assert work.tables.runs[:, 1].max() == 16384 // 64


@pytest.mark.parametrize(
    ("name", "moves"),
    [("full", False), ("causal", False), ("varlen_full", False), ("varlen_causal", False), ("swa_causal_1024", True)],
)
def test_windows_drift(name, moves):
    tables = column_tables(workloads.make(name, 16384).bands(), 16384, 16384, 32, 128)
    assert drifts(tables) == moves


def test_documents_stay_together_the_longest_first():
    tables = column_tables(workloads.make("varlen_causal", 32768).bands(), 32768, 32768, 32, 128)
    ends = workloads.document_ends(32768)
    order = clusters(tables)
    document = np.searchsorted(ends, order * 128 + 127, side="right") - 1  # of a tile's last key
    changes = np.count_nonzero(np.diff(document))
    assert changes < 2 * len(ends)
    assert np.diff(ends)[document[0]] == np.diff(ends).max()


@pytest.mark.parametrize("kind", [1, 2], ids=["causal", "inv_causal"])
def test_tiles_of_a_document_come_from_its_longer_end(kind):
    order = clusters(column_tables(SliceTable([[0, 1024, 0, 1024, kind]]).bands(), 1024, 1024, 32, 128))
    assert order.tolist() == ([*range(8)] if kind == 1 else [*reversed(range(8))])
