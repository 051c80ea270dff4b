# SPDX-License-Identifier: Apache-2.0
"""Exact forms of a stage's mask on the host: intervals of rows, and packed documents with a window."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.tiles import RowIntervals, row_intervals

MIN_ROWS_PER_DOCUMENT = 64
"""Documents that are shorter on average waste too much of the kernels' tiles of their own."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A mask of packed documents, all with the same window.

    Query i of a document with ``nq`` queries and ``nk`` keys has its diagonal at key ``d = i + nk - nq`` and sees the
    document's keys ``d - left`` to ``d + right``, both included.

    Attributes:
        q_offsets: ``(num_documents + 1,)``; document n has the queries ``q_offsets[n]`` to ``q_offsets[n + 1]``.
        k_offsets: the same for its keys.
        left, right: the window's reach, None without a limit.
    """

    q_offsets: NDArray[np.int64]
    k_offsets: NDArray[np.int64]
    left: int | None
    right: int | None

    @property
    def num_documents(self) -> int:
        """How many documents there are, at least one."""
        return len(self.q_offsets) - 1


def intervals_of_queries(slices: SliceTable, num_q: int) -> RowIntervals:
    """Return the keys that each query sees. Built once and kept with the table."""
    return slices.derived(("row intervals", num_q), lambda: row_intervals(slices.bands(), num_q))


def has_pairs(slices: SliceTable) -> bool:
    """Whether any query sees any key."""
    return slices.derived("has pairs", lambda: bool(slices.area()))


def packed_mask(slices: SliceTable, num_q: int, num_k: int) -> PackedMask | None:
    """Return the mask as packed documents if it is exactly that, however it was cut into slices; else None.

    The documents must cover all queries and all keys, in the same order. Built once and kept with the table.
    """
    return slices.derived(("packed mask", num_q, num_k), lambda: _find_documents(slices, num_q, num_k))


def _find_documents(slices: SliceTable, num_q: int, num_k: int) -> PackedMask | None:
    if not num_q or not num_k:
        return None
    intervals = intervals_of_queries(slices, num_q)
    if (intervals.counts != 1).any():
        return None
    starts, stops = intervals.starts, intervals.stops
    # A document begins where a query sees none of what the query before it saw.
    first = np.flatnonzero(np.append(True, starts[1:] >= stops[:-1]))
    last = np.append(first[1:], num_q) - 1
    k_offsets = np.append(starts[first], stops[-1])
    tiled = k_offsets[0] == 0 and k_offsets[-1] == num_k and (stops[last] == k_offsets[1:]).all()
    if not tiled or len(first) * MIN_ROWS_PER_DOCUMENT > max(num_q, MIN_ROWS_PER_DOCUMENT):
        return None
    q_offsets = np.append(first, num_q)
    document = np.repeat(np.arange(len(first)), np.diff(q_offsets))
    k_first, k_end = k_offsets[document], k_offsets[document + 1]
    diagonal = np.arange(num_q) + k_end - q_offsets[document + 1]
    left, right = _reach(diagonal - starts, starts > k_first), _reach(stops - 1 - diagonal, stops < k_end)
    if left is _NONE or right is _NONE:
        return None
    return PackedMask(q_offsets, k_offsets, left, right)


_NONE = -1
"""No window explains the mask."""


def _reach(seen: NDArray[np.int64], cut: NDArray[np.bool_]) -> int | None:
    """The window that lets rows see ``seen`` keys beyond their diagonal, more only where the document ends first.

    ``cut`` says in which rows the document goes on. None if no row tells a limit, ``_NONE`` if they contradict.
    """
    if not cut.any():
        return None
    reach = int(seen[cut][0])
    agrees = (seen[cut] == reach).all() and (seen[~cut] <= reach).all()
    return reach if agrees and reach >= 0 else _NONE
