# SPDX-License-Identifier: Apache-2.0
"""From a deal of cells to runs of rows: each rank gets exactly as many as it should have."""

from functools import partial
from typing import NamedTuple

import numpy as np

from magi_attention.plan.cells import Array, Cells
from magi_attention.plan.chunks import measure_areas
from magi_attention.plan.demand import find_demand
from magi_attention.plan.layout import Layout
from magi_attention.plan.recut import Recut, RowRuns
from magi_attention.plan.settle import Settling
from magi_attention.plan.sharpen import BEYOND, sharpen
from magi_attention.plan.totals import totals


class Limits(NamedTuple):
    """What ranks may have at most.

    Attributes:
        area: the most mask area of a rank.
        of_ranks: ``(num_ranks,)`` the most that each should have; None where areas are to be even.
        most_sent: the most rows that a rank should send.
    """

    area: int
    of_ranks: Array | None
    most_sent: float


class Held(NamedTuple):
    """Runs of rows.

    Attributes:
        begin: ``(n + 1,)`` where they start, and the end of the sequence.
        rank: ``(n,)`` the rank of each.
        load: ``(num_ranks,)`` the area of each rank.
    """

    begin: Array
    rank: Array
    load: Array


def hold_exact_rows(cells: Cells, owner: Array, wanted: Array, limits: Limits, *, is_recut: bool) -> Held:
    """Shift the cuts between dealt cells.

    Args:
        cells: the cells.
        owner: ``(num_cells,)`` the rank of each.
        wanted: ``(num_ranks,)`` rows that each rank should have.
        limits: what ranks may have.
        is_recut: whether all cuts are shifted once more, so that fewer rows are received.
    """
    first = np.flatnonzero((np.diff(owner, prepend=-1) != 0) | (np.diff(cells.document, prepend=-1) != 0))
    begin, area = np.append(cells.cuts[first], cells.cuts[-1]), np.full(len(wanted), limits.area)
    held = _settle(cells, begin, owner[first], wanted, area)
    if limits.of_ranks is None:
        return held
    if not is_recut:
        return _sharpen(cells, held, limits.of_ranks)
    held = _sharpen(cells, _measure(cells, held), limits.of_ranks)
    recut = Recut(cells, wanted, area, limits.most_sent)
    runs = recut.run(RowRuns(held.begin, held.rank, cells.document[cells.of_rows(held.begin[:-1])]))
    about = _settle(cells, runs.begin, runs.rank, wanted, area)
    other = _measure(cells, about)
    peak = max(int(held.load.max()), limits.area + limits.area // BEYOND)
    if other.load.max() > peak:
        # Rows of one cell may weigh less or more than others.
        about = _settle(cells, about.begin, about.rank, wanted, area - (other.load - about.load))
        other = _measure(cells, about)
    other = _sharpen(cells, other, area)
    return other if other.load.max() <= peak and received(cells, other) < received(cells, held) else held


def received(cells: Cells, held: Held) -> int:
    """The key rows that all ranks together need and do not own."""
    total = cells.work.total
    layout = Layout(total, total, 1, len(held.load), held.rank, held.begin)
    return find_demand(cells.work.slices, layout).rows_received


def _settle(cells: Cells, begin: Array, rank: Array, wanted: Array, limit: Array) -> Held:
    """The same runs with exact numbers of rows, and about their areas."""
    settling = Settling(cells, begin, rank, wanted, limit)
    begin, rank = settling.run()
    kept = np.flatnonzero(np.diff(begin))
    return Held(np.append(begin[kept], begin[-1]), rank[kept], settling.load)


def _measure(cells: Cells, held: Held) -> Held:
    """The same with exact areas."""
    return held._replace(load=totals(held.rank, measure_areas(cells.work.bands, held.begin), len(held.load)))


def _sharpen(cells: Cells, held: Held, limit: Array) -> Held:
    """The same with areas that are used up."""
    document = cells.document[cells.of_rows(held.begin[:-1])]
    measure = partial(measure_areas, cells.work.bands)
    begin, load = sharpen(held.begin, held.rank, document, held.load, limit, cells.area_of_rows, measure)
    return Held(begin, held.rank, load)
