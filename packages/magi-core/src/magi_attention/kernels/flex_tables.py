# SPDX-License-Identifier: Apache-2.0
"""The tables that FlexAttention reads: block lists in both directions and each query's key intervals."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.tiles import (
    IndexLists,
    RowIntervals,
    bands_from_intervals,
    classify_tiles,
    row_intervals,
)

BLOCK = 128
"""Queries and keys of a tile."""

INTERVALS_PER_LAYER = (1, 2, 4, 8)
"""How many intervals per row a kernel may unroll; each number is compiled once."""


class LayerTables(NamedTuple):
    """A part of a mask in which no row has more than eight key intervals, on a device, as int32.

    Shapes: M blocks of queries, N blocks of keys, W the longest list of a direction, R intervals per row.

    Attributes:
        kv_num_blocks, kv_indices: ``[1, 1, M]`` and ``[1, 1, M, W]``, the partial tiles of each block of queries.
        full_kv_num_blocks, full_kv_indices: the same for full tiles.
        q_num_blocks, q_indices: ``[1, 1, N]`` and ``[1, 1, N, W]``, the partial tiles of each block of keys.
        full_q_num_blocks, full_q_indices: the same for full tiles.
        bounds: ``[2 * R, M * BLOCK]``: row 2i holds where the i-th interval of each query starts, row 2i + 1 where it
            stops.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    bounds: Tensor


def num_blocks(num_tokens: int) -> int:
    """How many blocks a tensor is padded to: at least two, since compilers treat size one as a case of its own."""
    return max(-(-num_tokens // BLOCK), 2)


def layers_of(slices: SliceTable, num_q: int, num_k: int, device: torch.device) -> list[LayerTables]:
    """Return the layers whose union is the mask, none for a mask without pairs. Built once and kept with the table."""

    def build() -> list[LayerTables]:
        intervals = row_intervals(slices.bands(), num_q)
        most = int(intervals.counts.max(initial=0))
        if most <= INTERVALS_PER_LAYER[-1]:
            parts = [(slices.bands(), 0, most)] if most else []
        else:
            cuts = [*range(0, most, INTERVALS_PER_LAYER[-1]), most]
            parts = [(bands_from_intervals(intervals, first, last), first, last) for first, last in pairwise(cuts)]
        return [_layer(bands, intervals, first, last, num_q, num_k, device) for bands, first, last in parts]

    return slices.derived(("flex layers", num_q, num_k, device), build)


def _layer(
    bands: Bands, intervals: RowIntervals, first: int, last: int, num_q: int, num_k: int, device: torch.device
) -> LayerTables:
    # Measured against the padded keys, a tile that reaches into the padding is partial: no padded key is ever seen.
    # Padded queries may see keys: nobody reads their output, and their gradient is zero.
    rows, columns = num_blocks(num_q), num_blocks(num_k)
    tiles = classify_tiles(bands, num_q, columns * BLOCK, BLOCK, BLOCK)
    lists = [
        *_padded_lists(tiles.partial, tiles.full, rows),
        *_padded_lists(tiles.partial.transposed(columns), tiles.full.transposed(columns), columns),
    ]
    width = next(number for number in INTERVALS_PER_LAYER if number >= last - first)
    bounds = np.zeros((2 * width, rows * BLOCK), np.int64)
    for number in range(first, last):
        row = np.flatnonzero(intervals.counts > number)
        bounds[2 * (number - first), row] = intervals.starts[intervals.offsets[row] + number]
        bounds[2 * (number - first) + 1, row] = intervals.stops[intervals.offsets[row] + number]
    return LayerTables(*(torch.from_numpy(table.astype(np.int32)).to(device) for table in (*lists, bounds)))


def _padded_lists(partial: IndexLists, full: IndexLists, num_rows: int) -> list[NDArray[np.int64]]:
    """Return counts ``[1, 1, num_rows]`` and indices ``[1, 1, num_rows, W]`` of both, rows that are missing empty.

    The kernels find both kinds' lists by the strides of the partial ones, so that both must be equally wide.
    """
    width = max(int(partial.counts.max(initial=0)), int(full.counts.max(initial=0)), 2)
    tables = []
    for lists in (partial, full):
        missing = num_rows - len(lists.counts)
        tables += [np.pad(lists.counts, (0, missing)), np.pad(lists.padded(width), ((0, missing), (0, 0)))]
    return [table[None, None] for table in tables]
