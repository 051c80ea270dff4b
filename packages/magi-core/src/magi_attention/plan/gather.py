# SPDX-License-Identifier: Apache-2.0
"""Swap runs between ranks so that fewer rows are received.

A rank that holds any of a document receives what its last chunk of it reads, less what it owns. All ranks together own
every row once, so that what counts is the sum, over all documents and the ranks that hold some of them, of the rows
that they read. It falls if a rank gives away its last run of a document, or the end of it, and the rank that takes it
reads most of that anyway. What it gives in return, an equally long piece, must cost less.

Only a taker that holds some of the document need be considered: a swap in which neither rank does saves nothing.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from magi_attention.common.slices import expand_counts
from magi_attention.plan.documents import Owner
from magi_attention.plan.swaps import Array, Runs, Swaps

# In each round a rank swaps runs of a document once at most. In the first of CYCLE rounds swaps may cost up to
# TOLERATED chunks, since others become possible then; in the others they must save LEAST_SAVED.
CYCLE, TOLERATED, LEAST_SAVED = 2, 2, 0.5
# There is a cycle for RANKS_PER_CYCLE ranks, but at least LEAST_CYCLES, and else no more than go with TOGETHER ranks in
# all cycles together. The last one ends SPARED rounds early, as these would save next to nothing.
RANKS_PER_CYCLE, LEAST_CYCLES, TOGETHER, SPARED = 22, 2, 3328, 1
# A run that makes up more than this share of the mean area is no remainder, and has no match.
LONGEST = 0.5
# Against masks in very many pieces: documents of more ranks are left alone, pairs beyond these not weighed.
MOST_HOLDERS, MOST_PAIRS = 256, 1 << 19


class Pairs(NamedTuple):
    """Pieces ``[start, stop)`` that change owners, their runs, and the ranks that take them.

    ``area`` and ``sends`` are what the taker of the first piece gets more than it gives, of area and of rows to send.
    """

    given: Array
    start: Array
    stop: Array
    giver: Array
    taken: Array
    other_start: Array
    other_stop: Array
    taker: Array
    area: Array
    sends: Array


class ReceiverSwaps(Swaps):
    """Swaps that spare the ranks rows to receive, while nobody sends more than he should, or than before."""

    @cached_property
    def sends(self) -> Array:
        """What :meth:`count_sends` says of the deal at first; swaps change little of who reads what.

        May be set to what it says of a deal like this one.
        """
        return self.count_sends(self.find_runs())

    def run(self, ranks_per_cycle: int = RANKS_PER_CYCLE) -> Owner:
        """Swap for some rounds; returns the rank of each place of the line after the best of them."""
        most = max(TOGETHER // self.num_ranks, LEAST_CYCLES)
        num_cycles = min(max(self.num_ranks // ranks_per_cycle, LEAST_CYCLES), most)
        best, fewest = self.owner, np.iinfo(np.int64).max
        number = 0
        while number < num_cycles * CYCLE - SPARED:
            runs = self.find_runs()
            rows = self._rows_read(runs)
            if rows < fewest:
                best, fewest = self.owner.copy(), rows
            is_first = number % CYCLE == 0
            if self._swap(runs, TOLERATED if is_first else -LEAST_SAVED):
                number += 1
            elif is_first:
                return best
            else:
                number += CYCLE - number % CYCLE
        return self.owner if self._rows_read(self.find_runs()) < fewest else best

    def _rows_read(self, runs: Runs) -> int:
        """How many rows all ranks read, of each document from its first one on."""
        return int(self.read[runs.last[runs.highest]].sum())

    def _swap(self, runs: Runs, tolerated: float) -> int:
        """Do what swaps cost less than so many chunks of rows, the best first; how many are done.

        A swap neither comes after another one of the same rank and document, on which its cost depends, nor costs
        anything where one of the ranks has taken part in another.
        """
        more_area = self.most_area - self.load
        more_sends = np.maximum(self.most_sent - self.sent_by(runs, self.sends), 0)
        pairs = self._affordable(self._pairs(runs), more_area, more_sends)
        cost = self._cost(runs, pairs)
        order = np.flatnonzero(cost < int(tolerated * self.chunk_size))
        order = order[np.argsort(cost[order], kind="stable")]
        return self._exchange(runs, Pairs(*[each[order] for each in pairs]), cost[order], more_area, more_sends)

    def _exchange(self, runs: Runs, pairs: Pairs, cost: Array, more_area: Array, more_sends: Array) -> int:
        """Do swaps, the first ones first, unless others of the round are in their way; see :meth:`_swap`."""
        document, other = (runs.document[run] * self.num_ranks for run in (pairs.given, pairs.taken))
        holdings = [each + rank for each in (document, other) for rank in (pairs.giver, pairs.taker)]
        room, left = more_area.tolist(), more_sends.tolist()
        used: set[int] = set()
        taking_part: set[int] = set()
        done = 0
        columns = [each.tolist() for each in (*holdings, pairs.giver, pairs.taker, cost)]
        for number, (k, m, n, o, a, b, price) in enumerate(zip(*columns, strict=True)):
            if k in used or m in used or n in used or o in used:
                continue
            if price >= 0 and (a in taking_part or b in taking_part):
                continue
            area, sends = pairs.area.item(number), pairs.sends.item(number)
            if area > room[b] or -area > room[a] or sends > left[b] or -sends > left[a]:
                continue
            used.update((k, m, n, o))
            taking_part.update((a, b))
            for rank, sign in ((a, 1), (b, -1)):
                room[rank] += sign * area
                left[rank] += sign * sends
            self.owner[pairs.start[number] : pairs.stop[number]] = b
            self.owner[pairs.other_start[number] : pairs.other_stop[number]] = a
            done += 1
        self.load = self.most_area - np.array(room)
        return done

    def _pairs(self, runs: Runs) -> Pairs:
        """The last runs of documents that several ranks hold, whole or as long as whole runs of those who take them."""
        given, taker = self._takers(runs)
        by_rank = np.argsort(runs.rank, kind="stable")
        by_rank = by_rank[self.read[runs.last[by_rank]] > 0]
        count = np.bincount(runs.rank[by_rank], minlength=self.num_ranks)
        begin = np.cumsum(count) - count
        within = np.cumsum(count[taker]) <= MOST_PAIRS
        given, taker = given[within], taker[within]
        which, step = expand_counts(count[taker])
        given, taker = given[which], taker[which]
        taken = by_rank[begin[taker] + step]
        whole = runs.last - runs.first
        length, other = whole[given], whole[taken]
        # The run that is taken gives its high end, or its low one if it is longer.
        longer = np.flatnonzero(other > length)
        given, taker, taken = (np.append(each, each[longer]) for each in (given, taker, taken))
        size = np.minimum(np.append(length, length[longer]), np.append(other, other[longer]))
        stop, other_stop = runs.last[given], runs.last[taken]
        other_stop[len(length) :] = runs.first[taken[len(length) :]] + size[len(length) :]
        start, other_start = stop - size, other_stop - size
        area, sends = (
            each[stop] - each[start] - each[other_stop] + each[other_start]
            for each in (self.documents.area, self.sends)
        )
        return Pairs(given, start, stop, runs.rank[given], taken, other_start, other_stop, taker, area, sends)

    def _takers(self, runs: Runs) -> tuple[Array, Array]:
        """Last runs of documents, and ranks that could take each without reading as much more as its owner less."""
        area = self.documents.area
        document = runs.document[runs.highest]
        holders = np.bincount(document, minlength=len(self.start))
        begin = np.cumsum(holders) - holders
        own = area[runs.last[runs.highest]] - area[runs.first[runs.highest]]
        is_remainder = own <= LONGEST * area[-1] / self.num_ranks
        top = np.flatnonzero(is_remainder & (holders[document] > 1) & (holders[document] <= MOST_HOLDERS))
        which, step = expand_counts(holders[document[top]])
        document, given = document[top][which], runs.highest[top][which]
        taker = runs.rank[runs.highest[begin[document] + step]]
        rows = self.read[runs.last[given]]
        saved = rows - runs.below[given] - np.maximum(rows - runs.read_by(document, taker), 0)
        useful = (taker != runs.rank[given]) & (saved >= self.chunk_size)
        return given[useful], taker[useful]

    def _affordable(self, pairs: Pairs, more_area: Array, more_sends: Array) -> Pairs:
        """The pairs after whose swap both ranks stay within the limits of area and of rows to send, or send less."""
        affordable = (pairs.area <= more_area[pairs.taker]) & (-pairs.area <= more_area[pairs.giver])
        affordable &= (pairs.sends <= more_sends[pairs.taker]) & (-pairs.sends <= more_sends[pairs.giver])
        return Pairs(*[each[affordable] for each in pairs])

    def _cost(self, runs: Runs, pairs: Pairs) -> Array:
        """How many rows more are received after each swap."""
        read = self.read
        document, other_document = runs.document[pairs.given], runs.document[pairs.taken]
        # What giver and taker read of both documents before a swap, and without what they give away.
        rows, other_rows = read[pairs.stop], read[pairs.other_stop]
        left = np.where(pairs.start > runs.first[pairs.given], read[pairs.start], runs.below[pairs.given])
        other_left = np.where(
            pairs.other_start > runs.first[pairs.taken], read[pairs.other_start], runs.below[pairs.taken]
        )
        is_top = runs.is_top[pairs.taken] & (pairs.other_stop == runs.last[pairs.taken])
        other_saved = np.where(is_top, other_rows - other_left, 0)
        same = document == other_document
        of_giver = np.where(same, left, runs.read_by(other_document, pairs.giver))
        of_taker = runs.read_by(document, pairs.taker) - np.where(same, other_saved, 0)
        cost = np.maximum(other_rows - of_giver, 0) + np.maximum(rows - of_taker, 0) - (rows - left) - other_saved
        if not self.is_parted_dearly:
            return cost
        cost += self._parted(pairs.start, pairs.stop, pairs.giver, pairs.taker)
        return cost + self._parted(pairs.other_start, pairs.other_stop, pairs.taker, pairs.giver)

    def _parted(self, start: Array, stop: Array, giver: Array, taker: Array) -> Array:
        """How many rows more are received as pieces are parted from documents before and after them, or join them."""
        owners = np.append(self.owner, -1)  # nobody before the first place and after the last
        before, after = owners[start - 1], owners[stop]
        cost = self.border[start] * ((before == giver).astype(np.int64) - (before == taker))
        return cost + self.border[stop] * ((after == giver).astype(np.int64) - (after == taker))
