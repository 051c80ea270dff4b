# SPDX-License-Identifier: Apache-2.0
"""Documents of masks whose queries and keys are of two sequences, each with an axis of its own.

A slice joins its query rows with its key rows. What is joined, directly or through others, is a *component*: the
queries of a document and the keys that they read. Its rows need not be neighbors on either axis.
"""

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import Intervals
from magi_attention.common.slices import SliceTable, distinct
from magi_attention.plan.chunks import ChunkWork

Array = NDArray[np.int64]


def leaders(intervals: Intervals) -> Array:
    """Of each set of intervals that overlap, directly or through others, the one that starts first, in their order."""
    order = np.argsort(intervals[:, 0], kind="stable")
    start, reach = intervals[order, 0], np.maximum.accumulate(intervals[order, 1])
    return order[np.append(True, start[1:] >= reach[:-1])[: len(order)]]


def key_documents(slices: SliceTable) -> tuple[Array, Array]:
    """Where sets of keys that slices join start on the key axis, ascending, and the component of each, from 0 on."""
    bands, _ = band.shrink(slices.bands())
    first = leaders(bands[:, band.K0 : band.D0])
    return bands[first, band.K0], np.unique(_components(bands)[first], return_inverse=True)[1]


def _components(bands: Bands) -> Array:
    """``(n,)`` a label for each trimmed band, the same for those of one component."""
    starts = [bands[leaders(bands[:, side : side + 2]), side] for side in (band.Q0, band.K0)]
    rows, keys = (
        np.searchsorted(each, bands[:, side], side="right") - 1
        for each, side in zip(starts, (band.Q0, band.K0), strict=True)
    )
    keys = keys + len(starts[0])
    label = np.arange(len(starts[0]) + len(starts[1]))
    while (label[rows] != label[keys]).any():
        for one, other in ((rows, keys), (keys, rows)):
            np.minimum.at(label, label[one], label[other])
        while (label[label] != label).any():
            label = label[label]
    return label[rows]


def chunk_components(work: ChunkWork) -> Array:
    """``(num_chunks,)`` the component of which each chunk reads most keys, numbered in the order of their first chunks.

    Chunks that read nothing are a component of their own.
    """
    num_chunks = len(work.area)
    bands, source = band.shrink(work.slices.bands())
    component = _components(bands)[np.searchsorted(source, work.slice_index)]
    most = int(component.max(initial=0)) + 1
    entry, inverse = np.unique(work.chunk * most + component, return_inverse=True)
    rows_read = np.bincount(inverse, weights=work.keys[:, 1] - work.keys[:, 0], minlength=len(entry))
    order = np.argsort(rows_read, kind="stable")
    label = np.full(num_chunks, most)
    label[entry[order] // most] = entry[order] % most  # the last of a chunk, that is the largest, stays
    _, first, number = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[number]


def cut_costs(work: ChunkWork, line: Array) -> Array:
    """``(num_chunks + 1,)`` how many key rows are read both before and after each place of the line."""
    place = np.empty_like(line)
    place[line] = np.arange(len(line))
    ends = distinct(work.keys)
    first, last = _extreme_readers(np.searchsorted(ends, work.keys), place[work.chunk], max(len(ends) - 1, 0))
    length = np.diff(ends)
    read = np.flatnonzero(last > first)
    steps = np.zeros(len(line) + 2, np.int64)
    np.add.at(steps, first[read] + 1, length[read])
    np.add.at(steps, last[read] + 1, -length[read])
    return np.cumsum(steps)[:-1]


def _extreme_readers(spans: Intervals, place: Array, num_pieces: int) -> tuple[Array, Array]:
    """The least and the greatest place of the spans over each of ``num_pieces`` pieces of the keys.

    Each span is the union of two blocks of a power of two; blocks are then halved down to single pieces.
    """
    level = np.frexp(np.maximum(spans[:, 1] - spans[:, 0], 1).astype(float))[1] - 1
    top = int(level.max(initial=0))
    least = np.full((top + 1, num_pieces), np.iinfo(np.int64).max)
    greatest = np.full((top + 1, num_pieces), -1)
    for start in (spans[:, 0], spans[:, 1] - (1 << level)):
        np.minimum.at(least, (level, start), place)
        np.maximum.at(greatest, (level, start), place)
    for each in range(top, 0, -1):
        half = 1 << (each - 1)
        for table, extreme in ((least, np.minimum), (greatest, np.maximum)):
            extreme(table[each - 1], table[each], out=table[each - 1])
            extreme(table[each - 1][half:], table[each][:-half], out=table[each - 1][half:])
    return least[0], greatest[0]
