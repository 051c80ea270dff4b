# SPDX-License-Identifier: Apache-2.0
"""Which of a rank's queries to compute with its own rows before others' rows have come: those that cost the least."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import Intervals, intersect, merge, subtract
from magi_attention.plan.build import Plan, Stage, slices_in
from magi_attention.runtime.costs import LOSS_OF_WINDOW, Costs

LEAST_EARLY_ROWS, LEAST_EARLY_SHARE = 1024, 8
"""A run of queries that is computed early has so many rows, and at least one in so many of the rank's."""

WINDOW_SLACK, MOST_OF_WINDOW = 1.5, 0.5
"""A window has so many times the work that hides the travel, with at most this share of the rank's queries."""


def choose_early(plan: Plan, stage: Stage, num_queries: int, costs: Costs, with_rows: Costs | None) -> Intervals:
    """The runs of queries to compute with own rows before the stage's rows have come: all, none, or some.

    ``with_rows`` are the costs of the backward pass to come: where the received rows are kept apart from the own ones,
    it can't compute both in one kernel.
    """
    everything, nothing = np.array([(0, num_queries)]), np.empty((0, 2), np.int64)
    if not len(stage.slices):
        return everything
    overheads = _Overheads(
        costs=costs,
        own=slices_in(plan.bands, plan.key_layout.runs_of(plan.rank)).bands(),
        num_own=int(plan.key_layout.rows_per_rank[plan.rank]),
        queries=everything,
        in_need=merge(stage.slices.rows[:, :2]),
        fetch=travel_seconds(stage, costs),
    )
    apart_later = 0.0 if with_rows is None else max(with_rows.regular - travel_seconds(stage, with_rows), 0.0)
    found = [(overheads.of_all() + apart_later, everything), (overheads.of_some(nothing), nothing)]
    if not costs.is_short(int(band.area(plan.bands).sum())):
        found += [(overheads.of_some(each), each) for each in overheads.independent_runs()]
        found += [(overheads.of_window(each), each) for each in overheads.windows()]
    return min(found, key=lambda each: each[0])[1]


def travel_seconds(stage: Stage, costs: Costs) -> float:
    """Seconds of a stage's exchange. It ends when all that it brings has come, and all that it takes has gone."""
    assert stage.exchange is not None
    num_moved = max(stage.num_received, *(sum(table.send_counts) for table in stage.exchange.tables))
    return costs.exchange + num_moved * costs.fetched_row


def in_rows(bands: Bands, rows: Intervals) -> Bands:
    """The bands, cut to some runs of rows."""
    cuts = [band.shrink(band.clip(bands, band.Q0, start, stop))[0] for start, stop in rows.tolist()]
    return np.concatenate([band.empty_bands(), *cuts])


@dataclass(frozen=True, eq=False)
class _Overheads:
    """Seconds that a pass takes longer than the work of its pairs, by the queries that are computed early.

    Attributes:
        costs: of the pass.
        own: what the rank computes with its own rows.
        num_own: its own key rows.
        queries: the run of all its queries.
        in_need: the runs of queries that need received rows.
        fetch: seconds for which these travel.
    """

    costs: Costs
    own: Bands
    num_own: int
    queries: Intervals
    in_need: Intervals
    fetch: float

    def of_all(self) -> float:
        """All queries early; what the received rows add to some, in a kernel of their own, is merged."""
        num_merged = int(self.in_need[-1, 1] - self.in_need[0, 0])
        return self._exposed(self._work(self.queries)) + num_merged * self.costs.merged_row + 2 * self.costs.call

    def of_some(self, early: Intervals) -> float:
        """Some runs of queries early, and the others with own and received rows at once."""
        return self._of_parts(early, self._work(early), lost=0.0)

    def of_window(self, early: Intervals) -> float:
        """A run of few queries early, which leave much of a GPU idle."""
        work = self._work(early)
        return self._of_parts(early, work, lost=LOSS_OF_WINDOW * min(work, WINDOW_SLACK * self.fetch))

    def _of_parts(self, early: Intervals, work: float, lost: float) -> float:
        merged = intersect(early, self.in_need)[0]
        num_merged = int((merged[:, 1] - merged[:, 0]).sum())
        num_calls = len(early) + len(subtract(self.queries, early)) + (len(merged) > 0)
        num_summed = self.num_own if len(early) else 0
        merging = num_merged * self.costs.merged_row + (self.costs.merge if num_merged else 0.0)
        calling = num_summed * self.costs.summed_row + num_calls * self.costs.call
        return self._exposed(work) + merging + calling + lost

    def _work(self, early: Intervals) -> float:
        return int(band.area(in_rows(self.own, early)).sum()) * self.costs.pair

    def _exposed(self, work: float) -> float:
        """For how long rows still travel when the early queries are done."""
        return max(self.fetch - work, 0.0)

    def independent_runs(self) -> list[Intervals]:
        """The longest run of queries that need no received rows, and all such runs, if they are long."""
        long = max(LEAST_EARLY_ROWS, int(self.queries[0, 1]) // LEAST_EARLY_SHARE)
        independent = subtract(self.queries, self.in_need)
        independent = independent[independent[:, 1] - independent[:, 0] >= long]
        longest = independent[np.argsort(independent[:, 0] - independent[:, 1], kind="stable")[:1]]
        return [longest, independent]

    def windows(self) -> list[Intervals]:
        """Runs of first queries and of last ones, where a few of them pay.

        These are the shortest that hide the travel, or the longest there may be, and others half as long.
        """
        if self.costs.window is None:
            return []
        num_queries, pairs = int(self.queries[0, 1]), WINDOW_SLACK * self.fetch / self.costs.pair
        borders = np.arange(0, int(MOST_OF_WINDOW * num_queries) + 1, self.costs.window)
        total = int(band.area(self.own).sum())

        def pairs_of_first(rows: int) -> int:
            return int(band.area_above(self.own, np.array(rows)).sum())

        def pairs_of_last(rows: int) -> int:
            return total - pairs_of_first(num_queries - rows)

        first, last = (
            min(bisect_left(borders, pairs, key=pairs_of), len(borders) - 1)
            for pairs_of in (pairs_of_first, pairs_of_last)
        )
        windows = [(0, int(borders[steps])) for steps in {first, first // 2}]
        windows += [(num_queries - int(borders[steps]), num_queries) for steps in {last, last // 2}]
        return [np.array([each]) for each in windows if each[0] < each[1]]
