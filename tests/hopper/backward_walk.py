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


def walk(tables: ColumnTables, tile_k: int, size_q: int, size_k: int) -> Iterator[Step]:
    """The tiles of queries of a tile of keys, in the kernel's order."""
    first_run, num_runs, num_steps, _ = tables.tiles[tile_k].tolist()
    key = tile_k * size_k + np.arange(size_k)
    runs = reversed(tables.runs[first_run : first_run + num_runs].tolist())
    steps = [(tile, *pieces) for first, end, *pieces in runs for tile in reversed(range(first, end))]
    assert len(steps) == num_steps
    for tile, first_piece, num_pieces in steps:
        query = (tile * size_q + np.arange(size_q))[:, None]
        kept = np.full((size_q, size_k), num_pieces == FULL)
        for q0, q1, d0, d1, k0, k1, _, _ in tables.pieces[first_piece : first_piece + max(num_pieces, 0)].tolist():
            seen = (query >= np.maximum(q0, key + d0)) & (query < np.minimum(q1, key + d1 + 1))
            kept |= seen & (key >= k0) & (key < k1)
        yield Step(tile, num_pieces != FULL, kept)


def pair_counts(
    tables: ColumnTables, rests: NDArray[np.int64], num_q: int, num_k: int, size_q: int, size_k: int
) -> NDArray[np.int64]:
    """How often the kernel counts each pair ``[num_q, num_k]``.

    Rows beyond ``num_q`` have probability 0 in the kernel, whatever the mask; keys beyond a tile's own must be masked.
    """
    tiles_q = -(-num_q // size_q)
    counts = np.zeros((tiles_q * size_q, num_k), np.int64)
    reached = 0
    for tile_k, (start, end) in enumerate(tables.keys.tolist()):
        assert start == reached
        reached = end
        assert 0 < end - start <= size_k
        steps = list(walk(tables, tile_k, size_q, size_k))
        for half, rest in enumerate(rests[tile_k].tolist()):
            for left_out in steps[: rest >> 16] + steps[len(steps) - (rest & 0xFFFF) :]:
                assert not np.split(left_out.kept, 2, axis=1)[half].any()
        for step in steps:
            assert step.masked or step.kept.all()
            assert step.tile < tiles_q
            assert not step.kept[:, end - start :].any()
            counts[step.tile * size_q :, start:end][:size_q] += step.kept[:, : end - start]
    assert reached == num_k
    return counts[:num_q]
