# SPDX-License-Identifier: Apache-2.0
"""What each rank computes, and which rows of other ranks it reads for that."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import Intervals, merge, overlaps, subtract
from magi_attention.common.slices import SliceTable
from magi_attention.plan.layout import Layout
from magi_attention.plan.totals import totals


@dataclass(frozen=True, eq=False)
class Demand:
    """The work and the needs of all ranks. Every rank derives the same, since each must know what the others miss.

    Attributes:
        bands: ``(n, 6)`` bands in global rows and columns, each inside one run of one rank's rows.
        run: ``(n,)`` the run (row of the query layout's ``runs``) of each band.
        remote: ``(m, 3)`` rows ``(rank, start, stop)``: the key rows that a rank needs and does not own, sorted and
            disjoint within a rank.
        layout: who owns which queries.
        key_layout: who owns which keys.
    """

    bands: Bands
    run: NDArray[np.int64]
    remote: NDArray[np.int64]
    layout: Layout
    key_layout: Layout

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """``(num_ranks,)`` all (query, key) pairs of each rank."""
        return totals(self.layout.runs[self.run, 2], band.area(self.bands), self.layout.num_ranks)

    @property
    def rows_received(self) -> int:
        """The key rows that all ranks together need and do not own."""
        return int((self.remote[:, 2] - self.remote[:, 1]).sum())

    @cached_property
    def most_moved(self) -> int:
        """The most key rows that a rank receives, or sends, for which an exchange lasts."""
        rows, num_ranks = self.remote, self.layout.num_ranks
        received = totals(rows[:, 0], rows[:, 2] - rows[:, 1], num_ranks)
        piece, run = overlaps(rows[:, 1:], self.key_layout.runs[:, :2])
        start, stop, owner = self.key_layout.runs[run, :3].T
        sent = totals(owner, np.minimum(rows[piece, 2], stop) - np.maximum(rows[piece, 1], start), num_ranks)
        return int(max(received.max(), sent.max()))

    @cached_property
    def area_own(self) -> NDArray[np.int64]:
        """``(num_ranks,)`` the (query, key) pairs of each rank whose key is the rank's own."""
        rank = self.layout.runs[self.run, 2]
        own = lifted_runs(self.key_layout, self.key_layout.runs[:, 2])
        piece, tile = overlaps(lift(self.bands[:, band.K0 : band.D0], rank, self.key_layout), own)
        own_rows = unlift(own[tile], self.key_layout)
        local = band.clip(self.bands[piece], band.K0, own_rows[:, 1], own_rows[:, 2])
        return totals(rank[piece], band.area(local), self.layout.num_ranks)


def find_demand(slices: SliceTable, layout: Layout, key_layout: Layout | None = None) -> Demand:
    """Cut the mask along the runs of all ranks and collect the rows that each rank misses.

    Args:
        slices: the mask.
        layout: who owns which queries.
        key_layout: who owns which keys; None for ``layout``, as in self-attention.
    """
    key_layout = key_layout or layout
    whole, _ = band.shrink(slices.bands())
    runs = layout.runs
    owner, run = overlaps(whole[:, :2], runs[:, :2])
    pieces, kept = band.shrink(band.clip(whole[owner], band.Q0, runs[run, 0], runs[run, 1]))
    run = run[kept]
    rank = runs[run, 2]
    # One pass of interval algebra serves all ranks at once.
    keys = lift(pieces[:, band.K0 : band.D0], rank, key_layout)
    own = lifted_runs(key_layout, key_layout.runs[:, 2])
    remote = unlift(subtract(merge(keys), own), key_layout)
    return Demand(pieces, run, remote, layout, key_layout)


def lift(intervals: Intervals, group: NDArray[np.int64], layout: Layout) -> Intervals:
    """Shift each interval by its group, so far that intervals of different groups cannot even touch."""
    return intervals + (group * (layout.total + 1))[:, None]


def unlift(intervals: Intervals, layout: Layout) -> NDArray[np.int64]:
    """The inverse of :func:`lift`: rows ``(group, start, stop)``."""
    group = intervals[:, 0] // (layout.total + 1)
    return np.column_stack([group, lift(intervals, -group, layout)])


def lifted_runs(layout: Layout, group: NDArray[np.int64]) -> Intervals:
    """All runs, lifted by the ``group`` of each and sorted."""
    order = np.argsort(group, kind="stable")
    return lift(layout.runs[order, :2], group[order], layout)
