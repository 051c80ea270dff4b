# SPDX-License-Identifier: Apache-2.0
"""How many keys each row of a mask reads, kept by runs of rows: as much memory as there are bands, not rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable, distinct, expand_counts
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]

STEEP_PARTS = 1024
"""Into so many parts a run is cut of whose rows each reads several keys more than the one before."""


@dataclass(frozen=True, eq=False)
class RowAreas:
    """The areas of all rows of a sequence, in runs along which they change by equal steps.

    Attributes:
        cuts: ``(runs + 1,)`` the first row of each run, and the number of rows.
        first: ``(runs + 1,)`` the area of each run's first row; 0 at the end.
        step: ``(runs + 1,)`` how much more each row of the run reads than the one before; 0 at the end.
        area_up_to: ``(runs + 1,)`` the area of all rows before each cut.
    """

    cuts: Array
    first: Array
    step: Array
    area_up_to: Array

    @classmethod
    def of(cls, slices: SliceTable, total: int) -> "RowAreas":
        """Of the ``total`` rows of a mask.

        The keys of a row in a band end where the row's last diagonal does, or the band itself, and begin likewise.
        """
        bands, _ = band.shrink(slices.bands())
        q0, q1, k0, k1, d0, d1 = bands.T
        flat_from, flat_to = np.clip(k1 - d1, q0, q1), np.clip(k0 - d0, q0, q1)
        start, stop = np.concatenate([q0, flat_from, q0, flat_to]), np.concatenate([flat_from, q1, flat_to, q1])
        constant, slope = np.concatenate([d1 + 1, k1, -k0, -d0]), np.repeat([1, 0, 0, -1], len(bands))
        cuts = distinct(np.concatenate([start, stop, [0, total]]))
        step, at_row_zero = (_sum_over(cuts, start, stop, each) for each in (slope, constant))
        first = at_row_zero + step * cuts
        rows = np.diff(cuts)
        areas = first[:-1] * rows + step[:-1] * (rows * (rows - 1) // 2)
        return cls(cuts, first, step, np.append(0, np.cumsum(areas)))

    def before(self, rows: Array) -> Array:
        """The area of all rows before each of ``rows``, from 0 to the number of rows."""
        run = np.searchsorted(self.cuts, rows, side="right") - 1
        count = rows - self.cuts[run]
        return self.area_up_to[run] + self.first[run] * count + self.step[run] * (count * (count - 1) // 2)

    def of_rows(self) -> Array:
        """``(rows,)`` the area of each row."""
        run, place = expand_counts(np.diff(self.cuts))
        return self.first[run] + self.step[run] * place


@dataclass(frozen=True, eq=False)
class LightestRows:
    """The rows of a sequence from the lightest on: so many read each number of keys between two cuts.

    Attributes:
        cuts: ``(n + 1,)`` numbers of keys, increasing.
        density: ``(n + 1,)`` how many rows read each number of keys from a cut up to the next; 0 at the end.
        rows_up_to: ``(n + 1,)`` how many rows read fewer keys than each cut.
        area_up_to: ``(n + 1,)`` how many keys these read.
    """

    cuts: Array
    density: Array
    rows_up_to: Array
    area_up_to: Array

    @classmethod
    def of(cls, areas: RowAreas) -> "LightestRows":
        """Sort rows, run by run. Of runs with steps over 1, whole parts may count as light as their lightest row."""
        first, step, rows = areas.first[:-1], areas.step[:-1], np.diff(areas.cuts)
        low = np.minimum(first, first + step * (rows - 1))
        even, steep = np.abs(step) <= 1, np.abs(step) > 1
        parts = np.minimum(rows[steep], STEEP_PARTS)
        run, part = expand_counts(parts)
        begin, end = part * rows[steep][run] // parts[run], (part + 1) * rows[steep][run] // parts[run]
        start = np.concatenate([low[even], low[steep][run] + np.abs(step[steep])[run] * begin])
        stop = start + np.concatenate([np.where(step == 0, 1, rows)[even], np.ones_like(run)])
        number = np.concatenate([np.where(step == 0, rows, 1)[even], end - begin])
        cuts = distinct(np.concatenate([start, stop]))
        density = _sum_over(cuts, start, stop, number)
        levels = np.diff(cuts)
        rows_between = density[:-1] * levels
        area_between = rows_between * cuts[:-1] + density[:-1] * (levels * (levels - 1) // 2)
        return cls(cuts, density, *(np.append(0, np.cumsum(each)) for each in (rows_between, area_between)))

    def area(self, rows: NDArray[np.floating]) -> NDArray[np.floating]:
        """The area of so many of the lightest rows; a linear interpolation for parts of rows."""
        rows = np.clip(rows, 0, float(self.rows_up_to[-1]))
        piece = np.maximum(np.searchsorted(self.rows_up_to, rows) - 1, 0)
        density, first = np.maximum(self.density[piece], 1), self.cuts[piece]
        beyond = rows - self.rows_up_to[piece]
        levels = np.floor(beyond / density)
        whole = density * (first * levels + levels * (levels - 1) / 2)
        return self.area_up_to[piece] + whole + (beyond - density * levels) * (first + levels)


def _sum_over(cuts: Array, start: Array, stop: Array, value: Array) -> Array:
    """``(len(cuts),)`` the sum of the values of all intervals ``[start, stop)`` around each cut; all ends are cuts."""
    begin, end = (totals(np.searchsorted(cuts, ends), value, len(cuts)) for ends in (start, stop))
    return np.cumsum(begin - end)
