# SPDX-License-Identifier: Apache-2.0
"""The tables that kernels read, walked as the kernels walk them, against dense masks. Needs none of the wheels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.testing.masks import MASK_FAMILIES, random_masks, rectangular_masks
from magi_attention.testing.oracle import dense_mask
from magi_attention.testing.tiles import IndexLists, classify_tiles
from magi_kernels_blackwell.cudnn_flex import tables as cudnn_tables
from magi_kernels_blackwell.cudnn_flex.tables import row_functions
from magi_kernels_blackwell.fa4.tables import (
    RunTables,
    SparseTables,
    Tiling,
    backward_tables,
    backward_tiling,
    forward_tables,
    forward_tiling,
    grouped_tiling,
    longest_first,
    run_tables,
)
from magi_kernels_blackwell.masks import PackedMask, has_pairs, intervals_of_queries, packed_mask

CPU = torch.device("cpu")
SMALL = Tiling(16, 8, "queries")
TILINGS = st.sampled_from([SMALL, Tiling(16, 8, "keys"), Tiling(8, 16, "keys"), Tiling(24, 10, "queries")])


def lines_of(tables: SparseTables | RunTables, num_lines: int, num_positions: int) -> torch.Tensor:
    """The dense mask ``[lines, positions]`` of the intervals."""
    mask = torch.zeros(num_lines, num_positions, dtype=torch.bool)
    offsets = tables.offsets.tolist()
    for line in range(num_lines):
        for start, stop in tables.bounds[offsets[line] : offsets[line + 1]].tolist():
            mask[line, start:stop] = True
    return mask


def mask_of(tables: SparseTables, num_q: int, num_k: int, tiling: Tiling, *, by_keys: bool) -> torch.Tensor:
    """The dense mask that a kernel applies: full tiles unmasked but for the ends, partial ones by their lines."""
    lines = lines_of(tables, num_q, num_k) if tiling.lines == "queries" else lines_of(tables, num_k, num_q).T
    mask = torch.zeros(num_q, num_k, dtype=torch.bool)
    for counts, tiles, full in (
        (tables.partial_counts, tables.partial_tiles, False),
        (tables.full_counts, tables.full_tiles, True),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            listed = tiles[0, 0, row, :count].tolist()
            assert listed == sorted(set(listed))
            for other in listed:
                m, n = (other, row) if by_keys else (row, other)
                tile = (
                    slice(m * tiling.block_q, (m + 1) * tiling.block_q),
                    slice(n * tiling.block_k, (n + 1) * tiling.block_k),
                )
                assert mask[tile].numel()
                assert not mask[tile].any()
                mask[tile] = True if full else lines[tile]
    return mask


@settings(max_examples=60)
@given(rectangular_masks(120), TILINGS)
def test_both_passes_tables_say_the_mask(mask, tiling):
    (num_q, num_k), slices = mask
    expected = dense_mask(slices, num_q, num_k)
    forward = forward_tables(slices, num_q, num_k, tiling, CPU)
    assert torch.equal(mask_of(forward, num_q, num_k, tiling, by_keys=False), expected)
    backward = backward_tables(slices, num_q, num_k, tiling, CPU, ranks=False)
    assert torch.equal(mask_of(backward, num_q, num_k, tiling, by_keys=True), expected)
    assert all(table is None or table.dtype == torch.int32 for table in (*forward, *backward))


@settings(max_examples=60)
@given(rectangular_masks(120), TILINGS)
def test_runs_of_tiles_say_the_mask(mask, tiling):
    """Walked as the kernel does: full tiles may reach past the last query, but not past the last key."""
    (num_q, num_k), slices = mask
    tables = run_tables(slices, num_q, num_k, 3, tiling, CPU)
    lines = lines_of(tables, num_q, num_k) if tiling.lines == "queries" else lines_of(tables, num_k, num_q).T
    seen = torch.zeros(num_q, num_k, dtype=torch.bool)
    for offsets, runs, is_full in (
        (tables.partial_offsets, tables.partial_runs, False),
        (tables.full_offsets, tables.full_runs, True),
    ):
        assert offsets.dtype == runs.dtype == tables.work.dtype == torch.int32
        assert sorted(tables.work.tolist()) == list(range(3 * (len(offsets) - 1)))
        assert len(offsets) == -(-num_k // tiling.block_k) + 1
        assert len(runs) >= 2
        for row, (first, last) in enumerate(pairwise(offsets.tolist())):
            for m in (m for start, stop in runs[first:last].tolist() for m in range(start, stop)):
                tile = (
                    slice(m * tiling.block_q, (m + 1) * tiling.block_q),
                    slice(row * tiling.block_k, (row + 1) * tiling.block_k),
                )
                assert seen[tile].numel()
                assert not seen[tile].any()
                assert not is_full or tile[1].stop <= num_k
                seen[tile] = True if is_full else lines[tile]
    assert torch.equal(seen, dense_mask(slices, num_q, num_k))


def test_long_work_comes_first_and_alike_work_stays_together():
    tiles = np.array([1, 100, 90, 0, 8, 101])
    assert longest_first(tiles, 2).tolist() == [2, 4, 10, 3, 5, 11, 8, 9, 0, 6, 1, 7]
    assert longest_first(np.full(3, 7), 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert longest_first(np.zeros(0, int), 2).tolist() == []
    assert longest_first(np.arange(600), 2).tolist() == [*range(0, 1200, 2), *range(1, 1200, 2)]


@settings(max_examples=40)
@given(rectangular_masks(120))
def test_ranks_number_each_query_blocks_tiles_by_ascending_keys(mask):
    (num_q, num_k), slices = mask
    tables = backward_tables(slices, num_q, num_k, SMALL, CPU, ranks=True)
    ranked: dict[int, list[tuple[int, int]]] = {}
    for counts, tiles, ranks in (
        (tables.partial_counts, tables.partial_tiles, tables.partial_ranks),
        (tables.full_counts, tables.full_tiles, tables.full_ranks),
    ):
        assert ranks.shape == tiles.shape
        for row, count in enumerate(counts[0, 0].tolist()):
            for q_block, rank in zip(tiles[0, 0, row, :count].tolist(), ranks[0, 0, row, :count].tolist(), strict=True):
                ranked.setdefault(q_block, []).append((row, rank))
    for tiles_of_block in ranked.values():
        assert [rank for _, rank in sorted(tiles_of_block)] == list(range(len(tiles_of_block)))


@settings(max_examples=60)
@given(rectangular_masks(120), TILINGS)
def test_lists_are_those_of_single_tiles(mask, tiling):
    """Of both directions, padded with zeros, the ranks too; compared with what numpy lists one by one."""
    (num_q, num_k), slices = mask
    tiles = classify_tiles(slices.bands(), num_q, num_k, tiling.block_q, tiling.block_k)
    by_query = tiles.partial, tiles.full
    by_key = [lists.transposed(-(-num_k // tiling.block_k)) for lists in by_query]
    forward = forward_tables(slices, num_q, num_k, tiling, CPU)
    backward = backward_tables(slices, num_q, num_k, tiling, CPU, ranks=True)
    for tables, kinds, most in (
        (forward, by_query, -(-num_k // tiling.block_k)),
        (backward, by_key, -(-num_q // tiling.block_q)),
    ):
        for lists, counts, listed in zip(kinds, tables[0:4:2], tables[1:4:2], strict=True):
            width = max(int(lists.counts.max(initial=0)), min(most, 2))
            assert np.array_equal(counts.numpy(), lists.counts[None, None])
            assert np.array_equal(listed.numpy(), lists.padded(width)[None, None])
    touched = np.zeros((len(by_key[0].counts), -(-num_q // tiling.block_q)), int)
    for lists in by_key:
        touched[expand_counts(lists.counts)[0], lists.indices] = 1
    ranks = np.cumsum(touched, axis=0) - touched
    for lists, listed in zip(by_key, backward[4:6], strict=True):
        row, _ = expand_counts(lists.counts)
        expected = IndexLists(lists.offsets, ranks[row, lists.indices])
        assert np.array_equal(listed.numpy(), expected.padded(listed.shape[3])[None, None])


def test_lines_of_the_last_tile_beyond_the_tensor_have_no_intervals():
    for arch in (90, 100, 103):
        for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
            for tiling in (forward_tiling(arch, *dims), backward_tiling(dims[0]), grouped_tiling(dims[0])):
                slices = SliceTable([[0, 1, 0, 1, 0]])
                offsets = forward_tables(slices, 1, 1, tiling, CPU).offsets
                assert len(offsets) > max(tiling.block_q, tiling.block_k)
                assert offsets[1:].eq(1).all()


@settings(max_examples=60)
@given(rectangular_masks(100))
def test_row_functions_are_the_mask_with_ascending_ends(mask):
    (num_q, num_k), slices = mask
    functions = row_functions(intervals_of_queries(slices, num_q), CPU).numpy()
    assert functions.dtype == np.int32
    assert functions.shape[::2] == (1, num_q)
    assert functions.shape[1] % 2 == 1
    ends = functions[0]
    assert (np.diff(ends, axis=0) >= 0).all()
    key = np.arange(num_k)
    seen = key < ends[0][:, None]
    for start, stop in zip(ends[1::2], ends[2::2], strict=True):
        seen |= (key >= start[:, None]) & (key < stop[:, None])
    assert np.array_equal(seen, dense_mask(slices, num_q, num_k).numpy())


def test_row_functions_are_padded_to_the_row_of_most_intervals_up_to_a_size(monkeypatch):
    slices = SliceTable([[0, 1, 2 * k, 2 * k + 1, 0] for k in range(4)] + [[1, 3, 1, 4, 0]])
    intervals = intervals_of_queries(slices, 4)
    functions = row_functions(intervals, CPU)
    assert functions[0].T.tolist() == [[1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 4, 4, 4, 4], [0, 1, 4, 4, 4, 4, 4], [0] * 7]
    monkeypatch.setattr(cudnn_tables, "MOST_ENDS", 27)
    with pytest.raises(ValueError, match=r"4 key intervals of the query that has the most.* 'blackwell'"):
        row_functions(intervals, CPU)


def dense_packed(packed: PackedMask, num_q: int, num_k: int) -> torch.Tensor:
    """What FlashAttention computes for packed documents with a window: its definition, written down."""
    mask = torch.zeros(num_q, num_k, dtype=torch.bool)
    for n in range(packed.num_documents):
        q0, q1 = packed.q_offsets[n : n + 2].tolist()
        k0, k1 = packed.k_offsets[n : n + 2].tolist()
        distance = torch.arange(k0, k1) - (torch.arange(q0, q1)[:, None] + k1 - q1)
        inside = torch.ones_like(distance, dtype=torch.bool)
        if packed.left is not None:
            inside &= distance >= -packed.left
        if packed.right is not None:
            inside &= distance <= packed.right
        mask[q0:q1, k0:k1] = inside
    return mask


@settings(max_examples=200)
@given(random_masks(400), st.integers(0, 2))
def test_a_mask_found_to_be_packed_is_exactly_that(mask, more_keys):
    total, slices = mask
    packed = packed_mask(slices, total, total + more_keys)
    if packed is not None:
        assert torch.equal(dense_packed(packed, total, total + more_keys), dense_mask(slices, total, total + more_keys))


@pytest.mark.parametrize(
    ("rows", "num_q", "num_k", "window", "documents"),
    [
        ([[0, 500, 0, 500, 0]], 500, 500, (None, None), 1),
        ([[0, 500, 0, 500, 1]], 500, 500, (None, 0), 1),
        ([[0, 300, 0, 500, 1]], 300, 500, (None, 0), 1),
        ([[0, 200, 0, 200, 1], [200, 500, 200, 500, 1]], 500, 500, (None, 0), 2),
        ([[0, 200, 0, 100, 0], [200, 500, 100, 500, 0]], 500, 500, (None, None), 2),
        # A causal mask cut into slices is still one.
        ([[0, 200, 0, 200, 1], [200, 500, 0, 200, 0], [200, 500, 200, 500, 1]], 500, 500, (None, 0), 1),
        # A window of 100 keys to the left.
        ([[0, 100, 0, 100, 1], [100, 500, 0, 500, 3]], 500, 500, (100, 0), 1),
        ([[0, 500, 0, 500, 2]], 500, 500, (0, None), 1),
    ],
)
def test_native_masks_are_found(rows, num_q, num_k, window, documents):
    packed = packed_mask(SliceTable(rows), num_q, num_k)
    assert packed is not None
    assert (packed.left, packed.right) == window
    assert packed.num_documents == documents


@pytest.mark.parametrize(
    ("rows", "num_q", "num_k"),
    [
        ([[0, 499, 0, 500, 0]], 500, 500),  # a query sees nothing
        ([[0, 500, 0, 499, 0]], 500, 500),  # a key is not seen
        ([[0, 200, 0, 200, 0], [200, 500, 200, 500, 1]], 500, 500),  # unlike documents
        ([[0, 250, 250, 500, 0], [250, 500, 0, 250, 0]], 500, 500),  # in another order
        ([[0, 500, 0, 100, 1]], 500, 100),  # queries without keys
        ([[i, i + 10, i, i + 10, 0] for i in range(0, 500, 10)], 500, 500),  # tiny documents
        ([], 0, 5),
        ([], 5, 0),
    ],
)
def test_other_masks_are_not_taken_for_native_ones(rows, num_q, num_k):
    assert packed_mask(SliceTable(rows), num_q, num_k) is None


def test_families_that_kernels_know_run_natively():
    rng = np.random.default_rng(0)
    for family in ("full", "causal", "sliding_window"):
        assert packed_mask(MASK_FAMILIES[family](512, rng), 512, 512) is not None


def test_tables_are_kept_with_the_slices():
    slices = SliceTable([[0, 100, 0, 100, 1]])
    assert forward_tables(slices, 100, 100, SMALL, CPU) is forward_tables(slices, 100, 100, SMALL, CPU)
    first, again = (backward_tables(slices, 100, 100, SMALL, CPU, ranks=True) for _ in range(2))
    assert first is again
    assert packed_mask(slices, 100, 100) is packed_mask(slices, 100, 100)


def test_masks_without_pairs_are_known():
    assert not has_pairs(SliceTable([]))
    assert not has_pairs(SliceTable([[0, 0, 0, 9, 0], [3, 9, 2, 2, 1]]))
    assert has_pairs(SliceTable([[3, 4, 2, 3, 1]]))
