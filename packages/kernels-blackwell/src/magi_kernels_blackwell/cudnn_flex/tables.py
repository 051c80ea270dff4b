# SPDX-License-Identifier: Apache-2.0
"""A mask as the row functions that cudnn.flex_attention reads."""

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import expand_counts
from magi_attention.kernels.tiles import RowIntervals


def row_functions(intervals: RowIntervals) -> NDArray[np.int32]:
    """Return the ends of every query's intervals, as rows ``F0, F1, F2, …`` of an array ``(1, F, num_q)``, F odd.

    A query sees the keys in ``[0, F0)``, ``[F1, F2)``, ``[F3, F4)`` and so on, where the ends ascend. An interval that
    begins at key 0 is the one that ends at F0; a query without such an interval has ``F0 = 0``. Where a query has fewer
    intervals than others, its last end is repeated.
    """
    num_q = len(intervals.counts)
    row, number = expand_counts(intervals.counts)
    has_first = np.zeros(num_q, bool)
    has_first[row[(number == 0) & (intervals.starts == 0)]] = True
    place = number + 1 - has_first[row]  # 0 for the interval that F0 ends
    functions = np.zeros((1 + 2 * int(place.max(initial=0)), num_q), np.int32)
    functions[2 * place, row] = intervals.stops
    later = place > 0
    functions[2 * place[later] - 1, row[later]] = intervals.starts[later]
    return np.maximum.accumulate(functions, axis=0)[None]
