# SPDX-License-Identifier: Apache-2.0
"""A mask as the tables that the backward kernel reads: which tiles of queries each tile of keys meets, in which order.

Tiles are cut from the first query and the first key. Tables hold runs of tiles of queries, so that they grow with the
runs, except for the ranks, which the deterministic kernel needs for each pair of tiles.
"""

from dataclasses import dataclass

import numpy as np

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import expand_counts
from magi_attention.kernels.tiles import cut_rows, tile_runs
from magi_kernels_hopper.plan import FULL, PARTIAL, WHOLE, Indices, Runs, cut_at_pieces, pieces_of_runs

FIRST = -(1 << 31)
"""Bit 31 of an int32."""


@dataclass(frozen=True, eq=False)
class ColumnTables:
    """What ``csrc/backward/params.cuh`` describes.

    Attributes:
        tiles: ``(num_tiles, 4)``: first run, number of runs, tiles of queries, first rank.
        runs: ``(n, 4)``: first tile of queries, end, first piece, number of pieces or ``FULL``. After ``mark_first``,
            the first piece is less by ``FIRST`` where the tile of keys is the first to meet these tiles of queries.
        pieces: ``(m, 8)``: q0, q1, d0, d1, k0, k1, 0, 0; key j sees i if ``d0 <= i - j <= d1``.
    """

    tiles: Indices
    runs: Indices
    pieces: Indices


def column_tables(bands: Bands, num_q: int, num_k: int, tile_q: int, tile_k: int) -> ColumnTables:
    """Build the tables of a mask.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor; the last tile ends here.
        tile_q: queries of a tile.
        tile_k: keys of a tile.
    """
    num_tiles = -(-num_k // tile_k)
    span = -(-num_q // tile_q) * tile_q  # queries, up to the end of the last tile
    by_key = band.transpose(bands)
    pieces = cut_rows(band.shrink(by_key)[0], tile_k)
    owner = pieces[:, band.Q0] // tile_k
    both = tile_runs(by_key, num_k, num_q, tile_k, tile_q)
    tile, start, stop = (
        np.concatenate(
            [np.repeat(np.arange(num_tiles), both.partial.counts), np.repeat(np.arange(num_tiles), both.full.counts)]
        ),
        np.concatenate([both.partial.starts, both.full.starts]) * tile_q,
        np.concatenate([both.partial.stops, both.full.stops]) * tile_q,
    )
    kind = np.repeat([PARTIAL, WHOLE], [len(both.partial.starts), len(both.full.starts)])
    order = np.lexsort((start, tile))
    runs = cut_at_pieces(Runs(tile[order], start[order], stop[order], kind[order]), pieces, owner, span, tile_q)
    first_piece, num_pieces, piece = pieces_of_runs(runs, pieces, owner, span)

    sizes = (runs.stop - runs.start) // tile_q
    num_runs = np.bincount(runs.tile, minlength=num_tiles)
    num_q_tiles = np.bincount(runs.tile, sizes, num_tiles).astype(np.int64)
    first_run, first_rank = np.cumsum(num_runs) - num_runs, np.cumsum(num_q_tiles) - num_q_tiles
    chosen = pieces[piece]
    table = np.zeros((len(chosen), 8), np.int64)
    table[:, :6] = chosen[:, [band.K0, band.K1, band.D0, band.D1, band.Q0, band.Q1]]
    return ColumnTables(
        np.column_stack([first_run, num_runs, num_q_tiles, first_rank]),
        np.column_stack(
            [runs.start // tile_q, runs.stop // tile_q, first_piece, np.where(runs.kind == WHOLE, FULL, num_pieces)]
        ),
        table,
    )


def mark_first(tables: ColumnTables, order: Indices) -> ColumnTables:
    """Cut runs so that a tile of keys is the first in ``order`` to meet all of a run's tiles of queries, or none."""
    start, stop = tables.runs[:, 0], tables.runs[:, 1]
    if not len(start):
        return tables
    owner = np.repeat(np.arange(len(tables.tiles)), tables.tiles[:, 1])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    num_q = int(stop.max())
    earliest = _least_of_runs(start, stop, place[owner], num_q)

    # Stretches of tiles of queries that the same tile of keys meets first.
    edges = np.flatnonzero(np.diff(earliest, prepend=-1, append=-1))
    met = earliest[edges[:-1]] < len(order)
    first, end = edges[:-1][met], edges[1:][met]
    tile = order[earliest[first]]
    stride = num_q + 1
    cuts = np.unique(np.concatenate([owner * stride + start, tile * stride + first, tile * stride + end]))
    run = np.searchsorted(owner * stride + start, cuts, side="right") - 1
    inside = (run >= 0) & (cuts < (owner * stride + stop)[run])  # not between the runs of a tile, or at its end
    cuts, run = cuts[inside], run[inside]
    follows = np.append(cuts[1:], np.iinfo(np.int64).max)
    runs = tables.runs[run]
    runs[:, 0] = cuts - owner[run] * stride
    runs[:, 1] = np.minimum(follows - owner[run] * stride, stop[run])
    runs[earliest[runs[:, 0]] == place[owner[run]], 2] += FIRST
    num_runs = np.bincount(owner[run], minlength=len(tables.tiles))
    tiles = tables.tiles.copy()
    tiles[:, 0], tiles[:, 1] = np.cumsum(num_runs) - num_runs, num_runs
    return ColumnTables(tiles, runs, tables.pieces)


def _least_of_runs(start: Indices, stop: Indices, values: Indices, num_places: int) -> Indices:
    """For each place the least value of the runs that it lies in; more than all values if there are none."""
    none = np.iinfo(np.int64).max
    level = np.frexp((stop - start).astype(np.float64))[1] - 1  # a run is two stretches of a power of two places
    least = np.full(num_places, none)
    for size in reversed(range(int(level.max()) + 1)):
        of_level = level == size
        stretches = np.full(num_places, none)
        np.minimum.at(stretches, start[of_level], values[of_level])
        np.minimum.at(stretches, stop[of_level] - (1 << size), values[of_level])
        # Those of the next longer stretches are two of these each.
        longer, half = least, 1 << size
        least = np.minimum(stretches, longer)
        least[half:] = np.minimum(least[half:], longer[:-half])
    return least


def ranks(tables: ColumnTables, order: Indices) -> Indices:
    """For each tile of keys and each tile of queries that it meets, how many earlier tiles of keys meet it.

    Earlier in ``order``, in which gradients of queries are added up so that they are the same bits in every run.
    """
    run, step = expand_counts(tables.runs[:, 1] - tables.runs[:, 0])
    tile_q = tables.runs[run, 0] + step
    tile_k = np.repeat(np.arange(len(tables.tiles)), tables.tiles[:, 2])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_query = np.lexsort((place[tile_k], tile_q))
    counts = np.bincount(tile_q)
    result = np.empty_like(tile_q)
    result[by_query] = expand_counts(counts)[1]
    return result


def adders(tables: ColumnTables, num_tiles_q: int) -> Indices:
    """How many tiles of keys meet each tile of queries."""
    change = np.bincount(tables.runs[:, 0], minlength=num_tiles_q + 1)
    change -= np.bincount(tables.runs[:, 1], minlength=num_tiles_q + 1)
    return np.cumsum(change)[:num_tiles_q]
