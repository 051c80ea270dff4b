# SPDX-License-Identifier: Apache-2.0
"""Exact tables of a mask for block-sparse kernels: which tiles are full, which partial, and each row's key intervals.

A tile is a block of ``block_q`` queries times a block of ``block_k`` keys, cut from the origin; those at the far ends
may be ragged. Everything is vectorized numpy over bands, and costs grow with the blocks and rows that slices span,
never with the number of tiles: these come as runs (:func:`tile_runs`), which a device expands
(:mod:`magi_attention.kernels.device_tiles`). The tables of the keys' side come from the same code, applied to the
transposed bands.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import count_slab_pieces, cut_into_slabs, expand_counts

Indices = NDArray[np.int64]

BANDS_OF_A_ROW = 8
"""Where rows are in more bands than that on average, bands that lie side by side are joined."""

ROWS_OF_A_PIECE = 128
"""The fewest rows, on average, of the pieces that are joined: scattered blocks of 64 are better left as they are."""

ROWS_OF_A_PIECE_BY_ROW = 16
"""The same where what follows looks at each row of each band by itself, not at 16 or more of them at a time."""


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """Ascending intervals per row that neither overlap nor touch: of the keys that a query sees, or of blocks.

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

    @property
    def sizes(self) -> Indices:
        """How many indices the intervals of each row hold together."""
        return np.diff(_offsets(self.stops - self.starts)[self.offsets])


@dataclass(frozen=True, eq=False)
class TileRuns:
    """The tiles that a mask touches: for each block of queries, runs of blocks of keys.

    Attributes:
        full: tiles of which every pair that lies inside the tensors is kept, by one slice or by several together.
        partial: tiles of which some pairs are kept, but not all.
    """

    full: RowIntervals
    partial: RowIntervals


def tile_runs(bands: Bands, num_q: int, num_k: int, block_q: int, block_k: int) -> TileRuns:
    """Sort the tiles that ``bands`` touch into runs of full and of partial ones. No pair may be covered twice.

    Along a block of queries, every band keeps the same number of pairs of each block of keys that all its rows see
    entirely, and another number of the few beside these. Summed up from left to right, that tells the pairs kept of
    every tile, by which also tiles that several slices complete together are found to be full.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them.
        num_q: rows of the query tensor; the last block of queries ends here.
        num_k: rows of the key tensor; the last block of keys ends here.
        block_q: queries of a tile.
        block_k: keys of a tile.
    """
    num_q_blocks, num_k_blocks = -(-num_q // block_q), -(-num_k // block_k)
    pieces = cut_rows(join_side_by_side(bands), block_q)
    inner_from, inner_to = _blocks_that_all_rows_see(pieces, block_k)
    row = pieces[:, band.Q0] // block_q

    # The blocks left and right of the inner ones: at most a few, since a piece has no more rows than a tile.
    first, last = pieces[:, band.K0] // block_k, -(-pieces[:, band.K1] // block_k)
    outer_from, outer_to = np.concatenate([first, inner_to]), np.concatenate([inner_from, last])
    owner, step = expand_counts(outer_to - outer_from)
    outer = outer_from[owner] + step
    owner %= max(len(pieces), 1)
    outer_area = band.area(band.clip(pieces[owner], band.K0, outer * block_k, (outer + 1) * block_k))

    # One ascending axis for the blocks of all rows, with a place behind each row's last block.
    stride = num_k_blocks + 1
    some = inner_to > inner_from
    inner_area = (pieces[:, band.Q1] - pieces[:, band.Q0])[some] * block_k
    begins = np.concatenate([row[some] * stride + inner_from[some], row[owner] * stride + outer])
    ends = np.concatenate([row[some] * stride + inner_to[some], row[owner] * stride + outer + 1])
    areas = np.concatenate([inner_area, outer_area])
    place, kept = running_sums(np.concatenate([begins, ends]), np.concatenate([areas, -areas]))
    kept, start, stop = kept[:-1], place[:-1], place[1:]

    # A ragged last block of keys is never an inner one, and so a run of its own.
    run_row, block = np.divmod(start, stride)
    rows = np.minimum(num_q - run_row * block_q, block_q)
    columns = np.minimum(num_k - block * block_k, block_k)
    is_full = kept >= rows * columns
    full, partial = (
        _joined(start[chosen], stop[chosen], stride, num_q_blocks)
        for chosen in (is_full & (kept > 0), ~is_full & (kept > 0))
    )
    return TileRuns(full, partial)


def running_sums(places: Indices, amounts: Indices) -> tuple[Indices, Indices]:
    """Sum up amounts that come and go at places: the different places, ascending, and what holds from each one on.

    A stable sort merges stretches that ascend already, of which places have few: it takes a thirtieth of the time.

    Args:
        places: ``(n,)``.
        amounts: ``(..., n)``, what comes at each; negative where it goes.
    """
    order = places.argsort(kind="stable")
    ordered = places[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    return ordered[last], amounts[..., order].cumsum(-1)[..., last]


def join_side_by_side(bands: Bands, *, by_row: bool = False) -> Bands:
    """Trim bands and, where many hold the same rows, cut them where any of them begins or ends and join what touches.

    Of a staircase of boxes, such as a block-causal mask of keys, every row is in up to all of them, though it has one
    interval. What follows takes time and memory for the rows of each band: for each of them, if ``by_row``.
    """
    least = ROWS_OF_A_PIECE_BY_ROW if by_row else ROWS_OF_A_PIECE
    bands, _ = band.shrink(bands)
    rows = int((bands[:, band.Q1] - bands[:, band.Q0]).sum())
    height = int(np.ptp(bands[:, : band.K0])) if len(bands) else 0
    if rows <= BANDS_OF_A_ROW * height or count_slab_pieces(bands) * least > rows:
        return bands
    pieces, _, slab = cut_into_slabs(bands)
    before, after = pieces[:-1], pieces[1:]
    alike = (slab[1:] == slab[:-1]) & (before[:, : band.K0] == after[:, : band.K0]).all(axis=1)
    straight = ~band.right_moves(before) & ~band.left_moves(after) & (before[:, band.K1] == after[:, band.K0])
    # Along a diagonal that neither of them leaves in any row.
    diagonal = before[:, band.D1] + 1
    slanting = (
        (after[:, band.D0] == diagonal)
        & (before[:, band.K1] == before[:, band.Q1] - 1 + diagonal)
        & (after[:, band.K0] == after[:, band.Q0] + diagonal)
    )
    head = np.flatnonzero(np.append(True, ~(alike & (straight | slanting))))
    joined = pieces[head]
    tail = np.append(head[1:], len(pieces)) - 1
    joined[:, [band.K1, band.D1]] = pieces[tail][:, [band.K1, band.D1]]
    return joined


def row_intervals(bands: Bands, num_rows: int) -> RowIntervals:
    """List the key intervals of every query; of every key its query intervals, if given the transposed bands.

    Pairs that are covered twice count once.
    """
    bands = join_side_by_side(bands, by_row=True)
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


def cut_rows(bands: Bands, block_q: int) -> Bands:
    """Cut bands at multiples of ``block_q`` rows, and trim the pieces."""
    first, last = bands[:, band.Q0] // block_q, -(-bands[:, band.Q1] // block_q)
    owner, step = expand_counts(last - first)
    start = (first[owner] + step) * block_q
    return band.shrink(band.clip(bands[owner], band.Q0, start, start + block_q))[0]


def _blocks_that_all_rows_see(pieces: Bands, block_k: int) -> tuple[Indices, Indices]:
    """For each piece of a block of queries, the whole blocks of keys that each of the piece's rows sees entirely.

    An empty range lies inside the piece's own range of blocks.
    """
    q0, q1, k0, k1, d0, d1 = pieces.T
    seen_from, seen_to = np.maximum(k0, q1 - 1 + d0), np.minimum(k1, q0 + d1 + 1)
    inner_from, inner_to = -(-seen_from // block_k), seen_to // block_k
    some = inner_to > inner_from
    first = k0 // block_k
    return np.where(some, inner_from, first), np.where(some, inner_to, first)


def _joined(start: Indices, stop: Indices, stride: int, num_rows: int) -> RowIntervals:
    """Join ascending intervals that touch, and tell them apart by rows of ``stride`` places."""
    opens = np.append(True, start[1:] > stop[:-1])[: len(start)]
    head = np.flatnonzero(opens)
    tail = np.append(head[1:], len(start))[: len(head)] - 1
    row, first = np.divmod(start[head], stride)
    return RowIntervals(_offsets(np.bincount(row, minlength=num_rows)), first, stop[tail] - row * stride)


def _offsets(counts: Indices) -> Indices:
    return np.concatenate([[0], np.cumsum(counts)])
