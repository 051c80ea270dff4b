# SPDX-License-Identifier: Apache-2.0
"""Dealing chunks to ranks, and the layout that comes of it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.config import (
    BatchToppHeapDispatchAlg,
    BSDispatchAlg,
    BTPDispatchAlg,
    DPDispatchAlg,
    LBDispatchAlg,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    RandomSelectDispatchAlg,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
)
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import even_cuts
from magi_attention.testing.masks import random_masks

ALGORITHMS = [
    LocalityDispatchAlg(),
    MinHeapDispatchAlg(),
    ToppHeapDispatchAlg(top_p=0.5),
    BatchToppHeapDispatchAlg(top_p=1.0),
    SequentialDispatchAlg(),
    SortedSequentialSelectAlg(),
    SortedSequentialSelectAlg(allocation_ratio=0.5),
    BSDispatchAlg(),
    LBDispatchAlg(),
    DPDispatchAlg(),
    BTPDispatchAlg(),
    RandomSelectDispatchAlg(),
]
CAUSAL = SliceTable([[0, 64, 0, 64, 1]])


def layout_of(slices, total, chunk_size, num_ranks, algorithm=MinHeapDispatchAlg()):
    return make_layout(
        slices, num_real=total, total=total, chunk_size=chunk_size, num_ranks=num_ranks, algorithm=algorithm
    )


def loads(slices, layout):
    area = measure_chunks(slices, even_cuts(layout.total, layout.chunk_size)).area
    return np.bincount(layout.owner, weights=area, minlength=layout.num_ranks)


@given(random_masks(48), st.integers(1, 9))
def test_chunk_areas_count_the_mask(mask, chunk_size):
    total, slices = mask
    work = measure_chunks(slices, even_cuts(total, chunk_size))
    for chunk, area in enumerate(work.area):
        assert area == slices.clip_rows(chunk * chunk_size, (chunk + 1) * chunk_size).area()
    for chunk, index, (start, stop) in zip(work.chunk, work.slice_index, work.keys, strict=True):
        piece = SliceTable(slices.rows[[index]]).clip_rows(chunk * chunk_size, (chunk + 1) * chunk_size)
        assert (piece.rows[:, 2].min(), piece.rows[:, 3].max()) == (start, stop)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_even_shards_hold_equally_many_chunks(algorithm, num_ranks):
    layout = layout_of(CAUSAL, 64, 4, num_ranks, algorithm)
    assert (np.bincount(layout.owner, minlength=num_ranks) == 16 // num_ranks).all()
    assert (layout_of(CAUSAL, 64, 4, num_ranks, algorithm).owner == layout.owner).all()


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.is_equal_num_workloads], ids=repr)
def test_uneven_shards_hold_all_chunks(algorithm):
    layout = layout_of(SliceTable([[0, 61, 0, 61, 1]]), 61, 4, 3, algorithm)
    counts = np.bincount(layout.owner, minlength=3)
    assert counts.sum() == 16
    assert counts.min() > 0
    assert layout.rows_per_rank.sum() == 61


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.is_equal_num_workloads], ids=repr)
def test_no_rank_is_left_without_a_chunk(algorithm):
    # Chunks without work would all fit on few ranks.
    assert (layout_of(SliceTable([[0, 1, 0, 1, 0]]), 5, 1, 4, algorithm).rows_per_rank > 0).all()


def test_min_heap_deals_the_largest_first_to_the_lightest():
    # Causal areas grow with the index: 7 to rank 0, 6 to rank 1, then 5 to the lighter rank 1, and so on.
    assert layout_of(CAUSAL, 64, 8, 2).owner.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


def test_sequential_gives_the_first_ranks_one_more():
    layout = layout_of(SliceTable([[0, 50, 0, 50, 0]]), 50, 10, 2, SequentialDispatchAlg())
    assert layout.owner.tolist() == [0, 0, 0, 1, 1]


def test_affinity_keeps_documents_together():
    rows = [[i, i + 16, i, i + 16, 0] for i in range(0, 64, 16)]
    layout = layout_of(SliceTable(rows), 64, 8, 4, ToppHeapDispatchAlg(top_p=1.0))
    assert (layout.owner[::2] == layout.owner[1::2]).all()


@given(st.lists(st.integers(1, 30), min_size=4, max_size=8), st.sampled_from([2, 3]))
def test_binary_search_finds_the_least_maximum(lengths, num_ranks):
    lengths = lengths[: len(lengths) // num_ranks * num_ranks]
    # One row a chunk, each with its own number of keys: areas are what we like.
    slices = SliceTable([[i, i + 1, 0, n, 0] for i, n in enumerate(lengths)])
    layout = layout_of(slices, len(lengths), 1, num_ranks, BSDispatchAlg())
    capacity = len(lengths) // num_ranks
    best = min(
        max(sum(n for n, r in zip(lengths, owner, strict=True) if r == rank) for rank in range(num_ranks))
        for owner in itertools.product(range(num_ranks), repeat=len(lengths))
        if all(owner.count(rank) == capacity for rank in range(num_ranks))
    )
    assert loads(slices, layout).max() == best


def test_search_of_many_chunks_ends_and_is_no_worse_than_the_heap():
    rng = np.random.default_rng(0)
    slices = SliceTable([[i, i + 1, 0, n, 0] for i, n in enumerate(rng.integers(1, 10**6, 512).tolist())])
    heap = loads(slices, layout_of(slices, 512, 1, 64)).max()
    assert loads(slices, layout_of(slices, 512, 1, 64, BSDispatchAlg())).max() <= heap


def test_search_ends_where_areas_are_more_than_a_float_can_count():
    rows, keys = 2**27 + 1, 2**26 + 3
    area = rows * keys
    assert int(float(area)) > area
    slices = SliceTable([[0, rows, 0, keys, 0], [rows, 2 * rows, 0, keys, 0]])
    layout = make_layout(
        slices, num_real=2 * rows, total=2 * rows, chunk_size=rows, num_ranks=2, algorithm=BSDispatchAlg()
    )
    assert sorted(layout.owner.tolist()) == [0, 1]


def test_fewer_chunks_than_ranks_is_refused():
    with pytest.raises(ValueError, match="4 chunks, fewer than the 8 ranks: choose chunks of at most 8 tokens"):
        layout_of(CAUSAL, 64, 16, 8)


def test_layout_knows_where_rows_are():
    layout = layout_of(SliceTable([[0, 50, 0, 50, 1]]), 50, 8, 2)
    rows = np.concatenate([layout.positions(rank) for rank in range(2)])
    assert sorted(rows.tolist()) == list(range(50))
    for rank in range(2):
        positions = layout.positions(rank)
        assert (np.diff(positions) > 0).all()
        assert len(positions) == layout.rows_per_rank[rank]
        assert np.unique(positions // 8).tolist() == layout.chunks_of(rank).tolist()
        for start, stop, local in layout.runs_of(rank):
            assert (positions[local : local + stop - start] == np.arange(start, stop)).all()
