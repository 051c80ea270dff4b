# SPDX-License-Identifier: Apache-2.0
"""Exact tables of a mask for block-sparse kernels: which tiles are full, which partial, and each row's key intervals.

A tile is a block of ``block_q`` queries times a block of ``block_k`` keys, cut from the origin; those at the far ends
may be ragged. Everything is vectorized numpy over bands, and costs grow with the tiles' and rows' number, never with
their product. The tables of the keys' side come from the same code, applied to the transposed bands.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import expand_counts

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class IndexLists:
    """One ascending list of indices per row, in compressed form.

    Attributes:
        offsets: ``(num_rows + 1,)``; row i's list is ``indices[offsets[i]:offsets[i + 1]]``.
        indices: all lists, one after another.
    """

    offsets: Indices
    indices: Indices

    @classmethod
    def from_pairs(cls, rows: Indices, indices: Indices, num_rows: int) -> Self:
        """Collect pairs (row, index), in any order, none of them twice."""
        width = int(indices.max(initial=0)) + 1
        ordered = np.sort(rows * width + indices)  # much faster than sorting by two keys
        return cls(_offsets(np.bincount(rows, minlength=num_rows)), ordered % width)

    @property
    def counts(self) -> Indices:
        """The lists' lengths."""
        return np.diff(self.offsets)

    def transposed(self, num_columns: int) -> Self:
        """List the rows of each index instead of the indices of each row."""
        rows, _ = expand_counts(self.counts)
        return self.from_pairs(self.indices, rows, num_columns)

    def padded(self, width: int) -> Indices:
        """Return the lists as a matrix ``(num_rows, width)``, zero after each list's end."""
        matrix = np.zeros((len(self.counts), width), np.int64)
        matrix[expand_counts(self.counts)] = self.indices
        return matrix


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles that a mask touches: for each block of queries, blocks of keys.

    Attributes:
        full: tiles of which every pair that lies inside the tensors is kept, by one slice or by several together.
        partial: tiles of which some pairs are kept, but not all.
    """

    full: IndexLists
    partial: IndexLists


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """The keys that each query sees, as ascending intervals that neither overlap nor touch.

    Attributes:
        offsets: ``(num_rows + 1,)``; row i's intervals are those with numbers ``offsets[i]`` to ``offsets[i + 1]``.
        starts, stops: ``[start, stop)`` of each interval.
    """

    offsets: Indices
    starts: Indices
    stops: Indices

    @property
    def counts(self) -> Indices:
        """How many intervals each row has."""
        return np.diff(self.offsets)


def classify_tiles(bands: Bands, num_q: int, num_k: int, block_q: int, block_k: int) -> Tiles:
    """Sort the tiles that ``bands`` touch into full and partial ones. No pair may be covered twice.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them.
        num_q: rows of the query tensor; the last block of queries ends here.
        num_k: rows of the key tensor; the last block of keys ends here.
        block_q: queries of a tile.
        block_k: keys of a tile.
    """
    num_q_blocks, num_k_blocks = -(-num_q // block_q), -(-num_k // block_k)
    pieces = _cut_rows(band.shrink(bands)[0], block_q)
    q_block = pieces[:, band.Q0] // block_q
    inner_from, inner_to = _blocks_that_all_rows_see(pieces, num_q, num_k, block_q, block_k)
    owner, step = expand_counts(inner_to - inner_from)
    full_q, full_k = q_block[owner], inner_from[owner] + step

    # What is left and right of the inner blocks is counted tile by tile: slices may complete each other.
    first, last = pieces[:, band.K0] // block_k, -(-pieces[:, band.K1] // block_k)
    outer_from = np.concatenate([first, inner_to])
    outer_to = np.concatenate([inner_from, last])
    owner, step = expand_counts(outer_to - outer_from)
    k_block = outer_from[owner] + step
    owner %= max(len(pieces), 1)
    start = k_block * block_k
    areas = band.area(band.clip(pieces[owner], band.K0, start, start + block_k))
    tile, member = np.unique(q_block[owner] * num_k_blocks + k_block, return_inverse=True)
    kept = np.bincount(member, weights=areas, minlength=len(tile)).astype(np.int64)
    tile_q, tile_k = tile // max(num_k_blocks, 1), tile % max(num_k_blocks, 1)
    rows = np.minimum(num_q - tile_q * block_q, block_q)
    columns = np.minimum(num_k - tile_k * block_k, block_k)
    whole, some = kept == rows * columns, (kept > 0) & (kept < rows * columns)
    return Tiles(
        full=IndexLists.from_pairs(
            np.concatenate([full_q, tile_q[whole]]), np.concatenate([full_k, tile_k[whole]]), num_q_blocks
        ),
        partial=IndexLists.from_pairs(tile_q[some], tile_k[some], num_q_blocks),
    )


def row_intervals(bands: Bands, num_rows: int) -> RowIntervals:
    """List the key intervals of every query; of every key its query intervals, if given the transposed bands.

    Pairs that are covered twice count once.
    """
    bands, _ = band.shrink(bands)
    owner, step = expand_counts(bands[:, band.Q1] - bands[:, band.Q0])
    row = bands[owner, band.Q0] + step
    start = np.maximum(bands[owner, band.K0], row + bands[owner, band.D0])
    stop = np.minimum(bands[owner, band.K1], row + bands[owner, band.D1] + 1)
    order = np.lexsort((start, row))
    row, start, stop = row[order], start[order], stop[order]
    # One ascending axis for all rows, with a gap between the rows so that their intervals cannot touch.
    base = row * (int(stop.max(initial=0)) + 1)
    reached = np.maximum.accumulate(base + stop)
    opens = np.append(True, base[1:] + start[1:] > reached[:-1])[: len(row)]
    number = np.flatnonzero(opens)
    closes = np.append(number[1:], len(row))[: len(number)] - 1
    return RowIntervals(
        offsets=_offsets(np.bincount(row[number], minlength=num_rows)),
        starts=start[number],
        stops=(reached - base)[closes],
    )


def bands_from_intervals(intervals: RowIntervals, first: int, last: int) -> Bands:
    """Return bands that keep, of each row, the intervals with numbers ``first`` to ``last`` (exclusive) in the row.

    Intervals of the same number in neighboring rows form one band as long as each of their ends either stays or moves
    by one key per row.
    """
    pieces = []
    for number in range(first, last):
        row = np.flatnonzero(intervals.counts > number)
        start, stop = (ends[intervals.offsets[row] + number] for ends in (intervals.starts, intervals.stops))
        start_step, stop_step = np.diff(start), np.diff(stop)
        regular = (np.diff(row) == 1) & (start_step >> 1 == 0) & (stop_step >> 1 == 0)
        step = np.where(regular, start_step + 2 * stop_step, -1)
        # A row joins the one before it if it continues that row's own step, or if that row has none yet.
        joins = regular & np.append(True, (step[1:] == step[:-1]) | (step[:-1] == -1))[: len(step)]
        head = np.flatnonzero(np.append(True, ~joins)[: len(row)])
        tail = np.append(head[1:], len(row))[: len(head)] - 1
        step = np.append(step, -1)[head]
        follows_lower, follows_upper = (tail > head) & (step & 1 == 1), (tail > head) & (step & 2 == 2)
        lower = np.where(follows_lower, start[head] - row[head], -band.UNBOUNDED)
        upper = np.where(follows_upper, stop[head] - 1 - row[head], band.UNBOUNDED)
        pieces.append(np.column_stack([row[head], row[tail] + 1, start[head], stop[tail], lower, upper]))
    return np.concatenate(pieces)


def _cut_rows(bands: Bands, block_q: int) -> Bands:
    """Cut bands at multiples of ``block_q`` rows, and trim the pieces."""
    first, last = bands[:, band.Q0] // block_q, -(-bands[:, band.Q1] // block_q)
    owner, step = expand_counts(last - first)
    start = (first[owner] + step) * block_q
    return band.shrink(band.clip(bands[owner], band.Q0, start, start + block_q))[0]


def _blocks_that_all_rows_see(
    pieces: Bands, num_q: int, num_k: int, block_q: int, block_k: int
) -> tuple[Indices, Indices]:
    """For each piece of a block of queries, the range of key blocks that it fills alone.

    An empty range lies inside the piece's own range of blocks.
    """
    q0, q1, k0, k1, d0, d1 = pieces.T
    first, last = k0 // block_k, -(-k1 // block_k)
    all_rows = (q0 % block_q == 0) & (q1 == np.minimum(q0 + block_q, num_q))
    seen_from, seen_to = np.maximum(k0, q1 - 1 + d0), np.minimum(k1, q0 + d1 + 1)
    # The last block of keys is filled where the keys end.
    inner_from = -(-seen_from // block_k)
    inner_to = np.where(seen_to == num_k, last, seen_to // block_k)
    some = all_rows & (inner_to > inner_from)
    return np.where(some, inner_from, first), np.where(some, inner_to, first)


def _offsets(counts: Indices) -> Indices:
    return np.concatenate([[0], np.cumsum(counts)])
