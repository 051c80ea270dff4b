# SPDX-License-Identifier: Apache-2.0
"""Tiles listed one by one on the host, which kernels get as runs or expanded on a device: what tests compare with."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.bands import Bands
from magi_attention.common.slices import expand_counts
from magi_attention.kernels.tiles import RowIntervals, tile_runs

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class IndexLists:
    """One ascending list of indices per row, in compressed form.

    Attributes:
        offsets: ``(num_rows + 1,)``; row i's list is ``indices[offsets[i]:offsets[i + 1]]``.
        indices: all lists, one after another.
    """

    offsets: Indices
    indices: Indices

    @classmethod
    def from_pairs(cls, rows: Indices, indices: Indices, num_rows: int) -> Self:
        """Collect pairs (row, index), in any order, none of them twice."""
        counts = np.bincount(rows, minlength=num_rows)
        return cls(np.append(0, np.cumsum(counts)), indices[np.lexsort((indices, rows))])

    @classmethod
    def from_intervals(cls, intervals: RowIntervals) -> Self:
        """List what intervals hold, one by one."""
        interval, step = expand_counts(intervals.stops - intervals.starts)
        return cls(np.append(0, np.cumsum(intervals.sizes)), intervals.starts[interval] + step)

    @property
    def counts(self) -> Indices:
        """The lists' lengths."""
        return np.diff(self.offsets)

    def transposed(self, num_columns: int) -> Self:
        """List the rows of each index instead of the indices of each row."""
        rows, _ = expand_counts(self.counts)
        return self.from_pairs(self.indices, rows, num_columns)

    def padded(self, width: int) -> Indices:
        """Return the lists as a matrix ``(num_rows, width)``, zero after each list's end."""
        matrix = np.zeros((len(self.counts), width), np.int64)
        matrix[expand_counts(self.counts)] = self.indices
        return matrix


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles that a mask touches: for each block of queries, blocks of keys.

    Attributes:
        full: tiles of which every pair that lies inside the tensors is kept, by one slice or by several together.
        partial: tiles of which some pairs are kept, but not all.
    """

    full: IndexLists
    partial: IndexLists


def classify_tiles(bands: Bands, num_q: int, num_k: int, block_q: int, block_k: int) -> Tiles:
    """Sort the tiles that ``bands`` touch into full and partial ones; see :func:`.kernels.tiles.tile_runs`."""
    runs = tile_runs(bands, num_q, num_k, block_q, block_k)
    return Tiles(IndexLists.from_intervals(runs.full), IndexLists.from_intervals(runs.partial))
