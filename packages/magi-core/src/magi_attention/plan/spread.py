# SPDX-License-Identifier: Apache-2.0
"""Swap runs between ranks so that none sends too much, at the cost of few rows or none."""

from typing import NamedTuple

import numpy as np

from magi_attention.plan.documents import Owner
from magi_attention.plan.swaps import Array, Runs, Swaps

# Pieces of so many chunks of each end of a run are offered, and the whole run: those that send between LEAST_PART and
# MOST_PART of what is too much.
SIZES = 1 << np.arange(8)
LEAST_PART, MOST_PART = 0.25, 2.0
# There is a round for RANKS_PER_ROUND ranks, but at least LEAST_ROUNDS and at most MOST_ROUNDS. In each, those of the
# BUSIEST part of the ranks, at most MOST_BUSY, that send too much by more than TOLERANCE swap once.
RANKS_PER_ROUND, LEAST_ROUNDS, MOST_ROUNDS, BUSIEST, MOST_BUSY, TOLERANCE = 48, 2, 6, 1 / 12, 32, 0.05
# Ranks that can take this share of the mean area more, or less, are looked up by the areas of their pieces.
NARROW = 0.02
# A row less to send for a rank that sends too much is worth so many rows received more.
WORTH = 0.92


class Pieces(NamedTuple):
    """Pieces of the ends of runs: their rank, document, places ``[start, stop)``, area and rows to send.

    Attributes:
        alone: how many rows the rank reads for the piece alone.
    """

    rank: Array
    document: Array
    start: Array
    stop: Array
    area: Array
    sends: Array
    alone: Array


class SenderSwaps(Swaps):
    """Swaps that spare the ranks that send most."""

    def run(self, most_rounds: int = MOST_ROUNDS) -> Owner:
        """Swap until no rank sends too much or nothing helps; returns the rank of each place of the line."""
        for _ in range(min(max(self.num_ranks // RANKS_PER_ROUND, LEAST_ROUNDS), most_rounds)):
            runs = self.find_runs()
            sends_before = self.sends = self.count_sends(runs)
            sent = self.sent_by(runs, sends_before)
            excess = sent - self.most_sent
            number = min(max(1, int(self.num_ranks * BUSIEST)), MOST_BUSY)
            excess[np.argsort(excess, kind="stable")[:-number]] = 0
            if excess.max() <= TOLERANCE * self.most_sent or not self._swap(runs, sends_before, sent, excess):
                break
        return self.owner

    def _offer(self, runs: Runs, sends_before: Array, excess: Array) -> Pieces:
        """The pieces that the ranks that send too much would give away."""
        whole = runs.last - runs.first
        mine = np.flatnonzero((excess[runs.rank] > 0) & (sends_before[runs.last] > sends_before[runs.first]))
        length = np.column_stack([np.minimum(SIZES, whole[mine, None]), whole[mine]])
        start = np.concatenate([np.broadcast_to(runs.first[mine, None], length.shape), runs.last[mine, None] - length])
        stop = start + np.concatenate([length, length])
        sends = sends_before[stop] - sends_before[start]
        needed = np.tile(excess[runs.rank[mine]], 2)[:, None]
        chosen = (sends >= LEAST_PART * needed) & (sends <= MOST_PART * needed)
        # Sizes beyond the run stand for the whole run, which is offered once.
        chosen[:, :-1] &= np.tile(whole[mine, None] > SIZES, (2, 1))
        run = np.broadcast_to(np.tile(mine, 2)[:, None], chosen.shape)
        return self._pieces_of(runs, sends_before, run[chosen], start[chosen], stop[chosen])

    def _pieces_of(self, runs: Runs, sends_before: Array, run: Array, start: Array, stop: Array) -> Pieces:
        rank, document = runs.rank[run], runs.document[run]
        left = np.where(start == runs.first[run], runs.below[run], self.read[start])
        alone = np.where(runs.is_top[run] & (stop == runs.last[run]), self.read[stop] - left, 0)
        area = self.documents.area[stop] - self.documents.area[start]
        return Pieces(rank, document, start, stop, area, sends_before[stop] - sends_before[start], alone)

    def _partners(self, runs: Runs, sends_before: Array, lengths: Array) -> tuple[Pieces, Array]:
        """All pieces of the given lengths at the ends of runs, and the index of each one's length."""
        whole = runs.last - runs.first
        size, run = np.nonzero((whole >= lengths[:, None]) & (self.read[runs.last] > 0))
        first, last = runs.first[run], runs.last[run] - lengths[size]
        two = last > first
        run, size = np.concatenate([run, run[two]]), np.concatenate([size, size[two]])
        start = np.concatenate([first, last[two]])
        return self._pieces_of(runs, sends_before, run, start, start + lengths[size]), size

    def _swap(self, runs: Runs, sends_before: Array, sent: Array, excess: Array) -> int:
        """Let each rank that sends too much swap one piece for another of equal length; how many took part."""
        given = self._offer(runs, sends_before, excess)
        lengths, which = np.unique(given.stop - given.start, return_inverse=True)
        taken, size = self._partners(runs, sends_before, lengths)
        slack = self.most_area - self.load
        g, t = _pairs_that_may_do(given, which, taken, size, slack, int(self.documents.area[-1]))
        possible = given.area[g] - taken.area[t] <= slack[taken.rank][t]
        possible &= given.sends[g] > taken.sends[t]
        g, t = g[possible], t[possible]
        a, b = given.rank[g], taken.rank[t]
        more = given.sends[g] - taken.sends[t]
        possible = (sent[b] + more <= self.most_sent) & (given.document[g] != taken.document[t])
        g, t, a, b, more = g[possible], t[possible], a[possible], b[possible], more[possible]
        price = np.maximum(self.read[given.stop[g]] - runs.read_by(given.document[g], b), 0) - given.alone[g]
        price += np.maximum(self.read[taken.stop[t]] - runs.read_by(taken.document[t], a), 0) - taken.alone[t]
        score = price - WORTH * np.minimum(more, excess[a])
        return self.exchange(given.start[g], given.stop[g], taken.start[t], taken.stop[t], score)


def _pairs_that_may_do(
    given: Pieces, size: Array, taken: Pieces, other_size: Array, slack: Array, total_area: int
) -> tuple[Array, Array]:
    """All pairs of pieces of equal size that both ranks may have room for, given how much more area each can take.

    Areas of pieces that ranks with little room would give lie in a narrow window below those that they would get.
    """
    mean_area = total_area // len(slack)
    beyond = 2 * (total_area + 1)  # so that windows of two sizes have nothing in common
    own = given.area + size * beyond
    most = own + np.minimum(slack[given.rank], mean_area)
    place = taken.area + other_size * beyond
    room = slack[taken.rank]
    narrow = int(NARROW * mean_area)
    pairs = []
    for members, window in ((room <= narrow, narrow), (room > narrow, mean_area)):
        partners = np.flatnonzero(members)
        partners = partners[np.argsort(place[partners], kind="stable")]
        begin = np.searchsorted(place[partners], own - window)
        count = np.maximum(np.searchsorted(place[partners], most, side="right") - begin, 0)
        g = np.repeat(np.arange(len(own)), count)
        t = np.arange(len(g)) + np.repeat(begin - np.cumsum(count) + count, count)
        pairs.append((g, partners[t]))
    return np.concatenate([g for g, _ in pairs]), np.concatenate([t for _, t in pairs])
