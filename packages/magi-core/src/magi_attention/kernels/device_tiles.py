# SPDX-License-Identifier: Apache-2.0
"""Tile lists and interval tables on a device, as int32: small things are uploaded, large ones made there.

Of tile lists only the runs are uploaded, a few numbers for each block of queries; the indices are filled in on the
device. Interval tables come from the host while they are short, and from torch operations on the device otherwise. Both
ways give the same tables.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.kernels.tiles import RowIntervals, join_side_by_side, row_intervals

MOST_HOST_ROWS = 1 << 16
"""How many rows the host finds the intervals of; the device does so for more."""


class DeviceLists(NamedTuple):
    """Ascending indices per row, padded: counts ``[rows]`` and indices ``[rows, width]``, zero after each row's end."""

    counts: Tensor
    indices: Tensor


class DeviceIntervals(NamedTuple):
    """:class:`magi_attention.kernels.tiles.RowIntervals`: offsets ``[rows + 1]``, starts and stops ``[total]``."""

    offsets: Tensor
    starts: Tensor
    stops: Tensor

    @property
    def counts(self) -> Tensor:
        """How many intervals each row has."""
        return self.offsets.diff()


def upload(table: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy integers to the device as int32, the dtype of all tables that kernels read."""
    return torch.from_numpy(table.astype(np.int32)).to(device)


def upload_intervals(intervals: RowIntervals, device: torch.device) -> DeviceIntervals:
    """Copy intervals to the device."""
    return DeviceIntervals(*(upload(each, device) for each in (intervals.offsets, intervals.starts, intervals.stops)))


def padded_lists(
    runs: RowIntervals, device: torch.device, *, width: int | None = None, num_rows: int | None = None
) -> DeviceLists:
    """Expand runs into padded lists, on the device.

    Args:
        runs: the indices of each row.
        device: where to build the lists.
        width: the lists' width, at least as large as the largest number of indices of a row, which is the default.
        num_rows: how many rows to return, those beyond the runs' own empty; by default the runs' own.
    """
    missing = 0 if num_rows is None else num_rows - len(runs.counts)
    sizes, runs_per_row = (np.pad(each, (0, missing)) for each in (runs.sizes, runs.counts))
    width = int(sizes.max(initial=0)) if width is None else width
    # Each index is its place in the row plus what its run is shifted by. A last run of each row covers the padding.
    row_end = np.cumsum(runs_per_row)
    length = np.insert(runs.stops - runs.starts, row_end, width - sizes)
    own = np.insert(np.ones(len(runs.starts), bool), row_end, False)
    place = np.cumsum(length) - length - np.repeat(np.arange(len(sizes)) * width, runs_per_row + 1)
    shift = np.zeros(len(length), np.int64)
    shift[own] = runs.starts - place[own]
    counts = upload(sizes, device)
    shifts = _repeat(upload(shift, device), upload(length, device), len(sizes) * width).view(len(sizes), width)
    column = torch.arange(width, dtype=torch.int32, device=device)
    return DeviceLists(counts, shifts.add_(column).masked_fill_(column >= counts.unsqueeze(1), 0))


def interval_table(bands: Bands, num_rows: int, device: torch.device) -> DeviceIntervals:
    """List the key intervals of every query, or of every key its query intervals, if given the transposed bands.

    Made on the host for up to ``MOST_HOST_ROWS`` rows, otherwise on the device.
    """
    if num_rows > MOST_HOST_ROWS:
        return device_row_intervals(bands, num_rows, device)
    return upload_intervals(row_intervals(bands, num_rows), device)


def device_row_intervals(bands: Bands, num_rows: int, device: torch.device) -> DeviceIntervals:
    """:func:`magi_attention.kernels.tiles.row_intervals` in torch operations. Waits for the device."""
    bands = join_side_by_side(bands, by_row=True)
    table = torch.from_numpy(bands).to(device)
    heights = bands[:, band.Q1] - bands[:, band.Q0]
    total, span = int(heights.sum()), int(bands[:, band.K1].max(initial=0)) + 1
    before = torch.from_numpy(np.cumsum(heights) - heights).to(device)
    owner = _repeat(torch.arange(len(bands), device=device), table[:, band.Q1] - table[:, band.Q0], total)
    row = torch.arange(total, device=device) + (table[:, band.Q0] - before)[owner]
    q_start = torch.maximum(table[owner, band.K0], row + table[owner, band.D0])
    q_stop = torch.minimum(table[owner, band.K1], row + table[owner, band.D1] + 1)
    # One ascending axis for all rows, with a gap between the rows so that their intervals cannot touch.
    starts, order = (row * span + q_start).sort()
    reached = (row * span + q_stop)[order].cummax(0).values
    opens = torch.ones(total, dtype=torch.bool, device=device)
    opens[1:] = starts[1:] > reached[:-1]
    number = opens.nonzero()[:, 0]
    closes = torch.cat([number[1:] - 1, number.new_full((min(total, 1),), total - 1)])
    base = starts[number] // span * span
    counts = torch.bincount(base // span, minlength=num_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return DeviceIntervals(*(each.int() for each in (offsets, starts[number] - base, reached[closes] - base)))


def interval_bounds(intervals: DeviceIntervals, first: int, last: int, width: int, num_columns: int) -> Tensor:
    """Tabulate the intervals with numbers ``first`` to ``last`` (exclusive) in their rows.

    Returns ``[2 * width, num_columns]``: row 2i holds where interval ``first + i`` of each row starts, row 2i + 1 where
    it stops, both 0 where there is none.
    """
    starts, stops = intervals.starts, intervals.stops
    bounds = starts.new_zeros(2 * width, num_columns)
    counts, begin = intervals.counts, intervals.offsets[:-1]
    for number in range(first, last):
        there = counts > number
        place = torch.where(there, begin + number, 0)
        for which, ends in enumerate((starts, stops)):
            bounds[2 * (number - first) + which, : len(counts)] = torch.where(there, ends[place], 0)
    return bounds


def _repeat(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """``repeat_interleave`` without asking the device for the total."""
    return torch.repeat_interleave(values, counts, output_size=total)
