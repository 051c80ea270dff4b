# SPDX-License-Identifier: Apache-2.0
"""Shift all cuts within documents at once, so that fewer rows are received.

Ranks and the runs of rows that they hold stay as they are, but for runs that lose all their rows. Where the cuts
between them lie best is nearly a linear program (:mod:`magi_attention.plan.primal_dual`). A cut that is shifted up by a
row gives one to the run below it, and takes one from that above. If the run below is its rank's last one of the
document, the rank reads a row more. All ranks keep their numbers of rows, and the limits of area and of rows to send.

That a rank reads nothing of a document any more, or a video block less, is no matter of single rows. So the program is
solved several times from where the last one ended, with prices such that short runs lose rows the sooner, the fewer
they have and the more they cost, and that cuts a bit above the start of a block are shifted down to it.

Rows are taken to read their document from its first row on, as in :mod:`magi_attention.plan.swaps`. For other masks the
result may be no better.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.cells import Array, Cells
from magi_attention.plan.primal_dual import Floats, Prices, Program, solve
from magi_attention.plan.totals import totals

Flags = NDArray[np.bool_]


class Stage(NamedTuple):
    """How the program is solved once.

    Attributes:
        steps: how many steps of the method.
        pace: see :func:`magi_attention.plan.primal_dual.solve`, as a share of a rank's rows.
        margin: such a part of the area that ranks may have is left, as what comes out is not exact.
        vanishing: what short runs could save counts, spread over their rows, so many times.
        near: how far above a step in what rows read a cut may be to be shifted there, as a share of the step.
        between: what a row costs at cuts farther above.
    """

    steps: int
    pace: float
    margin: float
    vanishing: float
    near: float
    between: float


# At first, what is far from the best goes quickly; in the end, limits are kept, and cuts just above steps are shifted.
STAGES = (
    Stage(250, 0.00250, 0.0040, 0.7, 0.20, 0.7),
    Stage(190, 0.00164, 0.0033, 0.7, 0.17, 0.7),
    Stage(190, 0.00107, 0.0026, 0.7, 0.15, 0.7),
    Stage(190, 0.00070, 0.0019, 0.7, 0.13, 0.7),
    Stage(190, 0.00046, 0.0012, 0.7, 0.11, 0.7),
    Stage(190, 0.00030, 0.0005, 0.0, 0.10, 0.0),
)
# Runs of up to this share of a rank's rows may vanish; those of up to FEWEST rows do. KEPT rows remain of a run that
# costs nothing, since its rank has a higher one of the document, or that parts two of another rank: ranks that can
# shift rows between two runs of a document keep their limits.
SHORT, FEWEST, KEPT = 0.12, 4, 32
# In one stage, cuts are shifted by such a share of a rank's rows at most, for which a row counts DEAREST rows at most.
FARTHEST, DEAREST = 0.15, 8.0
# How fast the rows that are read rise at a cut is taken from so many cells on both sides. Where they rise by STEP
# cells' rows at once, that is a step.
WINDOW, STEP = 2, 4


class RowRuns(NamedTuple):
    """Runs of rows: where each starts, and the end of the sequence; its rank and its document."""

    begin: Array
    rank: Array
    document: Array


class Recut:
    """Dealt runs whose cuts are shifted.

    Args:
        cells: what was dealt.
        wanted: ``(num_ranks,)`` rows that each rank should have.
        limit: ``(num_ranks,)`` the most area that each rank should have.
        most_sent: the most rows that a rank should send.
    """

    def __init__(self, cells: Cells, wanted: Array, limit: Array, most_sent: float) -> None:
        self.cells, self.wanted, self.limit, self.most_sent = cells, wanted, limit, most_sent
        self.num_ranks = len(wanted)
        self.rows_per_rank = int(wanted[0])
        self.mean = max(int(cells.area_before[-1]), 1) / int(cells.cuts[-1])
        self.weight = np.diff(cells.area_before) / np.diff(cells.cuts) / self.mean
        self.end_cell = np.append(cells.first[1:], len(cells.document))
        rise = np.diff(cells.reach, prepend=0)
        rise[cells.first] = 0
        steps = np.flatnonzero(rise > STEP * cells.cuts[-1] / len(rise))
        self.step_document, self.step_size = cells.document[steps], rise[steps]
        start = cells.cuts[cells.first[self.step_document]]
        # Rows read themselves, so that those before the step end where they read to.
        self.step_place = np.clip(start + cells.reach[steps - 1], cells.cuts[steps], cells.cuts[steps + 1])
        self.has_steps = np.bincount(self.step_document, minlength=len(cells.first)) > 0

    def run(self, runs: RowRuns) -> RowRuns:
        """Shift cuts; returns what is left of the runs, with about as many rows for each rank as it should have."""
        prices = Prices(np.zeros((3, self.num_ranks)), np.zeros(len(runs.rank)))
        for stage in STAGES:
            shared = np.flatnonzero(np.bincount(runs.document)[runs.document] > 1)
            if not len(shared):
                return runs
            program = self._program(runs, shared, stage)
            pace = stage.pace * self.rows_per_rank
            shift, found = solve(program, prices._replace(of_run=prices.of_run[shared]), stage.steps, pace)
            begin = runs.begin.astype(np.float64)
            begin[shared[1:]] += shift
            of_run = prices.of_run.copy()
            of_run[shared] = found.of_run
            runs, kept = _without_short(runs, _in_order(runs, begin))
            prices = Prices(found.of_rank, of_run[kept])
        return runs

    def _program(self, runs: RowRuns, shared: Array, stage: Stage) -> Program:
        """The program for runs of documents that several ranks hold."""
        num_ranks, cells = self.num_ranks, self.cells
        rows = np.diff(runs.begin)
        need = self.wanted - totals(runs.rank, rows, num_ranks)
        load = totals(runs.rank, np.diff(cells.area_of_rows(runs.begin)), num_ranks)
        slack = (self.limit * (1 - stage.margin) - load) / self.mean
        rank, document, length = runs.rank[shared], runs.document[shared], rows[shared].astype(np.float64)
        end = runs.begin[shared + 1]
        place, is_inner = end[:-1], document[1:] == document[:-1]
        is_top, saved = _ranks_last(rank, document, cells.reach[cells.of_rows(end - 1)])
        readers = _other_readers(is_top, document)
        sent = np.bincount(rank, length * readers, num_ranks)
        cost, least, most = self._costs(stage, place, document[:-1], is_top[:-1])
        is_needed = ~is_top | _is_between(rank, document)
        saved[is_needed | (length >= SHORT * self.rows_per_rank)] = 0
        worth = np.clip(stage.vanishing * saved / np.maximum(length, 1), 0, DEAREST)
        cost += worth[:-1] - worth[1:]
        length -= np.where(is_needed, np.minimum(length, KEPT), 0)
        weight = self.weight[cells.of_rows(place - 1)]
        bounds = np.stack([need, slack, np.maximum(self.most_sent - sent, 0)])
        return Program(rank, length, readers, weight, cost, least * is_inner, most * is_inner, bounds)

    def _costs(self, stage: Stage, place: Array, document: Array, is_top: Flags) -> tuple[Floats, Floats, Floats]:
        """What shifting cuts by a row costs those below them, and how far they may be shifted down and up."""
        cells = self.cells
        cell = cells.of_rows(place)
        low = np.maximum(cell - WINDOW, cells.first[document])
        high = np.minimum(cell + WINDOW, self.end_cell[document] - 1)
        rise = cells.reach[high] - cells.reach[low]
        cost = np.clip(rise / np.maximum(cells.cuts[high] - cells.cuts[low], 1), 0, 1) * is_top
        most = np.full(len(place), FARTHEST * self.rows_per_rank)
        least = -most
        stepped = np.flatnonzero(is_top & self.has_steps[document])
        if len(stepped):
            place, document = place[stepped], document[stepped]
            step = np.searchsorted(self.step_place, place)
            below, above = np.maximum(step - 1, 0), np.minimum(step, len(self.step_place) - 1)
            has_below = (step > 0) & (self.step_document[below] == document)
            has_above = (step <= above) & (self.step_document[above] == document)
            down = np.where(has_below, place - self.step_place[below], np.inf)
            up = np.where(has_above, self.step_place[above] - place, np.inf)
            size = self.step_size[below]
            worth = np.minimum(size / np.maximum(down, 1), DEAREST)
            cost[stepped] = np.where(down <= stage.near * size, worth, stage.between * has_below)
            least[stepped], most[stepped] = np.maximum(least[stepped], -down), np.minimum(most[stepped], up)
        return cost, least, most


def _ranks_last(rank: Array, document: Array, reads: Array) -> tuple[Flags, Array]:
    """Which runs are their rank's last of the document, and how many rows less it reads without each of them."""
    order = np.lexsort((rank, document))
    follows = (rank[order[1:]] == rank[order[:-1]]) & (document[order[1:]] == document[order[:-1]])
    is_top, saved = np.zeros(len(rank), np.bool_), reads.copy()
    is_top[order[np.append(~follows, True)]] = True
    saved[order[1:][follows]] -= reads[order[:-1][follows]]
    return is_top, saved * is_top


def _is_between(rank: Array, document: Array) -> Flags:
    """Which runs lie between two of the same rank that has no others."""
    is_between = np.zeros(len(rank), np.bool_)
    has_two = np.bincount(rank)[rank[:-2]] == 2
    is_between[1:-1] = (rank[:-2] == rank[2:]) & (document[:-2] == document[2:]) & has_two
    return is_between


def _other_readers(is_top: Flags, document: Array) -> Floats:
    """How many other ranks read each run: those that hold it or a higher one of its document."""
    number = np.cumsum(is_top[::-1])[::-1]
    is_last = np.append(document[1:] != document[:-1], True)
    after = np.append(number, 0)[np.flatnonzero(is_last) + 1]
    return (number - after[np.cumsum(is_last) - is_last] - 1).astype(np.float64)


def _in_order(runs: RowRuns, begin: Floats) -> Array:
    """Starts of runs as whole numbers, in order and within the documents."""
    is_first = np.append(True, runs.document[1:] != runs.document[:-1])
    start = runs.begin[:-1][is_first]
    index = np.cumsum(is_first) - 1
    begin[:-1] = np.clip(begin[:-1], start[index], np.append(start[1:], runs.begin[-1])[index])
    begin = (np.maximum.accumulate(begin) + np.minimum.accumulate(begin[::-1])[::-1]) / 2
    return np.rint(begin).astype(np.int64)


def _without_short(runs: RowRuns, begin: Array) -> tuple[RowRuns, Array]:
    """The runs, with new starts, but for those of few rows, and which are left.

    Their rows go to the run before, or after. Of each document a run is left.
    """
    rows = np.diff(begin)
    longest = np.zeros(int(runs.document[-1]) + 1, np.int64)
    np.maximum.at(longest, runs.document, rows)
    kept = np.flatnonzero((rows > FEWEST) | (rows == longest[runs.document]))
    rank, document = runs.rank[kept], runs.document[kept]
    is_first = np.append(True, runs.document[1:] != runs.document[:-1])
    starts, labels = runs.begin[:-1][is_first], runs.document[is_first]
    new = np.append(True, document[1:] != document[:-1])
    start = np.where(new, starts[np.searchsorted(labels, document)], begin[kept])
    new[1:] |= rank[1:] != rank[:-1]
    return RowRuns(np.append(start[new], begin[-1]), rank[new], document[new]), kept[new]
