# SPDX-License-Identifier: Apache-2.0
"""Swap runs between ranks so that none sends too much, at the cost of few rows or none.

What the ranks read is taken from the line: a rank's last chunk of a document says how many of the document's first
chunks it reads (:attr:`~plan.documents.Documents.read`). But for parts of chunks that is right where rows read what is
before them or a document's first rows, as with causal, prefix and shared-question masks and full documents. Others are
left alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.documents import Documents
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]

# Pieces of so many chunks of each end of a run are offered, and the whole run: those that send between LEAST_PART and
# MOST_PART of what is too much.
SIZES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])
LEAST_PART, MOST_PART = 0.25, 2.0
# There is a round for RANKS_PER_ROUND ranks, but at least LEAST_ROUNDS and at most MOST_ROUNDS. In each, those of the
# BUSIEST part of the ranks, at most MOST_BUSY, that send too much by more than TOLERANCE swap once.
RANKS_PER_ROUND, LEAST_ROUNDS, MOST_ROUNDS, BUSIEST, MOST_BUSY, TOLERANCE = 48, 2, 6, 1 / 12, 32, 0.02
# Ranks that can take this share of the mean area more, or less, are looked up by the areas of their pieces.
NARROW = 0.02
# A row less to send for a rank that sends too much is worth so many rows received more.
WORTH = 0.7


class Runs(NamedTuple):
    """The ranks' runs of chunks, one of each row: a run ends where the owner or the document changes.

    Attributes:
        first: the first place of each run.
        last: the place after its last.
        rank: its owner.
        document: its document.
        below: where the rank's next lower run of the document ends, 0 if there is none.
        holdings: the pairs of documents and ranks of all runs, each once, as ``document * num_ranks + rank``.
        top: ``(num_documents * num_ranks,)`` where the rank's highest run of the document ends, 0 if it has none.
    """

    first: Array
    last: Array
    rank: Array
    document: Array
    below: Array
    holdings: Array
    top: Array


class Pieces(NamedTuple):
    """Pieces of the ends of runs: their rank, document, places ``[start, stop)``, area and chunks to send.

    Attributes:
        alone: how many chunks the rank reads for the piece alone.
    """

    rank: Array
    document: Array
    start: Array
    stop: Array
    area: Array
    sends: Array
    alone: Array


class SenderSwaps:
    """A deal, and swaps that mend it.

    Args:
        owner: ``(num_chunks,)`` the rank of each place of the line.
        documents: the line.
        num_ranks: ranks of the group.
        chunk_size: rows of a chunk.
        most_area: the most mask area that a rank should have.
        most_sent: the most chunks that a rank should send, counted once for each rank that receives them.
    """

    def __init__(
        self, owner: Array, documents: Documents, num_ranks: int, chunk_size: int, most_area: int, most_sent: float
    ) -> None:
        self.owner = owner.copy()
        self.documents = documents
        self.num_ranks = num_ranks
        self.most_area, self.most_sent = most_area, most_sent
        self.document_of = np.repeat(np.arange(len(documents.start)), documents.stop - documents.start)
        self.is_first = np.zeros(len(owner), np.bool_)
        self.is_first[documents.start] = True
        # How many of its document's first chunks the chunk before each place reads.
        self.read = np.append(0, documents.read)
        self.load = totals(owner, np.diff(documents.area), num_ranks)

    def run(self) -> Array:
        """Swap until no rank sends too much or nothing helps; returns the rank of each place of the line."""
        for _ in range(min(max(self.num_ranks // RANKS_PER_ROUND, LEAST_ROUNDS), MOST_ROUNDS)):
            runs = self._find_runs()
            sends_before = self._count_sends(runs)
            sent = totals(runs.rank, sends_before[runs.last] - sends_before[runs.first], self.num_ranks)
            excess = sent - self.most_sent
            number = min(max(1, int(self.num_ranks * BUSIEST)), MOST_BUSY)
            excess[np.argsort(excess, kind="stable")[:-number]] = 0
            if excess.max() <= TOLERANCE * self.most_sent or not self._swap(runs, sends_before, sent, excess):
                break
        return self.owner

    def _find_runs(self) -> Runs:
        is_first = self.is_first.copy()
        is_first[1:] |= self.owner[1:] != self.owner[:-1]
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(self.owner))
        rank, document = self.owner[first], self.document_of[first]
        key = document * self.num_ranks + rank
        order = np.argsort(key, kind="stable")
        follows = key[order[1:]] == key[order[:-1]]
        below, top = np.zeros_like(first), np.zeros(len(self.documents.start) * self.num_ranks, np.int64)
        below[order[1:][follows]] = last[order[:-1][follows]]
        highest = order[np.append(~follows, True)]
        top[key[highest]] = last[highest]
        return Runs(first, last, rank, document, below, key[highest], top)

    def _count_sends(self, runs: Runs) -> Array:
        """``(num_chunks + 1,)`` the chunks to send before each place, counted once for each rank that receives them."""
        document = runs.holdings // self.num_ranks
        begin, end = self.documents.start[document], self.documents.stop[document]
        change = np.zeros(len(self.owner) + 1, np.int64)
        np.add.at(change, begin, 1)
        np.add.at(change, np.minimum(begin + self.read[runs.top[runs.holdings]], end), -1)
        return np.append(0, np.cumsum(np.maximum(np.cumsum(change[:-1]) - 1, 0)))

    def _offer(self, runs: Runs, sends_before: Array, excess: NDArray[np.floating]) -> tuple[Array, Array]:
        """The starts and stops of the pieces that the ranks that send too much would give away."""
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
        return start[chosen], stop[chosen]

    def _pieces_of(self, runs: Runs, sends_before: Array, start: Array, stop: Array) -> Pieces:
        run = np.searchsorted(runs.first, start, side="right") - 1
        rank, document = runs.rank[run], runs.document[run]
        left = np.where(start == runs.first[run], runs.below[run], start)
        alone = self.read[stop] - np.where(left > self.documents.start[document], self.read[left], 0)
        alone[runs.top[document * self.num_ranks + rank] != stop] = 0
        area = self.documents.area[stop] - self.documents.area[start]
        return Pieces(rank, document, start, stop, area, sends_before[stop] - sends_before[start], alone)

    def _partners(self, runs: Runs, lengths: Array) -> tuple[Array, Array]:
        """The starts of all pieces of the given lengths at the ends of runs, and the index of each one's length."""
        whole = runs.last - runs.first
        size, run = np.nonzero(whole >= lengths[:, None])
        first, last = runs.first[run], runs.last[run] - lengths[size]
        two = last > first
        return np.concatenate([first, last[two]]), np.concatenate([size, size[two]])

    def _swap(self, runs: Runs, sends_before: Array, sent: Array, excess: NDArray[np.floating]) -> bool:
        """Let each rank that sends too much swap one piece for another of equal length; whether any did."""
        start, stop = self._offer(runs, sends_before, excess)
        lengths, which = np.unique(stop - start, return_inverse=True)
        others, size = self._partners(runs, lengths)
        given = self._pieces_of(runs, sends_before, start, stop)
        taken = self._pieces_of(runs, sends_before, others, others + lengths[size])
        slack = self.most_area - self.load
        g, t = _pairs_that_may_do(given, which, taken, size, slack, int(self.documents.area[-1]))
        possible = given.area[g] - taken.area[t] <= slack[taken.rank][t]
        possible &= given.sends[g] > taken.sends[t]
        g, t = g[possible], t[possible]
        a, b = given.rank[g], taken.rank[t]
        more = given.sends[g] - taken.sends[t]
        possible = (sent[b] + more <= self.most_sent) & (given.document[g] != taken.document[t])
        g, t, a, b, more = g[possible], t[possible], a[possible], b[possible], more[possible]
        top = runs.top.reshape(-1, self.num_ranks)
        price = np.maximum(self.read[given.stop[g]] - self.read[top[given.document[g], b]], 0) - given.alone[g]
        price += np.maximum(self.read[taken.stop[t]] - self.read[top[taken.document[t], a]], 0) - taken.alone[t]
        score = price - WORTH * np.minimum(more, excess[a])
        return self._exchange_best(given, taken, g, t, score)

    def _exchange_best(self, given: Pieces, taken: Pieces, g: Array, t: Array, score: NDArray[np.floating]) -> bool:
        """Swap the pairs of pieces with the lowest scores below zero, of each rank one; whether there was any."""
        good = np.flatnonzero(score < 0)
        used: set[int] = set()
        for pair in good[np.argsort(score[good], kind="stable")].tolist():
            mine, other = int(g[pair]), int(t[pair])
            a, b = int(given.rank[mine]), int(taken.rank[other])
            if a in used or b in used:
                continue
            used.update((a, b))
            self.owner[given.start[mine] : given.stop[mine]] = b
            self.owner[taken.start[other] : taken.stop[other]] = a
            moved = given.area[mine] - taken.area[other]
            self.load[a] -= moved
            self.load[b] += moved
        return bool(used)


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
