# SPDX-License-Identifier: Apache-2.0
"""The state of a deal: what is free of documents, what is light, and what the rank being filled can still take."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.documents import Documents

Array = NDArray[np.int64]
Floats = NDArray[np.float64]

# No rank should send more than MOST_SENT times the most rows that one row reads, which is about what some rank must
# receive, or PART_SENT of the longest document, where rows read less of it. That doesn't matter where fewer rows are
# sent than a rank has time for while it computes: one per HIDING_PAIRS (query, key) pairs. That is between 50 GB/s and
# H100's rates for 32 query and 8 key heads, with some distance.
MOST_SENT, PART_SENT, HIDING_PAIRS = 1.28, 0.9, 4000


class Prefixes(NamedTuple):
    """How many prefixes of the light documents are tried as fillings.

    Attributes:
        short: the shortest, with one more document or a piece of one.
        long: the longest, with the same.
        paired: the longest, with up to two more documents that fill the room exactly.
        few: instead of those with one more document, also with two, one of them whole, if there are no more left. The
            prefix is the empty one.
        shorter: by this share of a rank's tokens a filling between both ends of a document may be shorter than planned,
            so that a document fits whole. It may also be by as many chunks as the light end gives.
        early: such a share of the ranks, the first ones, try pairs between both ends of a document. Later there are
            fewer documents, and few pairs fit.
    """

    short: int
    long: int
    paired: int
    few: int = 0
    shorter: float = 0.042
    early: float = 1.0


class Lights(NamedTuple):
    """Light pieces ``(document, start, stop)``, and the tokens (in chunks) and areas of the first k of them."""

    pieces: list[tuple[int, int, int]]
    tokens: list[int]
    areas: list[int]


class Filling:
    """The chunks that are still free, always one interval of the line for each document, and the rank being filled.

    Attributes:
        owner: ``(num_chunks,)`` the rank of each place of the line; -1 where it is free.
        rank: the rank being filled.
        room: chunks that it can still take.
        budget: mask area that it can still take.
        mean: mean area of the ranks that are not filled.
        price: rows that one more piece of the rank's anchor would cost.
        prefixes: how many prefixes of the light documents are tried.
        most_sent: how many chunks a rank should send at most, counted once for each rank that receives them.
    """

    def __init__(self, documents: Documents, capacities: Sequence[int], chunk_size: int, prefixes: Prefixes) -> None:
        self.documents = documents
        self.capacities, self.prefixes = capacities, prefixes
        self.owner = np.full(len(documents.line), -1, np.int32)
        # The free interval of each document, for access one by one and for whole-array arithmetic.
        self.ends = np.concatenate([documents.start, documents.stop])
        self.start, self.stop = np.split(self.ends, 2)
        self.low, self.high = self.start.tolist(), self.stop.tolist()
        self.area, self.cut = documents.area.data, documents.cut.data
        self.chunk_area = np.diff(documents.area)
        self.area_float = documents.area.astype(np.float64)
        self.cut_float = documents.cut.astype(np.float64)
        self.area_ends = self.area_float[self.ends]
        self.area_start, self.area_stop = np.split(self.area_ends, 2)
        length = self.stop - self.start
        self.length = length.copy()
        end = np.minimum(np.clip(length // 4, 1, max(1, max(capacities))), length)
        self.heaviness = (documents.area[self.stop] - documents.area[self.stop - end]) // end
        self.end_length = end.tolist()
        self.by_density = np.argsort(
            -((documents.area[self.stop] - documents.area[self.start]) // length), kind="stable"
        ).tolist()
        self.blocks = self._cut_into_blocks(max(1, max(capacities)))
        self.light_first: list[tuple[int, int, int]] = []
        self.heavy_first = np.array(self.by_density, np.int64)
        self.by_length = self._list_by_length()
        self.chunk_size = chunk_size
        # The chunks of each document's light end that each of its ranks takes: None until the first of them is served.
        self.light_share: list[int | None] = [None] * len(length)
        # How many ranks got chunks of each document, and the last of them; how many will have got some in the end.
        self.readers, self.last_reader = [0] * len(length), [-1] * len(length)
        self.expected_readers = [1.0] * len(length)
        self.most_sent = find_most_sent(documents, len(capacities), chunk_size)
        self.rank = self.room = self.budget = self.mean = self.price = 0

    def _take(self, document: int, start: int, stop: int) -> None:
        if start == stop:
            return
        area, low, high = self.area, self.low[document], self.high[document]
        self.owner[start:stop] = self.rank
        self.room -= stop - start
        self.budget -= area[stop] - area[start]
        if start == low:
            self.low[document] = self.start[document] = stop
            self.area_start[document] = area[stop]
        else:
            self.high[document] = self.stop[document] = start
            self.area_stop[document] = area[start]
        self.length[document] = high - low - (stop - start)
        self.heaviness[document] = self._heaviness(document)
        if self.last_reader[document] != self.rank:
            self.last_reader[document] = self.rank
            self.readers[document] += 1

    def _take_all(self, pieces: list[tuple[int, int, int]]) -> None:
        """Take several pieces; quicker one by one only where something is left of their documents."""
        whole = []
        for document, start, stop in pieces:
            if start != self.low[document] or stop != self.high[document]:
                self._take(document, start, stop)
            elif start < stop:
                whole.append(document)
                self.owner[start:stop] = self.rank
                self.room -= stop - start
                self.budget -= self.area[stop] - self.area[start]
                self.low[document] = stop
        if whole:
            documents = np.array(whole)
            self.length[documents] = 0
            self.heaviness[documents] = -1
            self.start[documents] = self.stop[documents]
            self.area_start[documents] = self.area_stop[documents]

    def _heaviness(self, document: int) -> int:
        """The mean area of the chunks at the document's heavy end."""
        high = self.high[document]
        length = min(high - self.low[document], self.end_length[document])
        return (self.area[high] - self.area[high - length]) // length if length else -1

    def _cut_into_blocks(self, size: int) -> tuple[Array, Array, Array]:
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

    def _list_by_length(self) -> tuple[Array, Array]:
        """The numbers of free chunks of the documents that have any, ascending, and these documents.

        Of documents of the same length, the one that was the lightest at first is the last.
        """
        length = self.length.take(self.heavy_first)
        order = np.argsort(length, kind="stable")
        order = order[np.count_nonzero(length == 0) :]
        return length.take(order), self.heavy_first.take(order)

    def _lightest(self, skip: int) -> Lights:
        """The lightest free pieces that fill the rank, none of document ``skip``."""
        pieces: list[tuple[int, int, int]] = []
        tokens, areas, count, area = [0], [0], 0, 0
        low, high, area_before, room = self.low, self.high, self.area, self.room
        gone = 0
        for document, start, stop in self.light_first:
            if max(start, low[document]) < min(stop, high[document]):
                break
            gone += 1
        del self.light_first[:gone]
        # Comparisons are quicker than calls of max and min.
        for document, start, stop in self.light_first:
            if document == skip:
                continue
            if start < low[document]:
                start = low[document]
            if stop > high[document]:
                stop = high[document]
            if start < stop:
                pieces.append((document, start, stop))
                count += stop - start
                area += area_before[stop] - area_before[start]
                tokens.append(count)
                areas.append(area)
                if count >= room:
                    break
        return Lights(pieces, tokens, areas)

    def _fits(self, document: int, lights: Lights) -> bool:
        """Whether the rank can take and send the whole document if the lightest chunks fill the rest of the room."""
        low, high = self.low[document], self.high[document]
        rest = self.room - (high - low)
        if rest < 0 or high - low > self._sendable(document):
            return False
        least = 0
        if rest > 0:
            _, tokens, areas = lights
            i = min(bisect_left(tokens, rest), len(tokens) - 1)
            least = areas[i]
            if i and rest < tokens[i]:
                least -= (areas[i] - areas[i - 1]) * (tokens[i] - rest) // (tokens[i] - tokens[i - 1])
        return self.area[high] - self.area[low] + least <= self.budget

    def _sendable(self, document: int) -> int:
        """How many chunks of the document one rank can send to those that have read it."""
        readers = self._readers_of_rest(document)
        return int(self.most_sent / readers) if readers else self.high[document] - self.low[document]

    def _readers_of_rest(self, document: int) -> int:
        """How many ranks have got chunks that read what is left of the document."""
        high = self.high[document]
        read, rest = self.cut[high], (high - self.low[document]) * self.chunk_size
        if 4 * read < 3 * rest or not self.readers[document]:
            return 0
        # What reads beyond its own rows will be read from below too.
        return max(self.readers[document], int(self.expected_readers[document]) if read > rest else 0)

    def _fill_with_anything(self, pieces: list[tuple[int, int, int]]) -> None:
        """Fill the room with the lightest pieces, then with whatever is left; the repair will balance it."""
        for document, start, stop in pieces:
            if self.room:
                self._take(document, start, min(stop, start + self.room))
        for document, (low, high) in enumerate(zip(self.low.copy(), self.high.copy(), strict=True)):
            if self.room and low < high:
                self._take(document, low, min(high, low + self.room))


def find_most_sent(documents: Documents, num_ranks: int, chunk_size: int) -> float:
    """How many chunks a rank should send at most, counted once for each rank that receives them."""
    most_read = int(np.diff(documents.area).max()) / chunk_size**2
    longest = int((documents.stop - documents.start).max())
    hidden = int(documents.area[-1]) / num_ranks / HIDING_PAIRS / chunk_size
    return max(MOST_SENT * most_read, PART_SENT * longest, hidden)
