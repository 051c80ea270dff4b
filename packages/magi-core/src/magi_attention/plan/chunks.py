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
    last = np.searchsorted(cuts, bands[:, band.Q1])
    owner, step = expand_counts(last - first)
    chunk = first[owner] + step
    # By columns, which are much faster than rows of six.
    q0, q1, *others = (np.repeat(column, last - first) for column in np.ascontiguousarray(bands.T))
    q0, q1 = np.maximum(q0, cuts[chunk]), np.minimum(q1, cuts[chunk + 1])
    trimmed, kept = band.trim(q0, q1, *others)
    pieces = list(trimmed)
    if len(kept) < len(chunk):
        chunk, owner = chunk[kept], owner[kept]
        pieces = [column[kept] for column in pieces]
    area = totals(chunk, band.column_area(*pieces), len(cuts) - 1)
    keys = np.column_stack(pieces[band.K0 : band.D0])
    return ChunkWork(slices, cuts, area, chunk, source[owner], keys, deal_keys)
