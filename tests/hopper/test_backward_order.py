# SPDX-License-Identifier: Apache-2.0
"""The order in which the backward kernel's blocks take tiles of keys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import workloads
from magi_attention.testing.masks import rectangular_masks
from magi_kernels_hopper.backward_order import WorkSizes, clusters, drifts, order_work
from magi_kernels_hopper.backward_plan import column_tables


@settings(max_examples=200, deadline=None)
@given(
    rectangular_masks(150),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 4, 7]),
    st.sampled_from([16, 128]),
)
def test_every_item_is_taken_once(mask, group, num_kv_heads, blocks, tile_k):
    (num_q, num_k), slices = mask
    work = order_work(slices.bands(), num_q, num_k, WorkSizes(16, tile_k, num_kv_heads, group, blocks))
    packs = group // work.pack
    num_tiles = -(-num_k // tile_k)
    assert work.pack * packs == group
    each = packs // work.split
    assert len(work.items) == num_tiles * num_kv_heads * work.split
    assert {tuple(row) for row in work.items.tolist()} == {
        (tile, head, part * each, each)
        for tile in range(num_tiles)
        for head in range(num_kv_heads)
        for part in range(work.split)
    }
    for head, part in np.ndindex(num_kv_heads, work.split):  # determinism needs the same order for all packs
        chosen = (work.items[:, 1] == head) & (work.items[:, 2] == part * each)
        np.testing.assert_array_equal(work.items[chosen, 0], work.order)
    places = {tuple(row[:3]): place for place, row in enumerate(work.items.tolist())}
    assert all(places[tile, head, first - each] < place for (tile, head, first), place in places.items() if first)


@pytest.mark.parametrize(
    ("name", "total", "split"),
    [
        ("full", 32768, 1),
        ("causal", 32768, 4),  # tiles of queries of all blocks are spread over the sequence
        ("swa_causal_1024", 32768, 1),
    ],
)
def test_heads_are_cut(name, total, split):
    sizes = WorkSizes(80, 128, 8, 8, 132)
    assert order_work(workloads.make(name, total).bands(), total, total, sizes).split == split


@pytest.mark.parametrize(("group", "pack"), [(1, 1), (8, 2), (3, 1), (6, 2)])
def test_heads_share_tiles(group, pack):
    bands = workloads.make("causal", 1024).bands()
    assert order_work(bands, 1024, 1024, WorkSizes(64, 128, 2, group, 132)).pack == pack


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
