# SPDX-License-Identifier: Apache-2.0
"""A lower bound on the key rows that ranks receive, proved by prices of rows.

What a rank holds is a set S of ``total / num_ranks`` rows whose areas sum up to at most ``1 + tolerance`` times the
mean. Of every document it reads at least as many keys as the row of S that reads most of them, its *reach*. The ranks
own each key once, so they receive no less than the sum of all reaches less the number of keys.

Let every row j have a price p_j, and each of a document's x-th keys, up to its longest reach, a price e_x from 0 to 1.
At least m_x ranks reach so far, as all rows that read at least x keys must lie somewhere
(:class:`plan.bounds.Ranks`). The ranks hold every row once, so that the sum of their reaches is at least

    sum p_j + sum e_x m_x + num_ranks * min over S of (reaches of S - sum p_j of its rows - sum e_x up to its reach),

whatever the prices: this is weak duality for the linear program that covers all rows by ``num_ranks`` sets S (the
configuration program), with numbers of ranks rounded up for each key. Prices therefore prove a bound; that they are
good ones need not be proved. Finding them takes a solver of linear programs and minutes
(``benchmarks/find_prices.py``), checking them a few seconds.

The minimum over S is bounded from below in turn. Documents are cut into *cells*, rows that read numbers of keys next
to each other, and S reaches into one cell of each document of which it has rows. Let the *anchor* be the document for
which that cell starts farthest. For each interval of the anchor's reach there is a multiplier for the number of rows
and one for the area; with them, the minimum is a sum over documents, none of which is reached farther than the anchor.
Again all multipliers are right, and only good ones give much. But for the limits on rows and area, every document would
best lie on one rank; the anchor's multipliers make area the dearer the farther it reaches, so that no other document
is worth much to the rank.

Within a cell prices are constant, and rows are treated as if they could be divided: their gain is an integral, which is
no less than the sum over rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan.bounds import Ranks
from magi_attention.plan.documents import component_starts
from magi_attention.plan.row_areas import RowAreas

Array = NDArray[np.int64]
Floats = NDArray[np.float64]

# A cell spans this share of the keys that its rows read, between the longest reach divided by these.
RELATIVE, LEAST_PART, MOST_PART = 0.025, 1536, 256
# Intervals of reach are treated so many at a time, to bound the memory.
TOGETHER = 32
# Instead of no price for area, so that it can be divided by.
LEAST_OF_AREA = 1e-12
# What rounding may have added to the bound, as a share of all reaches.
ROUNDING = 1e-8


@dataclass(frozen=True)
class DocumentPrices:
    """Prices for some documents, of those sorted from the longest reach to the shortest.

    Attributes:
        stop: the place after the last of these documents.
        areas: increasing numbers of keys that a row reads.
        rows: the price of a row that reads so many keys, linear between, constant beyond.
        reaches: ends of intervals of the anchor's reach, increasing; the last one stands for all that is beyond.
        of_rows: the multiplier for the number of rows, for each interval.
        of_area: that for the area, not negative.
        places: ends of intervals of key places, increasing; the last one stands for all that is beyond.
        keys: the price of a key in each, between 0 and 1.
    """

    stop: int
    areas: Sequence[float]
    rows: Sequence[float]
    reaches: Sequence[float]
    of_rows: Sequence[float]
    of_area: Sequence[float]
    places: Sequence[float]
    keys: Sequence[float]


def priced_lower_bound(
    slices: SliceTable, total: int, num_ranks: int, prices: Sequence[DocumentPrices], tolerance: float = 0.02
) -> int:
    """Bound from below the key rows that all ranks together receive in self-attention.

    Args:
        slices: the mask; no pair covered twice.
        total: rows of the sequence, equally many on each rank.
        num_ranks: ranks of the group.
        prices: of all documents; any prices are right.
        tolerance: a rank's area may exceed the mean by this share.

    Returns:
        A number of rows that no deal of the rows to the ranks stays below, whatever its chunks.

    Raises:
        ValueError: if the prices are not of all documents, or break the rules of :class:`DocumentPrices`.
    """
    program = RowProgram(slices, total, num_ranks, tolerance)
    return max(0, math.ceil(program.prove(program.lay_out(prices))))


def locate_rows(slices: SliceTable, total: int) -> tuple[Array, Array]:
    """``(total,)`` the document of each row, from the one with the longest reach on, and how many keys it reads."""
    area = RowAreas.of(slices, total).of_rows()
    starts = component_starts(slices)
    of_row = np.maximum(np.searchsorted(starts, np.arange(total), side="right") - 1, 0)
    longest = np.zeros(max(len(starts), 1), np.int64)
    np.maximum.at(longest, of_row, area)
    place = np.empty_like(longest)
    place[np.argsort(-longest, kind="stable")] = np.arange(len(longest))
    return place[of_row], area


@dataclass(eq=False)
class CellPrices:
    """Prices by cell and by interval of the anchor's reach; see :class:`DocumentPrices`.

    Attributes:
        rows: ``(num_cells,)`` price of a row.
        keys: ``(num_cells,)`` price of a key place.
        interval: ``(num_cells,)`` the interval of reach of an anchor that reaches into the cell.
        of_rows: ``(num_intervals,)``.
        of_area: ``(num_intervals,)``; positive.
    """

    rows: Floats
    keys: Floats
    interval: Array
    of_rows: Floats
    of_area: Floats


class RowProgram:
    """The cells of all documents, and what sets of rows gain at given prices.

    Attributes:
        first, times: ``(num_cells,)`` a cell has ``times`` rows that read ``first`` keys, as many that read one more,
            and so on.
        low, high: ``(num_cells,)`` the cell's ends on the axis of areas, half a key beyond its rows.
        document: ``(num_cells,)`` of each cell, from the one with the longest reach on.
        start: ``(num_documents,)`` the first cell of each.
        places: ``(num_cells,)`` the key places between the reach of the cell before and the cell's longest.
        readers: ``(num_cells,)`` by how many ranks these are reached at least, summed over the places.
        most_rows, most_area: of a rank.
    """

    def __init__(self, slices: SliceTable, total: int, num_ranks: int, tolerance: float) -> None:
        document, area = locate_rows(slices, total)
        self.total, self.num_ranks = total, num_ranks
        self.ranks = Ranks.of(RowAreas.of(slices, total), num_ranks, tolerance)
        self.most_rows, self.most_area = self.ranks.rows, self.ranks.most
        beyond = int(area.max(initial=0)) + 1
        document, area = np.divmod(np.sort(document * beyond + area), beyond)
        self._cut(document, area)
        self._count_readers(document, area)

    def _cut(self, document: Array, area: Array) -> None:
        """Cut the rows, sorted by document and area, into cells."""
        new = np.flatnonzero((np.diff(document, prepend=-1) != 0) | (np.diff(area, prepend=-1) != 0))
        times = np.diff(np.append(new, len(area)))
        document, value = document[new], area[new]
        regular = (np.diff(document) == 0) & (np.diff(value) == 1) & (np.diff(times) == 0)
        run = np.append(0, np.flatnonzero(~regular) + 1)
        longest = int(value.max())
        least, most = max(1, longest // LEAST_PART), max(1, longest // MOST_PART)
        cuts = []
        for begin, end in zip(run.tolist(), np.append(run[1:], len(value)).tolist(), strict=True):
            while begin < end:
                cuts.append(begin)
                begin += min(max(int(value[begin] * RELATIVE), least), most)
        first = np.array(cuts)
        last = np.append(first[1:], len(value)) - 1
        self.first, self.times, self.document = value[first], times[first], document[first]
        self.low, self.high = value[first] - 0.5, value[last] + 0.5
        self.start = np.flatnonzero(np.diff(self.document, prepend=-1))
        before = np.append(0, value[last[:-1]])
        before[self.start] = 0
        self.before, self.places = before, value[last] - before
        self.num_rows = self.times * (last - first + 1)

    def _count_readers(self, document: Array, area: Array) -> None:
        """How many ranks at least reach each key place, by the rows that read that many keys."""
        ends = np.searchsorted(document, np.arange(len(self.start) + 1))
        self.readers = self.places.copy()
        stops = np.append(self.start[1:], len(self.first))
        for begin, end, low, high in zip(ends[:-1], ends[1:], self.start, stops, strict=True):
            rows = area[begin:end]
            weight = np.append(np.cumsum(rows[::-1])[::-1], 0)
            if not weight[0] or self.ranks.needed(*np.array([[len(rows)], [len(rows)], weight[:1]]))[0] == 1:
                continue
            below = np.searchsorted(rows, np.arange(1, rows[-1] + 1))
            count = len(rows) - below
            reached = np.append(0, np.cumsum(self.ranks.needed(count, count, weight[below])))
            top = self.before[low:high] + self.places[low:high]
            self.readers[low:high] = reached[top] - reached[self.before[low:high]]

    def lay_out(self, prices: Sequence[DocumentPrices]) -> CellPrices:
        """Prices by cell."""
        if not prices or prices[-1].stop != len(self.start):
            raise ValueError(f"prices must be of all {len(self.start)} documents")
        middle, top = (self.low + self.high) / 2, self.before + self.places
        rows, keys, interval = np.zeros_like(middle), np.zeros_like(middle), np.zeros(len(middle), np.int64)
        begin = intervals = 0
        for each in prices:
            stop = int(np.searchsorted(self.document, each.stop))
            mine = slice(begin, stop)
            rows[mine] = np.interp(middle[mine], each.areas, each.rows)
            keys[mine] = np.array(each.keys)[np.searchsorted(each.places[:-1], top[mine])]
            interval[mine] = intervals + np.searchsorted(each.reaches[:-1], middle[mine])
            begin, intervals = stop, intervals + len(each.reaches)
        of_rows, of_area = (np.concatenate([getattr(p, name) for p in prices]) for name in ("of_rows", "of_area"))
        if not (of_area >= 0).all() or not ((keys >= 0) & (keys <= 1)).all():
            raise ValueError("multipliers of areas must not be negative, and prices of keys lie between 0 and 1")
        return CellPrices(rows, keys, interval, of_rows, np.maximum(of_area, LEAST_OF_AREA))

    def prove(self, prices: CellPrices) -> float:
        """The bound on received rows that the prices prove, less what rounding may have added; perhaps below 0."""
        intervals = np.unique(prices.interval)
        least = min(
            float(self.least_cost(prices, intervals[some : some + TOGETHER]).min())
            for some in range(0, len(intervals), TOGETHER)
        )
        paid = float((prices.rows * self.num_rows).sum()), float((prices.keys * self.readers).sum())
        size = abs(least) * self.num_ranks + float((np.abs(prices.rows) * self.num_rows).sum()) + paid[1]
        return self.num_ranks * least + sum(paid) - self.total - ROUNDING * size

    def least_cost(self, prices: CellPrices, intervals: Array) -> Floats:
        """The least reaches less prices of a rank's rows and key places, for each of some intervals of reach."""
        gains = Gains(self, prices, intervals)
        fixed = prices.of_rows[intervals] * self.most_rows + prices.of_area[intervals] * self.most_area
        return -gains.of_documents.sum(axis=1) - gains.of_anchor - fixed


class Gains:
    """What a rank gains at most by its rows of each document, their prices less what they cost.

    Attributes:
        held: ``(num_intervals, num_cells)`` up to where the rows of each cell are worth holding.
        ends: ``(num_intervals, num_cells)`` up to where, if the rank reaches no farther than this cell.
        reach: ``(num_intervals, num_cells)`` how far it reaches then.
        by_cell: ``(num_intervals, num_cells)`` what it gains if it reaches into this cell and no farther.
        allowed: ``(num_intervals, num_cells)`` the same, -inf where that is farther than the anchor's interval.
        of_documents: ``(num_intervals, num_documents)`` the most of each document, at least 0.
        anchor: ``(num_intervals,)`` the best cell in which the anchor ends.
        of_anchor: ``(num_intervals,)`` what it gains more than its document would without being the anchor.
    """

    def __init__(self, program: RowProgram, prices: CellPrices, intervals: Array) -> None:
        low, high, start, document, times = (
            program.low,
            program.high,
            program.start,
            program.document,
            program.times,
        )
        worth = prices.rows - prices.of_rows[intervals, None]
        dear = prices.of_area[intervals, None]

        def gain(until: Floats) -> Floats:
            return times * (until - low) * (worth - dear * (until + low) / 2)

        self.held = np.clip(worth / dear, low, high)
        whole = gain(self.held)
        before = np.cumsum(whole, axis=1) - whole
        before -= before[:, start[document]]
        # Reaching one key farther costs `slope`; the gain per key falls within a cell.
        slope = 1 - prices.keys
        paid = np.cumsum(slope * program.places) - slope * program.places
        paid -= paid[start[document]]
        farthest = np.clip((worth - slope / times) / dear, low, high)
        self.ends = np.maximum(farthest, np.minimum(self.held, program.first + 0.5))
        self.reach = np.maximum(self.ends - 0.5, program.first)
        self.by_cell = before + gain(self.ends) - paid - slope * (self.reach - program.before)
        is_anchor = prices.interval == intervals[:, None]
        limit = np.where(is_anchor, program.first, -1).max(axis=1)
        self.allowed = np.where(program.first <= limit[:, None], self.by_cell, -np.inf)
        self.of_documents = np.maximum(np.maximum.reduceat(self.allowed, start, axis=1), 0)
        more = np.where(is_anchor, self.by_cell - self.of_documents[:, document], -np.inf)
        self.anchor = more.argmax(axis=1)
        self.of_anchor = more[np.arange(len(intervals)), self.anchor]
