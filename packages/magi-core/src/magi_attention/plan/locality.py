# SPDX-License-Identifier: Apache-2.0
"""Deal chunks so that token counts and mask areas are equal while few key rows travel between ranks.

A rank receives a row if it reads it and does not own it. So documents (see :mod:`magi_attention.plan.documents`) should
stay whole, and one that a single rank cannot compute should be spread over as few ranks as possible. Every rank holds
equally many tokens, so the tokens that go with a piece of a long document cost area: the lighter they are, the larger
the piece. Hence, one rank after the other:

1. The document with the heaviest rows left is the rank's anchor. If it fits, as the lightest chunks fill the rank, it
   is taken whole, and so are further documents, the heaviest first, as long as one fits.
2. Otherwise the rank gets the longest piece from the anchor's heavy end that its area allows, and chunks of the
   anchor's own light end where those are lighter than what else is left: the rank reads their keys anyway. If many
   ranks do, each takes a share of the light end in any case, lest the last of them send it to all others.
3. The rest is filled with whole light documents and one piece, chosen so that the area comes out right and the cut
   costs little.

For a causal mask this ends in pairs of runs from both ends, for a sliding window in one run per rank.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import ChunkWork
from magi_attention.plan.demand import find_demand
from magi_attention.plan.documents import Documents, find_documents
from magi_attention.plan.even_out import even_out
from magi_attention.plan.layout import Layout

Owner = NDArray[np.int64]

# A rank aims at this share of the mean area. What the first ones take above the mean saves pieces of long documents.
# It saves too little to be worth the imbalance where there are fewer documents than FEW of the ranks, unless all chunks
# are about equally heavy and runs of equal length almost balanced.
AIM, AIM_OF_FEW, FEW = 1.018, 1.002, 0.25
# A rank's aim is at most this multiple of the mean of what is left, so that the last ranks are not left idle.
LEAD = 1.08
# Short neighboring documents are joined up to this share of a rank's tokens and area, less SMALL_GROUP / num_ranks: a
# small group has few units to choose from.
JOINED_SHARE, SMALL_GROUP = 0.4, 1.2
# A filling short of the budget by a share of the mean area costs LACK times that share of the rows that a piece of the
# anchor reads; one that exceeds the budget costs EXCESS times it. Up to SLACK, nothing better is sought.
LACK, EXCESS, SLACK = 3.0, 1000.0, 0.006
# In the last step, how many of the longest and of the shortest prefixes of the light documents are tried.
LONG_PREFIXES, SHORT_PREFIXES = 3, 1
# Loads up to this many thousandths of the mean are good; others are evened out.
LIMIT = 1019
# Up to so many chunks, the result is compared with the rival's.
COMPARED_CHUNKS = 1024
# The light documents are listed anew after so many ranks.
RELIST = 8


def deal_by_locality(
    slices: SliceTable,
    work: ChunkWork,
    total: int,
    chunk_size: int,
    num_ranks: int,
    rival: Callable[[], Owner],
) -> Owner:
    """Deal the chunks to the ranks; counts differ by at most one.

    Args:
        slices: the mask over the whole sequence.
        work: its chunks' work.
        total: rows of the sequence.
        chunk_size: rows of a chunk.
        num_ranks: ranks of the group.
        rival: makes the deal of a simple algorithm, which is returned if it is better. It is asked for where the loads
            came out uneven, and where there are so few chunks that a comparison of the rows received is cheap.

    Returns:
        ``(num_chunks,)`` int64, the rank of each chunk.
    """
    num_chunks = len(work.area)
    each, more = divmod(num_chunks, num_ranks)
    joined_share = max(0.0, JOINED_SHARE - SMALL_GROUP / num_ranks)
    documents = find_documents(slices, work, total, chunk_size, num_ranks, joined_share)
    dealt = _Deal(documents, [each + (rank < more) for rank in range(num_ranks)], chunk_size).run()
    limit = int(documents.area[-1]) * LIMIT // (1000 * num_ranks)
    owner = np.empty(num_chunks, np.int64)
    owner[documents.line] = even_out(dealt, documents, num_ranks, limit)
    peak = _peak(owner, work)
    if peak <= limit and num_chunks > COMPARED_CHUNKS:
        return owner
    other = rival()
    if peak > max(limit, _peak(other, work) * LIMIT // 1000):
        return other
    if num_chunks <= COMPARED_CHUNKS:
        received, others = (_received(slices, deal, total, chunk_size, num_ranks) for deal in (owner, other))
        if others < received:
            return other
    return owner


def _peak(owner: Owner, work: ChunkWork) -> int:
    load = np.zeros(int(owner.max()) + 1, np.int64)
    np.add.at(load, owner, work.area)
    return int(load.max())


def _received(slices: SliceTable, owner: Owner, total: int, chunk_size: int, num_ranks: int) -> int:
    """The key rows that all ranks together need and do not own."""
    remote = find_demand(slices, Layout(total, total, chunk_size, num_ranks, owner)).remote
    return int((remote[:, 2] - remote[:, 1]).sum())


class _Deal:
    """The state of the deal. Each document's chunks that are still free are always one interval of the line."""

    def __init__(self, documents: Documents, capacities: Sequence[int], chunk_size: int) -> None:
        self.documents = documents
        self.capacities = capacities
        self.owner = np.full(len(documents.line), -1, np.int64)
        # The free interval of each document, for access one by one and for whole-array arithmetic.
        self.start, self.stop = documents.start.copy(), documents.stop.copy()
        self.low, self.high = self.start.tolist(), self.stop.tolist()
        self.area, self.cut = documents.area.tolist(), documents.cut.tolist()
        self.chunk_area = np.diff(documents.area)
        self.area_float = documents.area.astype(np.float64)
        length = self.stop - self.start
        self.end_length = np.clip(length // 4, 1, max(1, max(capacities))).tolist()
        self.heaviness = [self._heaviness(document) for document in range(len(length))]
        self.by_density = np.argsort(
            -((documents.area[self.stop] - documents.area[self.start]) // length), kind="stable"
        ).tolist()
        self.blocks = self._cut_into_blocks(max(1, max(capacities)))
        self.chunk_size = chunk_size
        # The most chunks that one row of each document reads, and the chunks of its light end that each of its ranks
        # takes: None until the first of them is served.
        most_area = np.maximum.reduceat(np.append(self.chunk_area, 0), np.column_stack([self.start, self.stop]).ravel())
        self.chunks_read = (most_area[::2] / chunk_size**2).tolist()
        self.most_chunks_read = max(self.chunks_read)
        self.light_share: list[int | None] = [None] * len(length)
        self.rank = self.room = self.budget = self.mean = self.price = 0

    def run(self) -> Owner:
        """Deal all chunks; returns the rank of each place of the line."""
        rest, num_ranks = self.area[-1], len(self.capacities)
        few = len(self.heaviness) <= FEW * num_ranks and 4 * rest < 3 * int(self.chunk_area.max()) * len(self.owner)
        aim = int(rest * (AIM_OF_FEW if few else AIM) / num_ranks)
        for rank, capacity in enumerate(self.capacities[:-1]):
            if rank % RELIST == 0:
                self.light_first = self._list_blocks()
            self.rank, self.room, self.mean = rank, capacity, rest // (num_ranks - rank)
            budget = self.budget = max(self.mean, min(aim, int(self.mean * LEAD)))
            self._serve()
            rest -= budget - self.budget
        self.owner[self.owner < 0] = num_ranks - 1
        return self.owner

    def _serve(self) -> None:
        """Fill one rank."""
        anchor = self.heaviness.index(max(self.heaviness))
        low, high = self.low[anchor], self.high[anchor]
        # What one more piece of the anchor costs: the rows that it reads.
        self.price = max(self.cut[high - 1], self.cut[(low + high) // 2], self.cut[min(low + 1, high - 1)], 1)
        _, tokens, areas = lights = self._lightest(anchor)
        if high - low <= self.room and self._fits(anchor, tokens, areas):
            self._take_whole(anchor, tokens, areas)
            lights = self._lightest(-1)
        else:
            self._take_ends(anchor, tokens, areas)
        if self.room:
            self._fill(anchor, *lights)

    def _take(self, document: int, start: int, stop: int) -> None:
        self.owner[start:stop] = self.rank
        self.room -= stop - start
        self.budget -= self.area[stop] - self.area[start]
        if start == self.low[document]:
            self.low[document] = self.start[document] = stop
        else:
            self.high[document] = self.stop[document] = start
        self.heaviness[document] = self._heaviness(document)

    def _heaviness(self, document: int) -> int:
        """The mean area of the chunks at the document's heavy end."""
        high = self.high[document]
        length = min(high - self.low[document], self.end_length[document])
        return (self.area[high] - self.area[high - length]) // length if length else -1

    def _cut_into_blocks(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Cut each document into blocks of about ``size`` chunks: the document, start and stop of each, in order."""
        length = self.stop - self.start
        count = -(-length // size)
        document = np.repeat(np.arange(len(length)), count)
        step = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        start = self.start[document] + step * length[document] // count[document]
        stop = self.start[document] + (step + 1) * length[document] // count[document]
        return document, start, stop

    def _list_blocks(self) -> list[tuple[int, int, int]]:
        """The blocks that still have free chunks as ``(document, start, stop)``, the lightest first.

        A document's blocks stay in order, so that taking them in the list's order takes it from its light end.
        """
        document, start, stop = self.blocks
        low, high = np.maximum(start, self.start[document]), np.minimum(stop, self.stop[document])
        free = np.flatnonzero(high > low)
        if not len(free):
            return []
        low, high = low[free], high[free]
        document, start, stop = self.blocks = document[free], start[free], stop[free]
        density = (self.documents.area[high] - self.documents.area[low]) // (high - low)
        beyond = int(density.max()) + 1
        density = np.maximum.accumulate(density + document * beyond) - document * beyond
        order = np.argsort(density, kind="stable")
        return list(zip(document[order].tolist(), start[order].tolist(), stop[order].tolist(), strict=True))

    def _lightest(self, skip: int) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
        """The lightest free pieces that fill the rank, none of document ``skip``, their running tokens and areas."""
        pieces: list[tuple[int, int, int]] = []
        tokens, areas, count, area = [0], [0], 0, 0
        low, high, area_before, room = self.low, self.high, self.area, self.room
        for document, start, stop in self.light_first:
            if document == skip:
                continue
            start, stop = max(start, low[document]), min(stop, high[document])
            if start < stop:
                pieces.append((document, start, stop))
                count += stop - start
                area += area_before[stop] - area_before[start]
                tokens.append(count)
                areas.append(area)
                if count >= room:
                    break
        return pieces, tokens, areas

    def _fits(self, document: int, tokens: list[int], areas: list[int]) -> bool:
        """Whether the whole document fits the budget if the lightest chunks fill the rest of the room."""
        low, high = self.low[document], self.high[document]
        rest = self.room - (high - low)
        least = 0
        if rest > 0:
            i = min(bisect_left(tokens, rest), len(tokens) - 1)
            least = areas[i]
            if i and rest < tokens[i]:
                least -= (areas[i] - areas[i - 1]) * (tokens[i] - rest) // (tokens[i] - tokens[i - 1])
        return self.area[high] - self.area[low] + least <= self.budget

    def _take_whole(self, anchor: int, tokens: list[int], areas: list[int]) -> None:
        """Take the anchor, then every document that still fits, the densest first."""
        self._take(anchor, self.low[anchor], self.high[anchor])
        low, high = self.low, self.high
        self.by_density = [document for document in self.by_density if low[document] < high[document]]
        for document in self.by_density:
            if high[document] - low[document] <= self.room and self._fits(document, tokens, areas):
                self._take(document, low[document], high[document])
                if not self.room:
                    break

    def _take_ends(self, anchor: int, tokens: list[int], areas: list[int]) -> None:
        """Take as much of the anchor's heavy end as the budget allows, and its light end where nothing is lighter."""
        low, high, room = self.low[anchor], self.high[anchor], self.room
        share = self.light_share[anchor]
        if share is None:
            taken, _ = self._split_room(anchor, 0, tokens, areas)
            share = self.light_share[anchor] = self._share_of_light_end(anchor, taken)
        taken, light = self._split_room(anchor, share, tokens, areas)
        light = max(light, room - taken - tokens[-1])  # there is nothing else
        if taken:
            self._take(anchor, high - taken, high)
        if light:
            self._take(anchor, low, low + light)

    def _split_room(self, anchor: int, share: int, tokens: list[int], areas: list[int]) -> tuple[int, int]:
        """How many chunks of the anchor's heavy end fit the budget, and how many of its light end to take with them.

        ``share`` chunks of the light end are taken in any case, more where they are lighter than what else is left.
        """
        low, high, room = self.low[anchor], self.high[anchor], self.room
        share = min(share, room, high - low)
        most = min(room, high - low) - share
        ends = np.array([tokens, areas])
        lengths, weights = ends[:, 1:] - ends[:, :-1]
        own = self.chunk_area[low + share : low + share + most]
        filling = np.concatenate([own, (weights // lengths).repeat(lengths)])
        filling.sort()
        filling = filling[: room - share]
        filled = np.full(room - share + 1, np.iinfo(np.int64).max // 4)
        filled[0] = self.area[low + share] - self.area[low]
        filled[1 : len(filling) + 1] = filled[0] + np.cumsum(filling)
        # From the longest piece of the heavy end to none at all, all with the lightest filling.
        area = self.area[high] - self.documents.area[high - most : high + 1] + filled[room - share - most :]
        allowed = area <= self.budget
        longest = int(np.argmax(allowed))
        taken = most - longest if allowed[longest] else 0
        light = 0
        if share + taken < room and len(filling):
            dearest = filling[min(room - share - taken, len(filling)) - 1]
            light = min(int(np.count_nonzero(own < dearest)), high - low - share - taken, room - share - taken)
        return taken, share + light

    def _share_of_light_end(self, anchor: int, taken: int) -> int:
        """How many chunks of the anchor's light end each of its ranks should take, so that none sends much too much.

        Let a causal document of length L be dealt in pieces of equal area to m ranks, ``m p² / L²`` of them below
        position p. The piece at p has ``L² / (2 m p)`` rows and ``m (1 - p² / L²)`` readers, and so sends
        ``(L / p - p / L) L / 2`` rows. The rank with the document's last row receives L. Hence no rank sends more than
        the busiest of all documents' ranks receives, R, if all share the rows below the p for which both are equal:
        ``p / L = sqrt(g² + 1) - g`` with ``g = R / L``. Other masks are treated alike, L being the most that a row
        reads.

        Args:
            anchor: the document.
            taken: how many chunks of the heavy end its first rank would take without such a share.
        """
        low, high = self.low[anchor], self.high[anchor]
        reads_light_end = 4 * self.cut[high - taken] >= 3 * (high - taken - low) * self.chunk_size
        pieces_differ = 2 * self.chunk_area[low] < self.chunk_area[high - 1]
        if not (taken and reads_light_end and pieces_differ):
            return 0
        # The first rank takes the lightest filling, the last ones none.
        mean_area = (self.area[high] - self.area[high - taken] + self.budget) / 2
        num_ranks = (self.area[high] - self.area[low]) / mean_area
        ratio = self.most_chunks_read / self.chunks_read[anchor]
        return int((math.sqrt(ratio**2 + 1) - ratio) * self.chunks_read[anchor] / num_ranks)

    def _fill(self, anchor: int, pieces: list[tuple[int, int, int]], tokens: list[int], areas: list[int]) -> None:
        """Fill the room with some of the lightest pieces and one end of one more document."""
        room = self.room
        enough = bisect_left(tokens, room)
        if enough < len(tokens) and tokens[enough] == room and 0 <= self.budget - areas[enough] <= self.mean * SLACK:
            for piece in pieces[:enough]:
                self._take(*piece)
            return
        longest = min(enough, len(tokens))
        prefixes = sorted({*range(max(0, longest - LONG_PREFIXES), longest), *range(min(SHORT_PREFIXES, longest))})
        paid = [0]
        for document, _, stop in pieces[: longest - 1]:
            paid.append(paid[-1] + (self.cut[stop] if stop < self.high[document] else 0))
        sizes = [room - tokens[prefix] for prefix in prefixes]
        size = np.array(sizes)[:, None]
        length = self.stop - self.start
        length[anchor] = 0
        candidates = np.flatnonzero(length >= min(sizes))
        if not len(candidates):
            self._fill_with_anything(pieces)
            return
        # One plane for pieces from the light ends, one for pieces from the heavy ends.
        low, high = self.start.take(candidates), self.stop.take(candidates)
        inner = np.array([low + size, high - size])
        spare = inner[1] - low
        unusable = spare < 0
        if longest > 1:
            self._mark_used(unusable, candidates, pieces[: longest - 1], prefixes)
        lack = self.area_float.take(inner, mode="clip")
        lack[0] -= self.area_float.take(low)
        np.subtract(self.area_float.take(high), lack[1], out=lack[1])
        np.subtract(np.array([[self.budget - areas[prefix]] for prefix in prefixes], float), lack, out=lack)
        dearness = self.price / max(self.mean, 1)
        cost = lack * (LACK * dearness)
        lack *= -EXCESS * dearness
        np.maximum(cost, lack, out=cost)
        parting = self.documents.cut.take(inner, mode="clip")
        parting *= spare != 0
        cost += parting
        cost += np.where(unusable, np.inf, np.array([[paid[prefix]] for prefix in prefixes]))
        best = int(np.argmin(cost))
        if cost.flat[best] == np.inf:
            self._fill_with_anything(pieces)
            return
        best, column = divmod(best, len(candidates))
        from_heavy_end, row = divmod(best, len(prefixes))
        for piece in pieces[: prefixes[row]]:
            self._take(*piece)
        document = int(candidates[column])
        if from_heavy_end:
            self._take(document, self.high[document] - sizes[row], self.high[document])
        else:
            self._take(document, self.low[document], self.low[document] + sizes[row])

    @staticmethod
    def _mark_used(
        unusable: NDArray[np.bool_],
        candidates: NDArray[np.int64],
        pieces: list[tuple[int, int, int]],
        prefixes: list[int],
    ) -> None:
        """Mark the documents that the pieces of each prefix use already."""
        places = np.searchsorted(candidates, [document for document, _, _ in pieces]).tolist()
        for number, ((document, _, _), place) in enumerate(zip(pieces, places, strict=True)):
            if place < len(candidates) and candidates[place] == document:
                unusable[bisect_right(prefixes, number) :, place] = True

    def _fill_with_anything(self, pieces: list[tuple[int, int, int]]) -> None:
        """Fill the room with the lightest pieces, then with whatever is left; the repair will balance it."""
        for document, start, stop in pieces:
            if self.room:
                self._take(document, start, min(stop, start + self.room))
        for document, (low, high) in enumerate(zip(self.low.copy(), self.high.copy(), strict=True)):
            if self.room and low < high:
                self._take(document, low, min(high, low + self.room))
