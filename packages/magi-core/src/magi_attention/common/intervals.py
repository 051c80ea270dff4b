# SPDX-License-Identifier: Apache-2.0
"""Interval algebra on ``(n, 2)`` int64 arrays of half-open ``[start, stop)`` rows."""

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import distinct, expand_counts

Intervals = NDArray[np.int64]
Indices = NDArray[np.int64]


def merge(intervals: Intervals) -> Intervals:
    """The sorted union, touching intervals joined, empty ones dropped."""
    intervals = intervals[intervals[:, 1] > intervals[:, 0]]
    if not len(intervals):
        return intervals
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    first = np.flatnonzero(np.append(True, ordered[1:, 0] > reach[:-1]))
    return np.column_stack([ordered[first, 0], reach[np.append(first[1:], len(ordered)) - 1]])


def overlaps(intervals: Intervals, tiles: Intervals) -> tuple[Indices, Indices]:
    """All pairs of an interval and a tile that meet, by interval, then tile. ``tiles`` are sorted and disjoint."""
    first = np.searchsorted(tiles[:, 1], intervals[:, 0], side="right")
    last = np.searchsorted(tiles[:, 0], intervals[:, 1], side="left")
    nonempty = intervals[:, 1] > intervals[:, 0]
    owner, step = expand_counts(np.where(nonempty, last - first, 0))
    return owner, first[owner] + step


def intersect(intervals: Intervals, tiles: Intervals) -> tuple[Intervals, Indices, Indices]:
    """Cut ``intervals`` along sorted, disjoint ``tiles``: the pieces, and the interval and the tile of each."""
    i, t = overlaps(intervals, tiles)
    pieces = np.column_stack([np.maximum(intervals[i, 0], tiles[t, 0]), np.minimum(intervals[i, 1], tiles[t, 1])])
    return pieces, i, t


def subtract(intervals: Intervals, holes: Intervals) -> Intervals:
    """What is left of sorted, disjoint ``intervals`` without the sorted, disjoint ``holes``."""
    if not len(intervals):
        return intervals
    starts = np.append(intervals[0, 0], holes[:, 1])
    stops = np.append(holes[:, 0], intervals[-1, 1])
    gaps = np.column_stack([starts, stops])
    return intersect(intervals, gaps[stops > starts])[0]


def split_at(intervals: Intervals, cuts: NDArray[np.int64]) -> tuple[Intervals, NDArray[np.int64]]:
    """Split intervals where their running total length reaches any of the ``cuts``.

    Returns the pieces, in order, and for each the total length before it.
    """
    length = intervals[:, 1] - intervals[:, 0]
    before = np.cumsum(length) - length
    total = int(length.sum())
    begin = distinct(np.concatenate([before[length > 0], cuts[(cuts > 0) & (cuts < total)]]))
    size = np.diff(begin, append=total)
    source = np.searchsorted(before, begin, side="right") - 1
    start = intervals[source, 0] + begin - before[source]
    return np.column_stack([start, start + size]), begin
