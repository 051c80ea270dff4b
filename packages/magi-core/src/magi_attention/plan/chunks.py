# SPDX-License-Identifier: Apache-2.0
"""Cut the sequence into chunks and weigh them by their share of the mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.intervals import Intervals
from magi_attention.common.slices import SliceTable
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
        bands: ``(6, num_bands)`` int64, the mask's trimmed bands by columns.
        chunk: ``(n,)`` int64, the chunk of each entry of ``keys``; an entry is a meeting of a slice and a chunk.
        slice_index: ``(n,)`` int64, the slice of each entry.
        keys: ``(n, 2)`` int64, the key rows ``[start, stop)`` that the chunk reads for the slice.
        deal_keys: deals the keys where they are of another sequence; None in self-attention.
    """

    slices: SliceTable
    cuts: NDArray[np.int64]
    area: NDArray[np.int64]
    bands: NDArray[np.int64]
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
    columns = np.ascontiguousarray(bands.T)
    _, q1, k0, k1, d0, d1 = columns
    entries = _find_entries(columns, cuts)
    keys = np.empty((2, len(entries.band)), np.int64)
    np.maximum(d0.take(entries.band) + entries.start, k0.take(entries.band), out=keys[0])
    np.minimum(d1.take(entries.band) + _stops(entries.start, entries.last, q1), k1.take(entries.band), out=keys[1])
    area = totals(entries.chunk, _areas(columns, entries), len(cuts) - 1)
    return ChunkWork(slices, cuts, area, columns, entries.chunk, source.take(entries.band), keys.T, deal_keys)


class _Entries(NamedTuple):
    """Where bands and chunks meet.

    Attributes:
        band: ``(n,)`` the band of each entry, ascending.
        chunk: ``(n,)`` its chunk.
        start: ``(n,)`` the first row of the band that is in the chunk.
        last: ``(num_bands,)`` the last entry of each band.
    """

    band: Array
    chunk: Array
    start: Array
    last: Array


def _find_entries(columns: Array, cuts: Array) -> _Entries:
    """All entries of trimmed bands, given by columns; as all their rows keep something, they need no more trimming."""
    q0, q1 = columns[band.Q0], columns[band.Q1]
    first = np.searchsorted(cuts, q0, side="right") - 1
    number = np.searchsorted(cuts, q1) - first
    last = np.cumsum(number) - 1
    owner = np.repeat(np.arange(len(number)), number)
    chunk = np.arange(len(owner))
    chunk += (first - last + number - 1).take(owner)
    start = cuts.take(chunk)
    start[last - number + 1] = q0
    return _Entries(owner, chunk, start, last)


def measure_areas(columns: Array, cuts: Array) -> Array:
    """The area of each chunk alone, for trimmed bands given by columns."""
    entries = _find_entries(columns, cuts)
    return totals(entries.chunk, _areas(columns, entries), len(cuts) - 1)


def _areas(columns: Array, entries: _Entries) -> Array:
    """The area of each entry."""
    _, q1, k0, k1, d0, d1 = columns
    areas = _areas_below(d1, k0, k1, entries.band, entries.start, entries.last, q1)
    # Where the lower diagonal cuts nothing off, there is nothing below it.
    cut = d0 > k0 - q1 + 1
    if cut.any():
        chosen = np.flatnonzero(cut.take(entries.band))
        number = np.diff(entries.last, prepend=-1)[cut]
        own, last = np.repeat(np.arange(len(number)), number), np.cumsum(number) - 1
        areas[chosen] -= _areas_below(d0[cut] - 1, k0[cut], k1[cut], own, entries.start[chosen], last, q1[cut])
    return areas


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
