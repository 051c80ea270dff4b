# SPDX-License-Identifier: Apache-2.0
"""A mask as the row functions that cudnn.flex_attention reads.

Tensors are not indexed by brackets here: these ask for the device, which is not there where kernels are only compiled.
"""

import numpy as np
import torch
from torch import Tensor

from magi_attention.common.slices import expand_counts
from magi_attention.kernels.device_tiles import upload
from magi_attention.kernels.tiles import RowIntervals

MOST_ENDS = 2**31 - 1
"""How many ends a mask may have, padding included: as many as 32 bits count; they take 8 GiB."""


def row_functions(intervals: RowIntervals, device: torch.device) -> Tensor:
    """Return the ends of every query's intervals, as rows ``F0, F1, F2, …`` of an int32 tensor ``(1, F, num_q)``.

    A query sees the keys in ``[0, F0)``, ``[F1, F2)``, ``[F3, F4)`` and so on, where the ends ascend; F is odd. An
    interval that begins at key 0 is the one that ends at F0; a query without such an interval has ``F0 = 0``. Where a
    query has fewer intervals than others, its last end is repeated. The intervals are uploaded, and laid out like that
    on the device.

    Raises:
        ValueError: If the tensor would have more than ``MOST_ENDS`` elements.
    """
    num_q = len(intervals.counts)
    row, number = expand_counts(intervals.counts)
    has_first = np.zeros(num_q, bool)
    has_first[row[(number == 0) & (intervals.starts == 0)]] = True
    place = number + 1 - has_first[row]  # 0 for the interval that F0 ends
    num_functions = 1 + 2 * int(place.max(initial=0))
    _check_size(num_functions, num_q, int(intervals.counts.max(initial=0)))
    some = intervals.counts > 0
    first, last = np.zeros((2, num_q), np.int64)
    first[has_first] = intervals.stops[intervals.offsets[:-1][has_first]]
    last[some] = intervals.stops[intervals.offsets[1:][some] - 1]
    functions = upload(last, device).repeat(num_functions, 1)
    later = place > 0
    row, place = row[later], place[later]
    at_function = np.concatenate([np.zeros(num_q, np.int64), 2 * place - 1, 2 * place])
    at_row = np.concatenate([np.arange(num_q), row, row])
    ends = np.concatenate([first, intervals.starts[later], intervals.stops[later]])
    functions.index_put_(tuple(upload(each, device).long() for each in (at_function, at_row)), upload(ends, device))
    return functions.unsqueeze(0)


def _check_size(num_functions: int, num_q: int, most: int) -> None:
    if num_functions * num_q > MOST_ENDS:
        raise ValueError(
            f"cudnn_flex pads all {num_q:,} queries to the {most:,} key intervals of the query that has the most, which"
            f" makes {num_functions * num_q:,} ends, more than {MOST_ENDS:,}; use the backend 'blackwell', or 'flex'"
            " for head dims that it does not take"
        )
