# SPDX-License-Identifier: Apache-2.0
"""The tables that FlashAttention-4's kernels read of an irregular mask, on a device.

Tiles come as two padded lists per row of tiles, ascending: full tiles, of which the kernels mask only what lies beyond
the tensors' ends, and partial ones, which they mask by the intervals of each line. The forward pass walks keys for each
block of queries, the backward pass queries for each block of keys. The host finds runs of tiles; the device lists them.

Tensors are not indexed by brackets here: these ask for the device, which is not there where kernels are only compiled.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.kernels.device_tiles import (
    DeviceIntervals,
    interval_table,
    padded_lists,
    upload,
    upload_intervals,
)
from magi_attention.kernels.table_streams import StreamsOfTables, settle
from magi_attention.kernels.tiles import RowIntervals, TileRuns, tile_runs
from magi_kernels_blackwell.masks import intervals_of_queries

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
    """A mask for one pass, int32. Shapes: R rows of tiles, W the longest list of a kind, L lines.

    Attributes:
        partial_counts, partial_tiles: ``[1, 1, R]`` and ``[1, 1, R, W]``, the partial tiles of each row.
        full_counts, full_tiles: the same for full tiles, with a W of their own.
        partial_ranks, full_ranks: of every listed tile of a backward pass, in the lists' shapes, its number among all
            tiles of the same queries, by ascending keys: the order of sums in a deterministic pass. None in others.
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
        tiles = _runs_by_query(slices, num_q, num_k, tiling)
        lists = _padded_lists(tiles, -(-num_k // tiling.block_k), device)
        tables = SparseTables(*lists, None, None, *_line_tables(slices, num_q, num_k, tiling, device))
        settle(device)
        return tables

    return slices.derived(("fa4 forward", num_q, num_k, tiling, device), build)


def backward_tables(
    slices: SliceTable, num_q: int, num_k: int, tiling: Tiling, device: torch.device, *, ranks: bool
) -> SparseTables:
    """Return the tables of a backward pass, with ranks if asked for. Built once and kept with the slices."""

    def build() -> SparseTables:
        lists = _padded_lists(_runs_by_key(slices, num_q, num_k, tiling), -(-num_q // tiling.block_q), device)
        of_lists: tuple[Tensor | None, Tensor | None] = (None, None)
        if ranks:
            of_lists = _ranks(_runs_by_query(slices, num_q, num_k, tiling), lists)
        tables = SparseTables(*lists, *of_lists, *_line_tables(slices, num_q, num_k, tiling, device))
        settle(device)
        return tables

    return slices.derived(("fa4 backward", num_q, num_k, tiling, device, ranks), build)


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
        by_keys = _runs_by_key(slices, num_q, num_k, tiling)
        partial, full = by_keys.partial, by_keys.full
        if num_k % tiling.block_k:
            partial, full = _last_row_moved(full, partial)
        on_device = [upload(longest_first(partial.sizes + full.sizes, heads_k), device)]
        for runs in (upload_intervals(each, device) for each in (partial, full)):
            on_device += [runs.offsets, _pairs(runs)]
        on_device += _line_tables(slices, num_q, num_k, tiling, device)
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


def _runs_by_query(slices: SliceTable, num_q: int, num_k: int, tiling: Tiling) -> TileRuns:
    return tile_runs(slices.bands(), num_q, num_k, tiling.block_q, tiling.block_k)


def _runs_by_key(slices: SliceTable, num_q: int, num_k: int, tiling: Tiling) -> TileRuns:
    return tile_runs(band.transpose(slices.bands()), num_k, num_q, tiling.block_k, tiling.block_q)


class _Lists(NamedTuple):
    """The first four of :class:`SparseTables`."""

    partial_counts: Tensor
    partial_tiles: Tensor
    full_counts: Tensor
    full_tiles: Tensor


def _padded_lists(tiles: TileRuns, most: int, device: torch.device) -> _Lists:
    """Expand the runs of each row on the device, where a row can have ``most`` tiles; each kind as wide as it needs.

    A list of width one would look like one without strides to the kernels' interface.
    """
    lists = []
    for runs in (tiles.partial, tiles.full):
        width = max(int(runs.sizes.max(initial=0)), min(most, 2))
        lists += [table.view(1, 1, *table.shape) for table in padded_lists(runs, device, width=width)]
    return _Lists(*lists)


def _ranks(by_query: TileRuns, by_key: _Lists) -> tuple[Tensor, Tensor]:
    """Number, for each block of queries, the tiles of both kinds by ascending block of keys; parallel to the lists."""
    kinds, num_rows = (by_query.partial, by_query.full), by_key.partial_tiles.shape[2]
    row = np.concatenate([expand_counts(runs.counts)[0] for runs in kinds])
    start, stop = (np.concatenate(ends) for ends in ([r.starts for r in kinds], [r.stops for r in kinds]))
    order = np.lexsort((start, row))
    row, start, length = row[order], start[order], (stop - start)[order]
    tiles_of_row = kinds[0].sizes + kinds[1].sizes
    rank_of_first = np.cumsum(length) - length - (np.cumsum(tiles_of_row) - tiles_of_row)[row]
    # One ascending axis for the runs of all blocks of queries. The one before them all is that of the lists' padding.
    device = by_key.partial_tiles.device
    place = torch.from_numpy(np.append(-1, row * num_rows + start)).to(device)
    shift = upload(np.append(0, rank_of_first - start), device)
    block = torch.arange(num_rows, dtype=torch.int32, device=device).unsqueeze(1)

    def ranks(counts: Tensor, tiles: Tensor) -> Tensor:
        run = torch.searchsorted(place, tiles.long() * num_rows + block, right=True) - 1
        padding = torch.arange(tiles.shape[3], device=device) >= counts.unsqueeze(3)
        return (shift.take(run) + block).masked_fill_(padding, 0)

    return ranks(by_key.partial_counts, by_key.partial_tiles), ranks(by_key.full_counts, by_key.full_tiles)


def _line_tables(
    slices: SliceTable, num_q: int, num_k: int, tiling: Tiling, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``offsets``, with padding lines that have no intervals, and ``bounds``."""
    if tiling.lines == "queries":  # which the host had to find, to know what kind of mask it is
        intervals = upload_intervals(intervals_of_queries(slices, num_q), device)
    else:
        intervals = interval_table(band.transpose(slices.bands()), num_k, device)
    offsets = torch.cat([intervals.offsets, intervals.offsets.narrow(0, -1, 1).expand(LINE_PADDING)])
    return offsets, _pairs(intervals)


def _pairs(intervals: DeviceIntervals) -> Tensor:
    """Return where intervals start and stop as rows, at least two.

    A table of a single row would look like one without strides to the kernels' interface.
    """
    pairs = torch.stack([intervals.starts, intervals.stops], dim=1)
    return torch.nn.functional.pad(pairs, (0, 0, 0, max(2 - len(pairs), 0)))
