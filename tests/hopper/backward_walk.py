# SPDX-License-Identifier: Apache-2.0
"""Walks the backward kernel's tables as the kernel does."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_kernels_hopper.backward_plan import ColumnTables
from magi_kernels_hopper.plan import FULL


class Step(NamedTuple):
    """A tile of queries that a tile of keys meets.

    Attributes:
        tile: of queries.
        masked: whether the kernel applies the mask.
        kept: ``[tile_q, tile_k]`` which pairs count by the tile's run and pieces.
    """

    tile: int
    masked: bool
    kept: NDArray[np.bool_]


def walk(tables: ColumnTables, tile_k: int, num_k: int, size_q: int, size_k: int) -> Iterator[Step]:
    """The tiles of queries of a tile of keys, in the kernel's order."""
    first_run, num_runs, num_steps, _ = tables.tiles[tile_k].tolist()
    key = tile_k * size_k + np.arange(size_k)
    ragged = (tile_k + 1) * size_k > num_k
    runs = reversed(tables.runs[first_run : first_run + num_runs].tolist())
    steps = [(tile, *pieces) for first, end, *pieces in runs for tile in reversed(range(first, end))]
    assert len(steps) == num_steps
    for tile, first_piece, num_pieces in steps:
        query = (tile * size_q + np.arange(size_q))[:, None]
        kept = np.full((size_q, size_k), num_pieces == FULL) & (key < num_k)
        for q0, q1, d0, d1, k0, k1, _, _ in tables.pieces[first_piece : first_piece + max(num_pieces, 0)].tolist():
            seen = (query >= np.maximum(q0, key + d0)) & (query < np.minimum(q1, key + d1 + 1))
            kept |= seen & (key >= k0) & (key < k1)
        yield Step(tile, num_pieces != FULL or ragged, kept)


def pair_counts(tables: ColumnTables, num_q: int, num_k: int, size_q: int, size_k: int) -> NDArray[np.int64]:
    """How often the kernel counts each pair ``[num_q, num_k]``.

    Rows beyond ``num_q`` have probability 0 in the kernel, whatever the mask; keys beyond ``num_k`` must be masked.
    """
    tiles_q = -(-num_q // size_q)
    counts = np.zeros((tiles_q * size_q, len(tables.tiles) * size_k), np.int64)
    for tile_k in range(len(tables.tiles)):
        for step in walk(tables, tile_k, num_k, size_q, size_k):
            assert step.masked or step.kept.all()
            assert step.tile < tiles_q
            counts[step.tile * size_q :, tile_k * size_k :][:size_q, :size_k] += step.kept
    assert not counts[:, num_k:].any()
    return counts[:num_q, :num_k]
