# SPDX-License-Identifier: Apache-2.0
"""Who owns which rows: chunks dealt to ranks, and the way between global and local positions."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.derived import KeepsDerived
from magi_attention.plan.totals import totals


@dataclass(frozen=True, eq=False)
class Layout(KeepsDerived):
    """A sequence cut into chunks of ``chunk_size`` rows (the last may be shorter), each owned by one rank.

    A rank's *local* rows are its chunks in ascending order, one after another.

    Attributes:
        num_real: rows of the user's sequence; rows ``[num_real, total)`` are padding.
        total: rows in all, padding included.
        chunk_size: rows of every chunk but perhaps the last.
        num_ranks: ranks of the context-parallel group.
        owner: ``(num_chunks,)`` int64, the rank that owns each chunk.
    """

    num_real: int
    total: int
    chunk_size: int
    num_ranks: int
    owner: NDArray[np.int64]

    @cached_property
    def runs(self) -> NDArray[np.int64]:
        """``(n, 4)`` rows ``(start, stop, rank, local_start)``, sorted: neighboring chunks of one rank joined."""
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        start = first * self.chunk_size
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
