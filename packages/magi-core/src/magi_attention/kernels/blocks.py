# SPDX-License-Identifier: Apache-2.0
"""Cutting a slice table into rectangles of bounded size, of which only those on a diagonal need a mask."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable, expand_counts


class Block(NamedTuple):
    """A rectangle of queries ``[q0, q1)`` and keys ``[k0, k1)``.

    If ``masked``, it keeps only the pairs ``(i, j)`` with ``d0 <= j - i <= d1``, otherwise all.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    d0: int
    d1: int
    masked: bool


def cut_into_blocks(slices: SliceTable, max_rows: int, max_columns: int) -> list[Block]:
    """Cut ``slices`` into blocks of at most ``max_rows`` queries and ``max_columns`` keys.

    The blocks keep exactly the pairs of the slices, ordered by slice, then rows, then columns. What a slice does not
    reach is left out, to the row and column; the keys that all rows of a block row see come as unmasked blocks,
    unless there are so few of them that they are better left in the masked ones.
    """
    bands, _ = band.shrink(slices.bands())
    owner, step = expand_counts(-((bands[:, band.Q0] - bands[:, band.Q1]) // max_rows))
    start = bands[owner, band.Q0] + step * max_rows
    pieces, _ = band.shrink(band.clip(bands[owner], band.Q0, start, start + max_rows))
    q0, q1, k0, k1, d0, d1 = pieces.T
    # The keys that the last row sees from the left and the first row from the right are seen by all rows.
    seen_from, seen_to = np.maximum(k0, q1 - 1 + d0), np.minimum(k1, q0 + d1 + 1)
    apart = seen_to - seen_from >= np.minimum(max_columns // 2, k1 - k0)
    cuts = np.column_stack([k0, np.where(apart, seen_from, k1), np.where(apart, seen_to, k1), k1])
    blocks = []
    for (first_row, last_row, _, _, lower, upper), ends in zip(pieces.tolist(), cuts.tolist(), strict=True):
        for run, (start, stop) in enumerate(pairwise(ends)):
            for column in range(start, stop, max_columns):
                end = min(column + max_columns, stop)
                blocks.append(Block(first_row, last_row, column, end, lower, upper, masked=run != 1))
    return blocks
