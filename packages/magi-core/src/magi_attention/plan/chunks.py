# SPDX-License-Identifier: Apache-2.0
"""Cut the sequence into chunks and weigh them by their share of the mask."""

import itertools
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

# Entries are measured so many at a time: large arrays cost more than caches and allocators hold.
TOGETHER = 9000

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
    first = np.searchsorted(cuts, bands[:, band.Q0], side="right") - 1
    number = np.searchsorted(cuts, bands[:, band.Q1]) - first
    # By columns, which are much faster than rows of six.
    columns = np.ascontiguousarray(bands.T)
    entries_before = np.append(0, np.cumsum(number))
    ends = np.searchsorted(entries_before, np.arange(TOGETHER, entries_before[-1], TOGETHER))
    parts = itertools.pairwise([0, *ends.tolist(), len(bands)])
    measured = [_measure(columns[:, a:b], first[a:b], number[a:b], cuts) for a, b in parts if a < b]
    if not measured:
        measured = [_measure(columns, first, number, cuts)]
    count, chunk, entry_area, keys = (np.concatenate(each) for each in zip(*measured, strict=True))
    area = totals(chunk, entry_area, len(cuts) - 1)
    return ChunkWork(slices, cuts, area, chunk, np.repeat(source, count), keys, deal_keys)


def _measure(columns: Array, first: Array, number: Array, cuts: Array) -> tuple[Array, Array, Array, Array]:
    """How many entries each band has, trimmed bands given by columns; the chunk, area and keys of each entry."""
    owner, step = expand_counts(number)
    chunk = first[owner] + step
    q0, q1, *others = (np.repeat(column, number) for column in columns)
    trimmed, kept = band.trim(np.maximum(q0, cuts[chunk]), np.minimum(q1, cuts[chunk + 1]), *others)
    pieces = list(trimmed)
    if len(kept) < len(chunk):
        chunk, owner = chunk[kept], owner[kept]
        pieces = [column[kept] for column in pieces]
    count = np.bincount(owner, minlength=len(number))
    return count, chunk, band.column_area(*pieces), np.column_stack(pieces[band.K0 : band.D0])
