# SPDX-License-Identifier: Apache-2.0
"""A mask as the tables that the forward kernel reads: which keys each tile of queries meets, in which order.

Keys are not cut at fixed places. The keys that any query of a tile sees form spans; each span is cut, from its own
start, into boxes of as many keys as the copy engine loads at once. A box of which every query of the tile sees every
key needs no mask; the others have the pieces of the mask that they meet. Two boxes make a tile of keys. Where tiles of
queries are few, each may be cut into parts of fewer boxes, whose results are put together (``split.py``). Everything is
vectorized numpy, and costs grow with the tiles of queries that slices span.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import distinct, expand_counts
from magi_attention.kernels.tiles import cut_rows, join_side_by_side, running_sums

Indices = NDArray[np.int64]

FULL = -1
"""In place of a run's number of pieces: every pair of its boxes counts."""

PARTIAL, WHOLE, LAST, PAD = range(4)
"""Kinds of runs, in the order in which a tile of queries meets them."""


@dataclass(frozen=True, eq=False)
class RowTables:
    """What ``csrc/forward/params.cuh`` describes.

    Attributes:
        tiles: ``(num_parts * num_tiles, 4)``, the first parts of all tiles of queries, then the second ones:
            first run, tiles of keys, how many of them are masked, and the run of the last box where it has its tile
            alone, else -1.
        runs: ``(n, 4)``: first key, end of keys, first piece, number of pieces or ``FULL``.
        pieces: ``(m, 8)``: k0, k1, d0, d1, q0, q1, 0, 0.
        order: the rows of ``tiles`` that are parts, those with the most work first.
        parts: ``(num_tiles,)``, of each tile of queries: 1 where it is not cut.
    """

    tiles: Indices
    runs: Indices
    pieces: Indices
    order: Indices
    parts: Indices

    @property
    def boxes(self) -> Indices:
        """How many boxes of keys each row of ``tiles`` meets."""
        return 2 * self.tiles[:, 1] - (self.tiles[:, 3] >= 0)


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of boxes, ascending in each tile.

    Attributes:
        tile: of queries.
        start, stop: keys.
        kind: ``PARTIAL`` or ``WHOLE``.
    """

    tile: Indices
    start: Indices
    stop: Indices
    kind: Indices


def row_tables(
    bands: Bands, num_q: int, num_k: int, tile_q: int, box_k: int, most_boxes: int | None = None
) -> RowTables:
    """Build the tables of a mask.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        num_q: rows of the query tensor; the last tile ends here.
        num_k: rows of the key tensor.
        tile_q: queries of a tile.
        box_k: keys of a box.
        most_boxes: of a part of a tile of queries, or one more; without it tiles are not cut.
    """
    num_tiles = -(-num_q // tile_q)
    pieces = cut_rows(join_side_by_side(bands), tile_q)
    owner = pieces[:, band.Q0] // tile_q
    runs = cut_at_pieces(_runs_of_boxes(pieces, owner, num_q, num_k, tile_q, box_k), pieces, owner, num_k, box_k)
    first_piece, num_pieces, piece = pieces_of_runs(runs, pieces, owner, num_k)

    boxes = -(-(runs.stop - runs.start) // box_k)
    num_boxes = np.bincount(runs.tile, boxes, num_tiles).astype(np.int64)
    parts = np.ones(num_tiles, np.int64)
    if most_boxes is not None:
        runs, source, parts = _cut_into_parts(runs, boxes, num_boxes, most_boxes, box_k)
        first_piece, num_pieces = first_piece[source], num_pieces[source]
    there = np.flatnonzero(np.arange(parts.max(initial=1))[:, None] < parts)
    num_tiles *= int(parts.max(initial=1))
    boxes = -(-(runs.stop - runs.start) // box_k)
    num_boxes = np.bincount(runs.tile, boxes, num_tiles).astype(np.int64)
    num_partial = np.bincount(runs.tile, boxes * (runs.kind == PARTIAL), num_tiles).astype(np.int64)
    halfway = (num_boxes % 2 == 1) & (num_boxes > 1)
    rows = np.column_stack([runs.start, runs.stop, first_piece, np.where(runs.kind == WHOLE, FULL, num_pieces)])
    nobody = np.array([num_k, num_k + box_k, 0, 0])
    rows, first_run = _arrange(runs, rows, np.stack([num_boxes, num_partial]), box_k, nobody)
    last_run = np.where(halfway, first_run[1:] - 2, -1)
    tiles = np.column_stack([first_run[:-1], (num_boxes + 1) // 2, (num_partial + ~halfway) // 2, last_run])
    work = 8 * num_boxes + num_partial  # a mask costs about an eighth
    chosen = pieces[piece]
    table = np.zeros((len(chosen), 8), np.int64)
    table[:, :6] = chosen[:, [band.K0, band.K1, band.D0, band.D1, band.Q0, band.Q1]]
    return RowTables(tiles, rows, table, there[np.argsort(-work[there], kind="stable")], parts)


def _arrange(runs: Runs, rows: Indices, counts: Indices, box_k: int, nobody: Indices) -> tuple[Indices, Indices]:
    """The rows of runs in the order in which tiles meet them, and for each tile its first, and the end.

    Where boxes are odd in number, ``nobody``, a box that nobody sees, comes beside the last. If partial ones are too,
    the last of them is this last one, unless it is the only box: what is half is masked, and whole boxes stay in pairs.

    Args:
        runs: what they are of.
        rows: as in ``RowTables.runs``.
        counts: ``(2, num_tiles)`` boxes, and partial ones.
        box_k: keys of a box.
        nobody: ``(4,)``.
    """
    odd, odd_partial = counts % 2 == 1
    partial = np.flatnonzero(runs.kind == PARTIAL)
    of_tile = np.full(counts.shape[1], -1)
    of_tile[runs.tile[partial]] = partial  # the last one stays
    split = of_tile[odd & odd_partial & (counts[0] > 1)]
    last = rows[split]
    last[:, 0] += (-(-(last[:, 1] - last[:, 0]) // box_k) - 1) * box_k
    rows[split, 1] = last[:, 0]
    beside = np.flatnonzero(odd)
    rows = np.concatenate([rows, last, np.tile(nobody, (len(beside), 1))])
    tile = np.concatenate([runs.tile, runs.tile[split], beside])
    kind = np.concatenate([runs.kind, np.full(len(last), LAST), np.full(len(beside), PAD)])
    order = np.lexsort((kind, tile))  # stable: keys ascend
    order = order[(rows[:, 1] > rows[:, 0])[order]]
    return rows[order], np.searchsorted(tile[order], np.arange(counts.shape[1] + 1))


def _runs_of_boxes(pieces: Bands, owner: Indices, num_q: int, num_k: int, tile_q: int, box_k: int) -> Runs:
    """Cut each tile's spans into boxes: maximal runs of such that are full, and of others."""
    base = owner * (num_k + 1)  # one ascending axis for the keys of all tiles, with a gap between them
    q0, q1, k0, k1, d0, d1 = pieces.T
    seen_from, seen_to = np.maximum(k0, q1 - 1 + d0), np.minimum(k1, q0 + d1 + 1)
    seen_to = np.maximum(seen_to, seen_from)  # by all of the piece's rows
    ends = np.concatenate([base + k0, base + k1, base + seen_from, base + seen_to])
    one, height = np.ones_like(q0), q1 - q0
    nothing = np.zeros_like(q0)
    changes = np.block([[one, -one, nothing, nothing], [nothing, nothing, height, -height]])
    place, (touching, rows_seeing) = running_sums(ends, changes)
    tile = place // (num_k + 1)
    tile_rows = np.minimum(num_q - tile * tile_q, tile_q)
    touched, full = touching > 0, rows_seeing >= tile_rows

    # Maximal spans, and the maximal stretches in them that all rows see.
    span_start, span_stop = _stretches(touched, place)
    full_start, full_stop = _stretches(touched & full, place)
    span = np.searchsorted(span_start, full_start, side="right") - 1
    origin = span_start[span]
    first = -(-(full_start - origin) // box_k)
    last = (full_stop - origin) // box_k
    some = last > first
    span, start = span[some], (origin + first * box_k)[some]
    stop = (origin + last * box_k)[some]

    # What lies between is partial: before each full run, and after a span's last.
    before = np.concatenate([span_start, stop])
    before_span = np.concatenate([np.arange(len(span_start)), span])
    order = np.lexsort((before, before_span))
    after = np.concatenate([start, span_stop])
    after_order = np.lexsort((after, np.concatenate([span, np.arange(len(span_start))])))
    left, right = before[order], after[after_order]
    there = right > left
    all_start, all_stop = np.concatenate([left[there], start]), np.concatenate([right[there], stop])
    kind = np.repeat([PARTIAL, WHOLE], [there.sum(), len(start)])
    order = np.argsort(all_start, kind="stable")
    run_tile, run_start = np.divmod(all_start[order], num_k + 1)
    return Runs(run_tile, run_start, run_start + (all_stop - all_start)[order], kind[order])


def _cut_into_parts(
    runs: Runs, boxes: Indices, num_boxes: Indices, most_boxes: int, box_k: int
) -> tuple[Runs, Indices, Indices]:
    """Cut what each tile meets into parts of about as many boxes each.

    Args:
        runs: of all tiles, ascending.
        boxes: of each run.
        num_boxes: of each tile.
        most_boxes: of a part.
        box_k: keys of a box.

    Returns:
        the runs, of which the tile is that of the part, as in ``RowTables.tiles``; of which run each is; and how many
        parts each tile has.
    """
    size = -(-num_boxes // np.maximum(-(-num_boxes // most_boxes), 1))
    size = np.maximum(size + size % 2, 2)  # boxes stay in pairs
    parts = np.maximum(-(-num_boxes // size), 1)
    before = np.cumsum(boxes) - boxes
    before -= (np.cumsum(num_boxes) - num_boxes)[runs.tile]
    size = size[runs.tile]
    source, step = expand_counts((before + boxes - 1) // size - before // size + 1)
    part = (before // size)[source] + step
    origin = (runs.start - before * box_k)[source]
    start = np.maximum(origin + part * size[source] * box_k, runs.start[source])
    stop = np.minimum(origin + (part + 1) * size[source] * box_k, runs.stop[source])
    return Runs(part * len(num_boxes) + runs.tile[source], start, stop, runs.kind[source]), source, parts


def cut_at_pieces(runs: Runs, pieces: Bands, owner: Indices, num_k: int, box_k: int) -> Runs:
    """Cut partial runs into boxes between which the pieces that they meet change."""
    stride = num_k + 1
    start = runs.tile * stride + runs.start
    stop = start + (runs.stop - runs.start)
    ends = np.concatenate([owner * stride + pieces[:, band.K0], owner * stride + pieces[:, band.K1]])
    run = np.searchsorted(start, ends, side="right") - 1
    offset = ends - start[run]
    # The box in which a piece begins is the first that meets it, that in which it ends the last.
    upward = np.repeat([False, True], len(pieces))
    cut = start[run] + np.where(upward, -(-offset // box_k), offset // box_k) * box_k
    inside = (runs.kind[run] == PARTIAL) & (cut > start[run]) & (cut < stop[run])
    cuts = distinct(cut[inside])
    run = np.searchsorted(start, cuts, side="right") - 1
    all_start = np.sort(np.concatenate([start, cuts]))
    source = np.searchsorted(start, all_start, side="right") - 1
    follows = np.append(all_start[1:], np.iinfo(np.int64).max)[: len(all_start)]
    all_stop = np.minimum(follows, stop[source])
    tile, first = np.divmod(all_start, stride)
    return Runs(tile, first, first + (all_stop - all_start), runs.kind[source])


def pieces_of_runs(runs: Runs, pieces: Bands, owner: Indices, num_k: int) -> tuple[Indices, Indices, Indices]:
    """For each run its first piece and their number, and all these pieces one after another; full runs have none."""
    stride = num_k + 1
    partial = np.flatnonzero(runs.kind == PARTIAL)
    start = (runs.tile * stride + runs.start)[partial]
    stop = start + (runs.stop - runs.start)[partial]
    first = np.searchsorted(stop, owner * stride + pieces[:, band.K0], side="right")
    last = np.searchsorted(start, owner * stride + pieces[:, band.K1], side="left")
    piece, step = expand_counts(np.maximum(last - first, 0))
    run = partial[first[piece] + step]
    order = np.argsort(run, kind="stable")
    counts = np.bincount(run, minlength=len(runs.tile))
    return np.cumsum(counts) - counts, counts, piece[order]


def _stretches(holds: NDArray[np.bool_], place: Indices) -> tuple[Indices, Indices]:
    """Starts and stops of the maximal stretches in which something holds."""
    edges = np.diff(np.concatenate([[False], holds, [False]]).astype(np.int8))
    # What holds from the last place on would have no end: nothing does.
    return place[np.flatnonzero(edges == 1)], place[np.flatnonzero(edges == -1)]
