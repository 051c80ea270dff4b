# SPDX-License-Identifier: Apache-2.0
"""Walks the forward kernel's tables as the kernel does."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_kernels_hopper.plan import FULL, RowTables


class Box(NamedTuple):
    """A box of keys that a tile of queries meets.

    Attributes:
        key: its first.
        masked: whether the kernel applies the mask.
        kept: ``[tile_q, box_k]`` which pairs count by the box's run and pieces.
    """

    key: int
    masked: bool
    kept: NDArray[np.bool_]


def walk(tables: RowTables, tile: int, tile_q: int, box_k: int) -> Iterator[Box]:
    """The boxes of a row of ``tables.tiles``, a part of a tile of queries, in the kernel's order."""
    first_token = tile % len(tables.parts) * tile_q
    first_run, num_tiles, num_masked, last_run = tables.tiles[tile]
    runs = iter(tables.runs[first_run:].tolist())
    key = stop = 0
    for number in range(2 * num_tiles):
        if key >= stop:
            key, stop, first_piece, num_pieces = next(runs)
        kept = np.full((tile_q, box_k), num_pieces == FULL)
        columns = key + np.arange(box_k)
        for k0, k1, d0, d1, q0, q1, _, _ in tables.pieces[first_piece : first_piece + max(num_pieces, 0)].tolist():
            for row in range(tile_q):
                token = first_token + row
                if q0 <= token < q1:
                    kept[row] |= (columns >= max(k0, token + d0)) & (columns < min(k1, token + d1 + 1, stop))
        # The first tile of keys is always masked, and so is one that ends halfway: a run that is full keeps all.
        ends_halfway = last_run >= 0 and number == 2 * num_tiles - 2
        if ends_halfway:
            *_, first, count = tables.runs[last_run].tolist()
            assert (first_piece, num_pieces) == (first, count)
            assert num_pieces == FULL or key == tables.runs[last_run, 0]
        if last_run >= 0 and number == 2 * num_tiles - 1:
            assert not kept.any()
            return
        yield Box(key, ends_halfway or number < 2 * max(num_masked, 1), kept)
        key += box_k


def pair_counts(tables: RowTables, num_q: int, num_k: int, tile_q: int, box_k: int) -> NDArray[np.int64]:
    """How often the kernel counts each pair ``[num_q, num_k]``; fails where it would count one outside the tensors."""
    counts = np.zeros((len(tables.parts), tile_q, num_k + 2 * box_k), np.int64)
    for tile in tables.order.tolist():
        for box in walk(tables, tile, tile_q, box_k):
            assert box.masked or box.kept.all()
            counts[tile % len(tables.parts), :, box.key : box.key + box_k] += box.kept
    counts = counts.reshape(len(tables.parts) * tile_q, -1)
    assert not counts[:, num_k:].any()
    return counts[:num_q, :num_k]
