# SPDX-License-Identifier: Apache-2.0
"""Cut a sequence where its documents start, in parts of about equal length that can be dealt like equal ones."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.plan.chunks import ChunkWork
from magi_attention.plan.documents import component_starts, key_hulls

Array = NDArray[np.int64]

# First rows read far if they read so many times more rows than there are in their cells, and documents are graded if
# the first rows of the one that reads most read at most this share of it.
FAR, GRADED = 2, 0.5


@dataclass(frozen=True, eq=False)
class Cells:
    """Parts of documents, and what their rows weigh and read.

    Attributes:
        work: their work.
        document: ``(num_cells,)`` the document of each, from 0 on.
    """

    work: ChunkWork
    document: Array

    @property
    def cuts(self) -> Array:
        """``(num_cells + 1,)`` where cells start, and the end of the sequence."""
        return self.work.cuts

    @cached_property
    def first(self) -> Array:
        """``(num_documents,)`` the first cell of each document."""
        return np.flatnonzero(np.diff(self.document, prepend=-1))

    @cached_property
    def area_before(self) -> Array:
        """``(num_cells + 1,)`` the area before each cell, and of all."""
        return np.append(0, np.cumsum(self.work.area))

    @cached_property
    def reach(self) -> Array:
        """``(num_cells,)`` how many rows each cell reads, from its document's first one on."""
        return key_hulls(self.work)[1] - self.cuts[self.first[self.document]]

    def of_rows(self, rows: Array) -> Array:
        """The cell of each row; of the end of the sequence, the last one."""
        return np.minimum(np.searchsorted(self.cuts, rows, side="right") - 1, len(self.document) - 1)

    def area_of_rows(self, stop: Array) -> Array:
        """The area of all rows before each of ``stop``, as if all rows of a cell weighed the same."""
        cell = self.of_rows(stop)
        before, start = self.area_before[cell], self.cuts[cell]
        return before + (self.area_before[cell + 1] - before) * (stop - start) // (self.cuts[cell + 1] - start)


def cut_documents(slices: SliceTable, total: int, num_cells: int) -> tuple[Array, Array]:
    """Cut every document evenly into about its share of ``num_cells`` cells.

    Of documents shorter than a cell, some start within one: at most one starts a cell in ``total / num_cells`` rows.

    Returns:
        ``(num_cells + 1,)`` where the cells start, and ``total``, and ``(num_cells,)`` the document of each.
    """
    starts = component_starts(slices)
    starts = np.append(0, starts[starts > 0])
    mean = -(-total // num_cells)
    starts = starts[np.diff(starts // mean, prepend=-1) > 0]
    length = np.diff(starts, append=total)
    # A document that is too short for a cell gets one; the others get their shares of what is left, rounded.
    is_long = np.ones(len(starts), np.bool_)
    left, rows = num_cells, total
    while (is_short := is_long & (length * left < rows)).any():
        is_long ^= is_short
        left, rows = left - int(is_short.sum()), rows - int(length[is_short].sum())
    count, remainder = np.divmod(length * left, max(rows, 1))
    count[~is_long], remainder[~is_long] = 1, -1
    count[np.argsort(-remainder, kind="stable")[: num_cells - int(count.sum())]] += 1
    document, step = expand_counts(count)
    # Rounding is the same everywhere: a product, rounded once, and cut off.
    begin = (step * (length / count).take(document)).astype(np.int64)
    begin += starts.take(document)
    return np.append(begin, total), document


def first_rows_read_far(work: ChunkWork, document: Array) -> bool:
    """Whether documents' first rows read much more than themselves, but of long documents much less than all."""
    low, high = key_hulls(work)
    reads = high - low
    first = np.flatnonzero(np.diff(document, prepend=-1))
    farthest = int(reads.argmax())
    is_graded = reads[first[document[farthest]]] <= GRADED * reads[farthest]
    return bool(is_graded and reads[first].sum() > FAR * np.diff(work.cuts)[first].sum())
