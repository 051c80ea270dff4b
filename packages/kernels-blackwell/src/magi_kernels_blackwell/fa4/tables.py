# SPDX-License-Identifier: Apache-2.0
"""The tables that FlashAttention-4's kernels read of an irregular mask, on the host and on a device.

Tiles come as two padded lists per row of tiles, ascending: full tiles, of which the kernels mask only what lies beyond
the tensors' ends, and partial ones, which they mask by the intervals of each line. The forward pass walks keys for each
block of queries, the backward pass queries for each block of keys.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.kernels.table_streams import StreamsOfTables, settle
from magi_attention.kernels.tiles import IndexLists, RowIntervals, Tiles, classify_tiles, tile_runs
from magi_kernels_blackwell.masks import intervals_of_keys, intervals_of_queries

MANY_PIECES = 1024
"""So many pieces of work that their order is left: about 8 for each multiprocessor.

On an H200, packed causal documents of 8k tokens are 10 % faster with the longest first, of 32k tokens 5 % slower.
"""

LINE_PADDING = 256
"""Lines that tables have beyond the tensor's: kernels look up lines of the last tile that lie past the end."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts the scores and reads the mask.

    Attributes:
        block_q: queries of a tile.
        block_k: keys of a tile.
        lines: what the kernel looks intervals up by.
    """

    block_q: int
    block_k: int
    lines: Literal["queries", "keys"]


class SparseTables(NamedTuple):
    """A mask for one pass, int32. Shapes: R rows of tiles, W the longest list, L lines.

    Attributes:
        partial_counts, partial_tiles: ``[1, 1, R]`` and ``[1, 1, R, W]``, the partial tiles of each row.
        full_counts, full_tiles: the same for full tiles.
        partial_ranks, full_ranks: of every listed tile of a backward pass, ``[1, 1, R, W]``, its number among all tiles
            of the same queries, by ascending keys: the order of sums in a deterministic pass. None in a forward pass.
        offsets: ``[L + 1]``, and
        bounds: ``[I, 2]``: line l has the intervals ``bounds[offsets[l]:offsets[l + 1]]``.
    """

    partial_counts: Tensor
    partial_tiles: Tensor
    full_counts: Tensor
    full_tiles: Tensor
    partial_ranks: Tensor | None
    full_ranks: Tensor | None
    offsets: Tensor
    bounds: Tensor


class RunTables(NamedTuple):
    """A mask for a backward pass that walks runs of tiles, int32. Shapes: R rows of tiles (blocks of keys), L lines.

    Attributes:
        streams: of the launches that read the tables.
        work: ``[R * key heads]``, the rows in the order of work, each as ``row * heads + head``.
        partial_offsets: ``[R + 1]``, and
        partial_runs: ``[.., 2]``: row r has the partial tiles of the blocks of queries ``start`` to ``stop`` of the
            runs ``partial_runs[partial_offsets[r]:partial_offsets[r + 1]]``.
        full_offsets, full_runs: the same for full tiles. Kernels don't mask these, which is right beyond the last
            query; a last block of keys that is cut off has partial tiles only.
        offsets, bounds: as of :class:`SparseTables`.
    """

    streams: StreamsOfTables
    work: Tensor
    partial_offsets: Tensor
    partial_runs: Tensor
    full_offsets: Tensor
    full_runs: Tensor
    offsets: Tensor
    bounds: Tensor


def forward_tiling(arch: int, head_dim: int, head_dim_v: int) -> Tiling:
    """The tiles of the forward kernel: the largest it computes at once for these head dims.

    On SM90 they are FlashAttention-4's own choices for dense attention, except that 96 dims have no 144 keys. On
    SM100 a tile is two matrix products high, but for 256 dims.
    """
    if arch != 90:
        return Tiling(128 if head_dim_v > 128 else 256, 128, "queries")
    if head_dim <= 96:
        return Tiling(192, 128, "queries")
    if head_dim <= 128:
        return Tiling(128, 128, "queries")
    if head_dim <= 192:
        return Tiling(128, 128 if head_dim_v <= 128 else 112, "queries")
    return Tiling(128, 80, "queries")


def backward_tiling(head_dim: int) -> Tiling:
    """The tiles of the SM100 backward kernel, which works in pairs from 128 dims on: that needs 256 keys."""
    return Tiling(128, 256 if head_dim >= 128 else 128, "keys")


def forward_tables(slices: SliceTable, num_q: int, num_k: int, tiling: Tiling, device: torch.device) -> SparseTables:
    """Return the tables of a forward pass. Built once and kept with the slices."""

    def build() -> SparseTables:
        tiles = _tiles(slices, num_q, num_k, tiling)
        return _tables(tiles, slices, num_q, num_k, tiling, device, -(-num_k // tiling.block_k), with_ranks=False)

    return slices.derived(("fa4 forward", num_q, num_k, tiling, device), build)


def backward_tables(slices: SliceTable, num_q: int, num_k: int, tiling: Tiling, device: torch.device) -> SparseTables:
    """Return the tables of a backward pass. Built once and kept with the slices."""

    def build() -> SparseTables:
        tiles = _tiles(slices, num_q, num_k, tiling)
        num_rows = -(-num_k // tiling.block_k)
        by_keys = Tiles(tiles.full.transposed(num_rows), tiles.partial.transposed(num_rows))
        width = -(-num_q // tiling.block_q)
        return _tables(by_keys, slices, num_q, num_k, tiling, device, width, with_ranks=True)

    return slices.derived(("fa4 backward", num_q, num_k, tiling, device), build)


def grouped_tiling(head_dim: int) -> Tiling:
    """The tiles of the SM90 backward kernel, :mod:`.grouped_kernel`: FlashAttention-4's own for causal masks.

    Its tiles of 80 queries, for full masks of 128 dims, came out 10 to 20 % slower here for all masks measured.
    """
    if head_dim <= 128:
        return Tiling(128 if head_dim <= 64 else 64, 128, "keys")
    return Tiling(64, 96 if head_dim <= 192 else 64, "queries")


def run_tables(
    slices: SliceTable, num_q: int, num_k: int, heads_k: int, tiling: Tiling, device: torch.device
) -> RunTables:
    """Return the runs of tiles of a backward pass. Built once and kept with the slices."""

    def build() -> RunTables:
        by_keys = tile_runs(band.transpose(slices.bands()), num_k, num_q, tiling.block_k, tiling.block_q)
        partial, full = by_keys.partial, by_keys.full
        if num_k % tiling.block_k:
            partial, full = _last_row_moved(full, partial)
        of_queries = tiling.lines == "queries"
        intervals = intervals_of_queries(slices, num_q) if of_queries else intervals_of_keys(slices, num_k)
        work = longest_first(partial.sizes + full.sizes, heads_k)
        tables = (work, partial.offsets, _pairs(partial), full.offsets, _pairs(full), *_line_tables(intervals))
        on_device = [to_device(table, device) for table in tables]
        settle(device)
        return RunTables(StreamsOfTables(on_device), *on_device)

    return slices.derived(("fa4 runs", num_q, num_k, heads_k, tiling, device), build)


def longest_first(tiles: NDArray[np.int64], heads: int) -> NDArray[np.int64]:
    """Order the work of all heads, as ``row * heads + head``: rows of more tiles first, if there is not much work.

    Multiprocessors take work as they become free, so that the last pieces should be short. But pieces that are
    computed at once should read the same queries. So rows of about as many tiles, to a quarter, stay together by head
    and in order; and all rows do where each multiprocessor gets many pieces, so that the last one matters little.
    """
    size_class = np.floor(np.log(np.maximum(tiles, 1)) / np.log(1.25))
    if len(tiles) * heads > MANY_PIECES:
        size_class[:] = 0
    head, row = (each.ravel() for each in np.indices((heads, len(tiles))))
    order = np.lexsort((row, head, -size_class[row]))
    return (row * heads + head)[order]


def _last_row_moved(source: RowIntervals, target: RowIntervals) -> tuple[RowIntervals, RowIntervals]:
    """Return ``target`` with the last row's intervals of ``source`` beside its own, and ``source`` without them."""
    cut = source.offsets[-2]
    rest = RowIntervals(np.minimum(source.offsets, cut), source.starts[:cut], source.stops[:cut])
    offsets = target.offsets.copy()
    offsets[-1] += len(source.starts) - cut
    starts, stops = ([a, b[cut:]] for a, b in ((target.starts, source.starts), (target.stops, source.stops)))
    return RowIntervals(offsets, np.concatenate(starts), np.concatenate(stops)), rest


def _tiles(slices: SliceTable, num_q: int, num_k: int, tiling: Tiling) -> Tiles:
    key = ("tiles", num_q, num_k, tiling.block_q, tiling.block_k)
    return slices.derived(key, lambda: classify_tiles(slices.bands(), num_q, num_k, tiling.block_q, tiling.block_k))


def _tables(
    tiles: Tiles,
    slices: SliceTable,
    num_q: int,
    num_k: int,
    tiling: Tiling,
    device: torch.device,
    most: int,
    *,
    with_ranks: bool,
) -> SparseTables:
    width = max(int(tiles.partial.counts.max(initial=0)), int(tiles.full.counts.max(initial=0)), min(most, 2))
    partial_ranks, full_ranks = _ranks(tiles) if with_ranks else (None, None)
    of_queries = tiling.lines == "queries"
    intervals = intervals_of_queries(slices, num_q) if of_queries else intervals_of_keys(slices, num_k)
    offsets, bounds = _line_tables(intervals)

    def lists(of: IndexLists, values: NDArray[np.int64] | None) -> Tensor | None:
        if values is None:
            return None
        return to_device(IndexLists(of.offsets, values).padded(width)[None, None], device)

    partial_tiles, full_tiles = lists(tiles.partial, tiles.partial.indices), lists(tiles.full, tiles.full.indices)
    assert partial_tiles is not None
    assert full_tiles is not None
    return SparseTables(
        partial_counts=to_device(tiles.partial.counts[None, None], device),
        partial_tiles=partial_tiles,
        full_counts=to_device(tiles.full.counts[None, None], device),
        full_tiles=full_tiles,
        partial_ranks=lists(tiles.partial, partial_ranks),
        full_ranks=lists(tiles.full, full_ranks),
        offsets=to_device(offsets, device),
        bounds=to_device(bounds, device),
    )


def _line_tables(intervals: RowIntervals) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``offsets``, with padding lines that have no intervals, and ``bounds``."""
    offsets = np.pad(intervals.offsets, (0, LINE_PADDING), mode="edge")
    return offsets, _pairs(intervals)


def _pairs(intervals: RowIntervals) -> NDArray[np.int64]:
    """Return where intervals start and stop as rows, at least two.

    A table of a single row would look like one without strides to the kernels' interface.
    """
    pairs = np.stack([intervals.starts, intervals.stops], axis=1)
    return np.pad(pairs, ((0, max(2 - len(pairs), 0)), (0, 0)))


def _ranks(by_keys: Tiles) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number, for each block of queries, the tiles of both kinds by ascending block of keys; parallel to the lists."""
    row, _ = expand_counts(np.concatenate([by_keys.partial.counts, by_keys.full.counts]))
    row %= max(len(by_keys.partial.counts), 1)
    column = np.concatenate([by_keys.partial.indices, by_keys.full.indices])
    order = np.lexsort((row, column))
    ordered = column[order]
    first = np.searchsorted(ordered, ordered)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first
    cut = len(by_keys.partial.indices)
    return rank[:cut], rank[cut:]


def to_device(table: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy a table to a device, as int32."""
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32)).to(device)
