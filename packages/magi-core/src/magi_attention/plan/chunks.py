# SPDX-License-Identifier: Apache-2.0
"""Cut the sequence into chunks and weigh them by their share of the mask."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.intervals import Intervals
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.plan.layout import Layout
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]

DealKeys = Callable[[Layout], Layout]
"""Where the keys of another sequence lie, given who owns which queries."""


@dataclass(frozen=True, eq=False)
class ChunkWork:
    """What each chunk of query rows has to compute.

    Attributes:
        slices: the mask.
        cuts: ``(num_chunks + 1,)`` int64, where the chunks start, and the end of the sequence.
        area: ``(num_chunks,)`` int64, the (query, key) pairs that the mask keeps in the chunk's rows.
        chunk: ``(n,)`` int64, the chunk of each entry of ``keys``; an entry is a meeting of a slice and a chunk.
        slice_index: ``(n,)`` int64, the slice of each entry.
        keys: ``(n, 2)`` int64, the key rows ``[start, stop)`` that the chunk reads for the slice.
        deal_keys: deals the keys where they are of another sequence; None in self-attention.
    """

    slices: SliceTable
    cuts: NDArray[np.int64]
    area: NDArray[np.int64]
    chunk: NDArray[np.int64]
    slice_index: NDArray[np.int64]
    keys: Intervals
    deal_keys: DealKeys | None = None

    @property
    def total(self) -> int:
        """Rows of the sequence."""
        return int(self.cuts[-1])


def measure_chunks(slices: SliceTable, cuts: NDArray[np.int64], deal_keys: DealKeys | None = None) -> ChunkWork:
    """Measure all chunks of a sequence cut at ``cuts``; the cost grows with slices and chunks, not with rows."""
    bands, source = band.shrink(slices.bands())
    q0, q1, k0, k1, d0, d1 = np.ascontiguousarray(bands.T)
    first = np.searchsorted(cuts, q0, side="right") - 1
    number = np.searchsorted(cuts, q1) - first
    last = np.cumsum(number) - 1
    owner = np.repeat(np.arange(len(bands)), number)
    chunk = np.arange(len(owner))
    chunk += (first - last + number - 1).take(owner)
    # All rows of a trimmed band keep something, so no piece of one has to be trimmed anew.
    start = cuts.take(chunk)
    start[last - number + 1] = q0
    keys = np.empty((2, len(owner)), np.int64)
    np.maximum(d0.take(owner) + start, k0.take(owner), out=keys[0])
    np.minimum(d1.take(owner) + _stops(start, last, q1), k1.take(owner), out=keys[1])
    entry_area = _areas_below(d1, k0, k1, owner, start, last, q1)
    # Where the lower diagonal cuts nothing off, there is nothing below it.
    cut = d0 > k0 - q1 + 1
    if cut.any():
        entries = np.flatnonzero(cut.take(owner))
        number, own = number[cut], np.repeat(np.arange(int(cut.sum())), number[cut])
        entry_area[entries] -= _areas_below(
            d0[cut] - 1, k0[cut], k1[cut], own, start[entries], np.cumsum(number) - 1, q1[cut]
        )
    area = totals(chunk, entry_area, len(cuts) - 1)
    return ChunkWork(slices, cuts, area, chunk, source.take(owner), keys.T, deal_keys)


def _stops(start: Array, last: Array, stop: Array) -> Array:
    """What comes after each entry: the next one's, or ``stop`` after the ``last`` ones."""
    stops = np.empty_like(start)
    stops[:-1] = start[1:]
    stops[last] = stop
    return stops


def _areas_below(diagonal: Array, k0: Array, k1: Array, owner: Array, start: Array, last: Array, stop: Array) -> Array:
    """The pairs of each entry's rows with its band's columns up to the ``diagonal``.

    Args:
        diagonal: ``(num_bands,)`` the columns end there.
        k0: ``(num_bands,)`` the first column.
        k1: ``(num_bands,)`` the one after the last.
        owner: ``(n,)`` the band of each entry.
        start: ``(n,)`` its first row.
        last: ``(num_bands,)`` the last entry of each band.
        stop: ``(num_bands,)`` the row after its last.
    """
    before_row_zero, width = diagonal - k0, np.maximum(k1 - k0, 0)
    before = band.ramp_area(start + before_row_zero.take(owner), width.take(owner))
    return _stops(before, last, band.ramp_area(stop + before_row_zero, width)) - before
