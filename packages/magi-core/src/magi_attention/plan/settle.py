# SPDX-License-Identifier: Apache-2.0
"""Shift the cuts within documents by some rows, so that all ranks get exactly as many rows as they should.

Ranks that hold equally many cells of slightly different lengths hold slightly different numbers of rows. If two ranks
hold parts of one document, one part can grow by the rows by which the other shrinks, while what lies between is
shifted: hardly any row more travels, and areas change little if both parts are light. Ranks and the documents that they
share are the nodes of a graph; along a tree of it, the one whose parts are lightest, the rows find their way. Where
there are no light parts, a rank has to give rows of a short document to another one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.cells import Cells
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]

# Where rows weigh more than this multiple of the mean, cuts stay; ranks rather give away rows of short documents.
LIGHT = 1.2
# How often ranks with too much area give rows of their TRIED heaviest runs away for light ones, and to how many others.
ROUNDS, TRIED, TAKERS = 8, 4, 3
# They aim at an area below the limit by this part of it, and give FURTHER quarters of what is estimated, since they get
# something back.
BELOW, FURTHER = 800, 5


class Settling:
    """Dealt cells on the way to runs with exact numbers of rows.

    Args:
        cells: what was dealt.
        begin: ``(n + 1,)`` where runs start, and the end of the sequence; a run has rows of one document.
        rank: ``(n,)`` rank of each run.
        wanted: ``(num_ranks,)`` rows that each rank should have, the same in all.
        limit: ``(num_ranks,)`` the most area that each rank should have.
    """

    def __init__(self, cells: Cells, begin: Array, rank: Array, wanted: Array, limit: Array) -> None:
        self.cells, self.wanted, self.limit = cells, wanted, limit.tolist()
        self.num_ranks = len(wanted)
        self.rank, self.document = rank, cells.document[cells.of_rows(begin[:-1])]
        self.rows = np.diff(begin).tolist()
        self.weight = np.diff(cells.area_of_rows(begin)) // self.rows
        # (run, taker, rows): what runs have given away of their first rows.
        self.handed: list[tuple[int, int, int]] = []
        self.holdings = self._find_holdings()
        most = LIGHT * int(cells.area_before[-1]) / int(cells.cuts[-1])
        self.num_light = int(np.searchsorted(self.weight[self.holdings], most, side="right"))
        # About what rows weigh that a rank gets or gives along the tree.
        self.light = [0] * self.num_ranks
        lightest = self.holdings[: self.num_light][::-1]
        for rank, weight in zip(self.rank[lightest].tolist(), self.weight[lightest].tolist(), strict=True):
            self.light[rank] = weight
        self.tree = self._grow_tree()
        self.degree = [len(neighbors) for neighbors in self.tree]
        self.leaves = [node for node, number in enumerate(self.degree) if number == 1]
        # Area of each rank, once settled.
        self.load = np.zeros(self.num_ranks, np.int64)

    def run(self) -> tuple[Array, Array]:
        """Settle; returns where runs start, and the end of the sequence, and the rank of each run."""
        excess = (totals(self.rank, np.array(self.rows), self.num_ranks) - self.wanted).tolist()
        for _ in range(ROUNDS):
            self._route(excess)
            begin, rank = self._table()
            left = totals(rank, np.diff(begin), self.num_ranks) - self.wanted
            if left.any():
                self._hand_over(left)
                begin, rank = self._table()
            self.load = self._measure(begin, rank)
            excess, is_any = self._lighten(self.load.tolist())
            if not is_any:
                break
        return begin, rank

    def _measure(self, begin: Array, rank: Array) -> Array:
        """``(num_ranks,)`` the area of each rank."""
        return totals(rank, np.diff(self.cells.area_of_rows(begin)), self.num_ranks)

    def _table(self) -> tuple[Array, Array]:
        """Where runs start, and the end, and the rank of each; what is handed over lies before its run."""
        if not self.handed:
            return np.append(0, np.cumsum(self.rows)), self.rank
        run, taker, rows = np.array(self.handed, np.int64).T
        order = np.argsort(np.concatenate([run, np.arange(len(self.rows))]), kind="stable")
        rank = np.concatenate([taker, self.rank])[order]
        return np.append(0, np.cumsum(np.concatenate([rows, self.rows])[order])), rank

    def _find_holdings(self) -> Array:
        """Of each rank and document that several ranks hold the lightest run; the lightest of all first."""
        pair = self.document * self.num_ranks + self.rank
        order = np.lexsort((self.weight, pair))
        lightest = order[np.diff(pair[order], prepend=-1) != 0]
        holders = np.bincount(self.document[lightest])
        lightest = lightest[holders[self.document[lightest]] > 1]
        return lightest[np.argsort(self.weight[lightest], kind="stable")]

    def _grow_tree(self) -> list[list[tuple[int, int]]]:
        """Of each rank, document and the pool its neighbors in a tree, with the run that joins them; -1 for the pool.

        What flows to the pool stays where it is, to be handed over.
        """
        number, runs = self.num_ranks, self.holdings
        pool = number + int(self.document[-1]) + 1
        ends = list(zip(self.rank[runs].tolist(), (self.document[runs] + number).tolist(), runs.tolist(), strict=True))
        ends[self.num_light : self.num_light] = [(rank, pool, -1) for rank in range(number)]
        tree: list[list[tuple[int, int]]] = [[] for _ in range(pool + 1)]
        root = list(range(pool + 1))

        def find(node: int) -> int:
            while root[node] != node:
                root[node] = node = root[root[node]]
            return node

        for rank, other, run in ends:
            a, b = find(rank), find(other)
            if a != b:
                root[a] = b
                tree[rank].append((other, run))
                tree[other].append((rank, run))
        return tree

    def _route(self, excess: Sequence[int]) -> None:
        """Grow and shrink runs along the tree, from its leaves on, so that the ranks lose their excess."""
        tree, rows, number = self.tree, self.rows, self.num_ranks
        # Rows that a rank has too many, or that a document has to give to the rest of its tree.
        spare = [*excess, *[0] * (len(tree) - number)]
        degree, leaves = self.degree.copy(), self.leaves.copy()
        is_done = [False] * len(tree)
        while leaves:
            node = leaves.pop()
            is_done[node] = True
            for other, run in tree[node]:
                if is_done[other]:
                    continue
                moved = spare[node]
                if run >= 0 and moved:
                    # The run shrinks by what its rank gives to the document, and grows by what it gets from it.
                    if node < number:
                        moved = min(moved, rows[run] - 1)
                        rows[run] -= moved
                    else:
                        moved = max(moved, 1 - rows[run])
                        rows[run] += moved
                    spare[node] -= moved
                    spare[other] += moved
                degree[other] -= 1
                if degree[other] == 1:
                    leaves.append(other)
        for node, left in enumerate(spare[number:-1], number):
            if left:  # nobody could take it, or the parts that grew had too much
                for run in sorted((run for _, run in tree[node]), key=rows.__getitem__, reverse=True):
                    change = max(left, -rows[run])
                    rows[run] += change
                    left -= change

    def _lighten(self, load: list[int]) -> tuple[list[int], bool]:
        """Let ranks with too much area give some of their heaviest rows to others.

        Returns by how many rows that changes all, but for those that are to be handed over, and whether any are given.
        """
        changed, is_any = [0] * self.num_ranks, False
        limit = self.limit
        too_heavy = [rank for rank, area in enumerate(load) if area > limit[rank]]
        if not too_heavy:
            return changed, False
        rank_of, weights, rows = self.rank.tolist(), self.weight.tolist(), self.rows
        for rank in too_heavy:
            aim = limit[rank] - limit[rank] // BELOW
            mine = np.flatnonzero((self.rank == rank) & (self.weight > 0))
            for run in mine[np.argsort(-self.weight[mine], kind="stable")][:TRIED].tolist():
                # The rank gets light rows back along the tree if they are so light, or else of short documents.
                is_routed = 2 * self.light[rank] <= weights[run]
                weight = weights[run] - is_routed * self.light[rank]
                others = np.flatnonzero((self.document == self.document[run]) & (self.rank != rank)).tolist()
                for other in sorted(others, key=lambda each: load[rank_of[each]])[:TAKERS]:
                    taker = rank_of[other]
                    room = max(limit[taker] - load[taker], 0) // max(weights[other], 1)
                    number = min(FURTHER * ((load[rank] - aim) // weight + 1) // 4, room, rows[run] - 1)
                    if number <= 0:
                        continue
                    rows[run] -= number
                    rows[other] += number
                    load[rank] -= number * weight
                    load[taker] += number * weights[other]
                    changed[rank] -= number * is_routed
                    changed[taker] += number * is_routed
                    is_any = True
                if load[rank] <= limit[rank]:
                    break
        return changed, is_any

    def _hand_over(self, excess: Array) -> None:
        """Ranks that have too many rows give some of a short document, or else of a light run, to others.

        Those whose short documents are longest come first, since parting these costs most: they find takers that lack
        as many rows as they have too many.
        """
        lacking = {rank: -int(excess[rank]) for rank in np.flatnonzero(excess < 0).tolist()}
        length = np.array(self.rows)
        is_parted = np.bincount(self.document)[self.document] > 1
        dearness = np.where(is_parted, self.weight, length)
        givers = []
        for giver in np.flatnonzero(excess > 0).tolist():
            mine = np.flatnonzero(self.rank == giver)
            order = np.lexsort((dearness[mine], length[mine] < excess[giver], is_parted[mine]))
            runs = mine[order].tolist()
            givers.append((bool(is_parted[runs[0]]), int(dearness[runs[0]]), giver, runs))
        for _, _, giver, runs in sorted(givers, reverse=True):
            left = int(excess[giver])
            for run in runs:
                while left and self.rows[run]:
                    number = min(left, self.rows[run])
                    taker = _best_fit(lacking, number)
                    number = min(number, lacking[taker])
                    self.handed.append((run, taker, number))
                    self.rows[run] -= number
                    left -= number
                    lacking[taker] -= number
                    if not lacking[taker]:
                        del lacking[taker]


def _best_fit(lacking: dict[int, int], number: int) -> int:
    """The rank that lacks least of those that lack so many rows, or the one that lacks most."""
    enough = [(rows, rank) for rank, rows in lacking.items() if rows >= number]
    return min(enough)[1] if enough else max((rows, rank) for rank, rows in lacking.items())[1]
