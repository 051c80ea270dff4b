# SPDX-License-Identifier: Apache-2.0
"""Cut queries where that makes their masks regular: kernels that know causal and full masks are faster on them."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable, count_slab_pieces, cut_into_slabs, distinct

MOST_RUNS = 4
"""Masks that would be cut into more runs stay whole."""

MOST_PIECES = 1 << 12
"""So do masks that are cut into more pieces to look at them."""


def regular_runs(slices: SliceTable, start: int, stop: int) -> list[tuple[int, int]]:
    """Cut the queries ``[start, stop)`` into runs, each of packed documents that are all causal or all full.

    Documents are packed where they follow each other without a gap in queries and in keys. Queries without keys are
    runs of their own. A mask that is not so regular stays whole, or has runs that are not.
    """
    whole = [(start, stop)]
    bands = band.shrink(band.clip(slices.bands(), band.Q0, start, stop))[0]
    if not len(bands) or count_slab_pieces(bands) > MOST_PIECES:
        return whole
    slabs = _Slabs(bands)
    cuts = np.flatnonzero(~slabs.goes_on) + 1
    heads = np.append(0, cuts)
    ends = np.append(cuts, len(slabs.first)) - 1
    borders = distinct(np.concatenate([[start, stop], slabs.first[heads], slabs.last[ends]]))
    runs = [(int(first), int(last)) for first, last in pairwise(borders)]
    return runs if len(runs) <= MOST_RUNS else whole


class _Slabs:
    """Runs of rows between which nothing changes but along diagonals, ascending.

    Attributes:
        first, last: the rows ``[first, last)`` of each.
        goes_on: whether each slab but the first goes on with the mask of the one before.
    """

    def __init__(self, bands: Bands) -> None:
        pieces, _, slab = cut_into_slabs(bands)
        head = np.flatnonzero(np.append(True, slab[1:] != slab[:-1]))
        tail = np.append(head[1:], len(pieces)) - 1
        self.first, self.last = pieces[head, band.Q0], pieces[head, band.Q1]
        left, right = band.left_moves(pieces), band.right_moves(pieces)
        inner = np.append(slab[1:] == slab[:-1], False)
        touches = np.append(pieces[:-1, band.K1] == pieces[1:, band.K0], True) & ~right & ~np.append(left[1:], False)
        is_regular = np.logical_and.reduceat(~inner | touches, head) & ~left[head]
        is_ramp = right[tail]
        start = pieces[head, band.K0]
        begin = np.minimum(pieces[tail, band.K1], self.first + pieces[tail, band.D1] + 1)
        end = pieces[tail, band.K1]
        self.goes_on = self._goes_on(is_regular, is_ramp, start, begin, end)

    def _goes_on(
        self,
        is_regular: NDArray[np.bool_],
        is_ramp: NDArray[np.bool_],
        start: NDArray[np.int64],
        begin: NDArray[np.int64],
        end: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """By whether slabs are one interval with a fixed start, whether it grows, and where its rows' keys end."""
        is_next = self.first[1:] == self.last[:-1]
        both = is_regular[1:] & is_regular[:-1]
        grows = is_ramp[1:] & is_ramp[:-1] & (start[1:] == start[:-1]) & (begin[1:] == end[:-1] + 1)
        repeats = ~is_ramp[1:] & ~is_ramp[:-1] & (start[1:] == start[:-1]) & (end[1:] == end[:-1])
        one_row = self.last - self.first == 1
        alike = (is_ramp[1:] == is_ramp[:-1]) | one_row[1:] | one_row[:-1]
        follows = alike & (start[1:] == end[:-1])
        return is_next & ((both & (grows | repeats | follows)) | (~is_regular[1:] & ~is_regular[:-1]))
