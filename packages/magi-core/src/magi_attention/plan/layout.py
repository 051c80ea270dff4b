# SPDX-License-Identifier: Apache-2.0
"""Who owns which rows: chunks dealt to ranks, and the way between global and local positions."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.derived import KeepsDerived
from magi_attention.plan.totals import totals


def even_cuts(total: int, chunk_size: int) -> NDArray[np.int64]:
    """Where chunks of ``chunk_size`` rows start, the last perhaps shorter, and ``total``."""
    return np.append(np.arange(0, total, chunk_size), total)


@dataclass(frozen=True, eq=False)
class Layout(KeepsDerived):
    """A sequence cut into chunks, each owned by one rank.

    They have ``chunk_size`` rows, but for the last, which may be shorter, unless ``uneven_cuts`` says otherwise.

    A rank's *local* rows are its chunks in ascending order, one after another.

    Attributes:
        num_real: rows of the user's sequence; rows ``[num_real, total)`` are padding.
        total: rows in all, padding included.
        chunk_size: rows of every chunk but perhaps the last; with ``uneven_cuts``, about so many were dealt at a time.
        num_ranks: ranks of the context-parallel group.
        owner: ``(num_chunks,)`` int64, the rank that owns each chunk.
        uneven_cuts: ``(num_chunks + 1,)`` where chunks of unequal length start, and ``total``; None for equal ones.
    """

    num_real: int
    total: int
    chunk_size: int
    num_ranks: int
    owner: NDArray[np.int64]
    uneven_cuts: NDArray[np.int64] | None = None

    @cached_property
    def cuts(self) -> NDArray[np.int64]:
        """``(num_chunks + 1,)`` where the chunks start, and ``total``."""
        return even_cuts(self.total, self.chunk_size) if self.uneven_cuts is None else self.uneven_cuts

    @cached_property
    def runs(self) -> NDArray[np.int64]:
        """``(n, 4)`` rows ``(start, stop, rank, local_start)``, sorted: neighboring chunks of one rank joined."""
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        start = first * self.chunk_size if self.uneven_cuts is None else self.uneven_cuts[first]
        stop = np.append(start[1:], self.total)
        rank = self.owner[first]
        by_rank = np.argsort(rank, kind="stable")
        length = (stop - start)[by_rank]
        before = np.cumsum(length) - length
        rank_first = np.searchsorted(rank[by_rank], rank[by_rank])
        local = np.empty_like(start)
        local[by_rank] = before - before[rank_first]
        return np.column_stack([start, stop, rank, local])

    def runs_of(self, rank: int) -> NDArray[np.int64]:
        """``(n, 3)`` rows ``(start, stop, local_start)``: the runs of one rank, ascending."""
        return self.runs[self.runs[:, 2] == rank][:, [0, 1, 3]]

    @cached_property
    def real_runs(self) -> NDArray[np.int64]:
        """:attr:`runs` without the padding."""
        runs = self.runs[self.runs[:, 0] < self.num_real]
        runs[:, 1] = np.minimum(runs[:, 1], self.num_real)
        return runs

    def real_runs_of(self, rank: int) -> NDArray[np.int64]:
        """:meth:`runs_of` without the padding."""
        return self.real_runs[self.real_runs[:, 2] == rank][:, [0, 1, 3]]

    @cached_property
    def rows_per_rank(self) -> NDArray[np.int64]:
        """``(num_ranks,)`` how many rows each rank owns."""
        start, stop, rank, _ = self.runs.T
        return totals(rank, stop - start, self.num_ranks)

    def chunks_of(self, rank: int) -> NDArray[np.int64]:
        """The ascending indices of one rank's chunks."""
        return np.flatnonzero(self.owner == rank)

    def positions(self, rank: int) -> NDArray[np.int64]:
        """The global position of each local row of ``rank``; padding rows included."""
        runs = [np.arange(start, stop) for start, stop, _ in self.runs_of(rank)]
        return np.concatenate([np.empty(0, np.int64), *runs])
