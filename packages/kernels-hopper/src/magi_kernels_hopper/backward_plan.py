# SPDX-License-Identifier: Apache-2.0
"""A mask as the tables that the backward kernel reads: which tiles of queries each tile of keys meets, in which order.

Tiles of queries are cut from the first one on, tiles of keys also where the mask changes. Tables hold runs of tiles of
queries, so that they grow with the runs, except for the ranks, which the deterministic kernel needs for each pair of
tiles.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import distinct, expand_counts
from magi_attention.kernels.tiles import cut_rows, join_side_by_side, tile_runs
from magi_kernels_hopper.plan import FULL, PARTIAL, WHOLE, Indices, Runs, cut_at_pieces, pieces_of_runs

LEAST_KEYS = 16
"""The fewest keys of a tile that ends where the mask changes."""

MOST_RESTS = 2**15 - 1
"""The most steps that a consumer is told to leave out; more are computed in vain."""


@dataclass(frozen=True, eq=False)
class ColumnTables:
    """What ``csrc/backward/params.cuh`` describes.

    Attributes:
        tiles: ``(num_tiles, 4)``: first run, number of runs, tiles of queries, first rank.
        runs: ``(n, 4)``: first tile of queries, end, first piece, number of pieces or ``FULL``.
        pieces: ``(m, 8)``: q0, q1, d0, d1, k0, k1, 0, 0; key j sees i if ``d0 <= i - j <= d1``. Keys are counted as if
            all tiles were full.
        keys: ``(num_tiles, 2)``: the first one of each tile, and the end; :func:`rests` are the columns after these.
    """

    tiles: Indices
    runs: Indices
    pieces: Indices
    keys: Indices


def shortest_tables(bands: Bands, num_q: int, num_k: int, tile_q: int, tile_k: int) -> ColumnTables:
    """Build the tables of a mask: with tiles of keys that begin where the mask changes, if that takes fewer steps.

    The arguments are those of :func:`column_tables`.
    """
    starts = starts_at_changes(bands, num_k, tile_k)
    tables = column_tables(bands, num_q, num_k, tile_q, tile_k)
    if len(starts) == len(tables.keys) + 1 and (starts[:-1] == tables.keys[:, 0]).all():
        return tables
    other = column_tables(bands, num_q, num_k, tile_q, tile_k, starts)
    return min(tables, other, key=lambda each: each.tiles[:, 2].sum())


def starts_at_changes(bands: Bands, num_k: int, tile_k: int) -> Indices:
    """Where tiles of keys start that end at the last place in reach where a band begins or ends; and ``num_k``."""
    changes = [0, *distinct(band.shrink(bands)[0][:, [band.K0, band.K1]]).tolist()]
    starts = [0]
    while (start := starts[-1]) < num_k:
        end = min(start + tile_k, num_k)
        last = changes[bisect_right(changes, end) - 1]
        starts.append(last if last >= start + LEAST_KEYS else end)
    return np.array(starts, np.int64)


def column_tables(
    bands: Bands, num_q: int, num_k: int, tile_q: int, tile_k: int, starts: Indices | None = None
) -> ColumnTables:
    """Build the tables of a mask.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        tile_q: queries of a tile.
        tile_k: keys of a tile, at most.
        starts: of each tile of keys the first one, and then ``num_k``; if it is None, all tiles but the last are full.
    """
    if starts is None:
        starts = np.append(np.arange(0, num_k, tile_k), num_k)
    num_tiles = len(starts) - 1
    span = -(-num_q // tile_q) * tile_q  # queries, up to the end of the last tile
    by_key = _as_if_full(join_side_by_side(band.transpose(bands)), starts, tile_k)
    pieces = cut_rows(band.shrink(by_key)[0], tile_k)
    owner = pieces[:, band.Q0] // tile_k
    both = tile_runs(by_key, num_tiles * tile_k, num_q, tile_k, tile_q)
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
        np.column_stack([starts[:-1], starts[1:]]),
    )


def _as_if_full(by_key: Bands, starts: Indices, tile_k: int) -> Bands:
    """Cut bands, whose rows are keys, where tiles start, and count keys as if all tiles had ``tile_k``."""
    first = np.searchsorted(starts, by_key[:, band.Q0], side="right") - 1
    last = np.searchsorted(starts, by_key[:, band.Q1], side="left")
    owner, step = expand_counts(np.maximum(last - first, 0))
    tile = first[owner] + step
    pieces = band.clip(by_key[owner], band.Q0, starts[tile], starts[tile + 1])
    return band.shift(pieces, tile * tile_k - starts[tile], 0)


def rests(tables: ColumnTables, bands: Bands, num_q: int, num_k: int, tile_q: int, tile_k: int) -> Indices:
    """Of either half of a full tile's keys, the steps at both ends in which no pair counts.

    It takes as long as to build the tables, of which the arguments are: so it is not asked of those that are not used.

    Returns:
        ``(num_tiles, 2)``: how many at the begin, times 65536, and at the end. Steps go from the last tile of queries
        down.
    """
    num_tiles = len(tables.tiles)
    starts = np.append(tables.keys[:, 0], num_k)
    by_key = _as_if_full(join_side_by_side(band.transpose(bands)), starts, tile_k)
    halves = tile_runs(by_key, num_tiles * tile_k, num_q, tile_k // 2, tile_q)
    first, end = np.full(2 * num_tiles, num_q), np.zeros(2 * num_tiles, np.int64)  # tiles of queries
    for each in (halves.partial, halves.full):
        half = np.repeat(np.arange(2 * num_tiles), each.counts)
        np.minimum.at(first, half, each.starts)
        np.maximum.at(end, half, each.stops)
    first[end == 0] = 0
    start, stop, *_ = tables.runs.T
    tile = np.repeat(np.arange(num_tiles), tables.tiles[:, 1])  # of each run
    numbers = []
    for side in (0, 1):
        after = stop - np.maximum(start, end[side::2][tile])
        before = np.minimum(stop, first[side::2][tile]) - start
        at_begin, at_end = (
            np.bincount(tile, np.maximum(each, 0), num_tiles).astype(np.int64).clip(max=MOST_RESTS)
            for each in (after, before)
        )
        numbers.append(at_begin << 16 | at_end)
    return np.column_stack(numbers)


def ranks(tables: ColumnTables, order: Indices) -> NDArray[np.int32]:
    """For each tile of keys and each tile of queries that it meets, how many earlier tiles of keys meet it.

    Earlier in ``order``, in which gradients of queries are added up so that they are the same bits in every run.
    """
    result = np.empty(tables.tiles[:, 2].sum(), np.int32)  # there may be hundreds of millions
    met = np.zeros(tables.runs[:, 1].max(initial=0), np.int32)  # each tile of queries, so far
    starts, stops = tables.runs[:, 0].tolist(), tables.runs[:, 1].tolist()
    for first_run, num_runs, _, place in tables.tiles[order].tolist():
        for run in range(first_run, first_run + num_runs):
            of_run = met[starts[run] : stops[run]]
            result[place : place + len(of_run)] = of_run
            of_run += 1
            place += len(of_run)
    return result


def adders(tables: ColumnTables, num_tiles_q: int) -> Indices:
    """How many tiles of keys meet each tile of queries."""
    change = np.bincount(tables.runs[:, 0], minlength=num_tiles_q + 1)
    change -= np.bincount(tables.runs[:, 1], minlength=num_tiles_q + 1)
    return np.cumsum(change)[:num_tiles_q]
