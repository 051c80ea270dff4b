# SPDX-License-Identifier: Apache-2.0
"""Deal chunks rank after rank, so that documents stay together.

Every rank holds equally many tokens, so the tokens that go with a piece of a long document cost area: the lighter they
are, the larger the piece. Hence, one rank after the other:

1. The document with the heaviest rows left is the rank's anchor. If it fits, as the lightest chunks fill the rank, it
   is taken whole, and so are further documents, the heaviest first, as long as one fits. The rest is filled with whole
   light documents and one piece, chosen so that the area comes out right and the cut costs little.
2. Otherwise the rank gets a piece from the anchor's heavy end and between a few and some more chunks of its light end:
   the rank reads their keys anyway. Light documents fill the rest, and need not be cut for it: how many chunks
   of either end the rank gets follows from what the filling leaves of tokens and area, so both come out right.

Rows that many ranks read keep their owner sending. So each rank of a long document takes no more of it than it can
send, and a share of its light end where even a rank that fills little of its area there would send too much.
:mod:`magi_attention.plan.spread` mends what comes out above the limit.

For a causal mask this ends in pairs of runs from both ends, for a sliding window in one run per rank.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from magi_attention.plan.chunk_size import TILE
from magi_attention.plan.documents import Documents, Owner
from magi_attention.plan.filling import Array, Floats, Lights
from magi_attention.plan.filling_search import FillingSearch

# What the first ranks take above the mean area saves pieces of long documents.
# It saves too little to be worth the imbalance where there are fewer documents than FEW of the ranks, unless all chunks
# are about equally heavy and runs of equal length almost balanced, or some are heavier than FINE of the mean area.
AIM_OF_FEW, FEW, FINE = 1.002, 0.25, 0.05
# Nor is it worth it in groups of up to SMALL_GROUP ranks, and of n ranks that have ENOUGH_ROWS * n² rows each: few rows
# travel there for what is computed meanwhile, and those of 8 ranks over fast links.
SMALL_GROUP, ENOUGH_ROWS = 4, 256
# A rank's aim is at most this multiple of the mean of what is left, so that the last ranks are not left idle.
LEAD = 1.1
# Costs of a filling are in rows. A filling of a given number of tokens that falls short of the budget by a share of the
# mean area costs LACK times that share of the rows that a piece of the anchor reads; one that exceeds it EXCESS times.
LACK, EXCESS = 2.21, 1000.0
# Beside both ends of the anchor, area that is not its heavy end's costs PRICE times that share, once more WASTE times
# where nobody uses it, and a chunk of the light end RESERVE of a mean chunk more than it weighs, as it may be needed
# later, or ALONE of that where both ends fill the rank alone.
PRICE, WASTE, RESERVE, ALONE = 0.82, 2.0, 0.25, 0.4
# A rank at the lower end of a long document fills so much of its area there, the rest with others' chunks.
OWN = 0.3
# The light end is worth using if the heavy end's chunks weigh so many times more.
GRADED = 1.15
# Where runs start anywhere, a kernel's tile at the end of a rank's longest-reading run holds other rows too, which cost
# as much as those of the run. With such a tile, a rank has up to TILED of the mean area, but may have WHOLE without.
TILED, WHOLE = 1.08, 0.985
# The light documents are listed anew after so many ranks.
RELIST = 16


def hides_travel(num_ranks: int, total: int) -> bool:
    """Whether ranks that share so many rows compute longer than rows travel, so that it is even areas that count."""
    return num_ranks <= SMALL_GROUP or total >= ENOUGH_ROWS * num_ranks**3


def most_beside_tile(documents: Documents, num_ranks: int, reach: Array | np.int64) -> Array:
    """The most area of ranks that read so many rows of one document, if that parts a kernel's tile."""
    mean = int(documents.area[-1]) / num_ranks
    return np.maximum(TILED * mean - TILE * reach, WHOLE * mean).astype(np.int64)


class Deal(FillingSearch):
    """Deals the chunks, rank after rank."""

    def run(self, aim_of_many: float, *, hides: bool, parts_tiles: bool, is_divided: bool = False) -> Owner:
        """Deal all chunks; returns the rank of each place of the line.

        Args:
            aim_of_many: where the first ranks may take more than the mean area, they take so many times as much.
            hides: whether travel is hidden, so that they may not.
            parts_tiles: whether they take less where they read far, as their runs part tiles.
            is_divided: whether chunks are divided afterwards, so that areas that fall short by less than one of the
                heavy end are not lost (:mod:`magi_attention.plan.sharpen`).
        """
        rest, num_ranks = self.area[-1], len(self.capacities)
        heaviest = int(self.chunk_area.max())
        self.is_divided = is_divided and heaviest * num_ranks <= FINE * rest
        few = len(self.heaviness) <= FEW * num_ranks and 4 * rest < 3 * heaviest * len(self.owner)
        self.is_even = hides or (few and heaviest * num_ranks <= FINE * rest)
        aim = int(rest * (AIM_OF_FEW if self.is_even else aim_of_many) / num_ranks)
        for rank, capacity in enumerate(self.capacities[:-1]):
            if rank % RELIST == 0:
                self.light_first, self.by_length = self._list_blocks(), self._list_by_length()
            self.rank, self.room, self.mean = rank, capacity, rest // (num_ranks - rank)
            anchor = self._choose_anchor()
            budget = max(self.mean, min(aim, int(self.mean * LEAD)))
            if parts_tiles:
                budget = min(budget, int(most_beside_tile(self.documents, num_ranks, np.int64(self.price))))
            self.budget = budget
            self._serve(anchor)
            rest -= budget - self.budget
        self.owner[self.owner < 0] = num_ranks - 1
        return self.owner

    def _choose_anchor(self) -> int:
        """The document with the heaviest rows left; sets the price, the rows that one more piece of it reads."""
        anchor = int(self.heaviness.argmax())
        low, high = self.low[anchor], self.high[anchor]
        self.price = max(self.cut[high - 1], self.cut[(low + high) // 2], self.cut[min(low + 1, high - 1)], 1)
        return anchor

    def _serve(self, anchor: int) -> None:
        """Fill one rank."""
        lights = self._lightest(anchor)
        if self._fits(anchor, lights):
            self._take_whole(anchor, lights)
            if self.room:
                self._fill(anchor, self._lightest(-1))
        else:
            self._take_ends(anchor, lights)

    def _take_whole(self, anchor: int, lights: Lights) -> None:
        """Take the anchor, then every document that still fits, the densest first, unless other fillings are tried."""
        self._take(anchor, self.low[anchor], self.high[anchor])
        if self.prefixes.few:
            return
        low, high = self.low, self.high
        self.by_density = [document for document in self.by_density if low[document] < high[document]]
        for document in self.by_density:
            if not self.room:
                break
            if self._fits(document, lights):
                self._take(document, low[document], high[document])

    def _take_ends(self, anchor: int, lights: Lights) -> None:
        """Take as much of the anchor's heavy end as the budget allows, some of its light end, and a filling."""
        low, high, room = self.low[anchor], self.high[anchor], self.room
        share = self.light_share[anchor]
        taken, light = self._split_room(anchor, share or 0, lights)
        if share is None:
            share = self.light_share[anchor] = self._share_of_light_end(anchor, taken)
            if share:
                taken, light = self._split_room(anchor, share, lights)
        readers = self._readers_of_rest(anchor)
        others = max(self.expected_readers[anchor] - 1, readers)
        if readers and share:
            # The lower the heavy end, the more ranks read it: those that send most of it are spared the light end.
            left = max(0, int((self.most_sent - taken * readers) / others))
            if left < share:
                taken, light = self._split_room(anchor, left, lights)
        light = max(light, room - taken - lights.tokens[-1])  # there is nothing else
        sendable = max(1, int((self.most_sent - light * others) / readers)) if readers else high - low
        if taken > sendable:
            taken = sendable
        elif self._is_light_end_better(anchor, taken, light):
            if taken + light < room:
                self._fill_between(anchor, taken, light, lights)
            taken, light = self._balance(anchor)
        self._take(anchor, high - taken, high)
        self._take(anchor, low, low + light)
        if self.room:
            self._fill(anchor, self._lightest(anchor))

    def _split_room(self, anchor: int, share: int, lights: Lights) -> tuple[int, int]:
        """How many chunks of the anchor's heavy end fit the budget, and how many of its light end to take with them.

        ``share`` chunks of the light end are taken in any case, more where they are lighter than what else is left.
        """
        low, high, area = self.low[anchor], self.high[anchor], self.area
        share = min(share, self.room, high - low)
        base, left = low + share, self.room - share
        most = min(left, high - base)
        # With m chunks of filling, the heavy end starts at ``place + m``. It fits if the filling weighs at most
        # ``spare`` more than what is before that place.
        place, spare, fewest = high - left, self.budget - area[base] + area[low] - area[high], left - most
        count, weight, own = 0, 0, 0
        for next_count, next_weight, next_own in self._lightest_fillings(base, most, left, lights):
            if next_count >= fewest and next_weight - area[place + next_count] <= spare:
                break
            count, weight, own = next_count, next_weight, next_own
        else:
            return 0, share + min(own, high - base, left)
        slope = (next_weight - weight) / max(next_count - count, 1)
        least, number = max(fewest, count), next_count
        while least < number:
            middle = (least + number) // 2
            if weight + slope * (middle - count) - area[place + middle] <= spare:
                number = middle
            else:
                least = middle + 1
        if next_own > own:
            own += number - count
        return left - number, share + min(own, high - base - left + number, number)

    def _lightest_fillings(self, base: int, most: int, left: int, lights: Lights) -> Iterator[tuple[int, int, int]]:
        """The lightest of up to ``left`` chunks: those of the document from ``base`` on and others' pieces, by density.

        Yields their number, their area and how many are the document's own, at most ``most``, wherever one kind follows
        the other.
        """
        area, chunk_area = self.area, self.chunk_area.data
        own = base
        for number, (_, start, stop) in enumerate(lights.pieces):
            density = (area[stop] - area[start]) // (stop - start)
            until = bisect_left(chunk_area, density, own, base + most)
            count = until - base + lights.tokens[number]
            weight = lights.areas[number]
            if until > own:
                if count >= left:
                    own = until - count + left
                    yield left, weight + area[own] - area[base], own - base
                    return
                own = until
                yield count, weight + area[own] - area[base], own - base
            if count + stop - start >= left:
                yield left, weight + area[own] - area[base] + density * (left - count), own - base
                return
            yield count + stop - start, lights.areas[number + 1] + area[own] - area[base], own - base
        own = min(base + most, base + left - lights.tokens[-1])
        yield own - base + lights.tokens[-1], lights.areas[-1] + area[own] - area[base], own - base

    def _share_of_light_end(self, anchor: int, taken: int) -> int:
        """How many chunks of the anchor's light end each of its ranks should take, so that none sends too much.

        The light end reaches up to the first place from where a rank doesn't send too much if OWN of its area is there.

        Args:
            anchor: the document.
            taken: how many chunks of the heavy end its first rank would take without such a share.
        """
        low, high, area = self.low[anchor], self.high[anchor], self.area
        ends_differ = 2 * (area[low + taken] - area[low]) < area[high] - area[high - taken]
        if not (taken and ends_differ and self._reads_light_end(anchor, taken)):
            return 0
        # The first rank takes the lightest filling, the last ones none.
        mean_area = (area[high] - area[high - taken] + self.budget) / 2
        num_ranks = self.expected_readers[anchor] = (area[high] - area[low]) / mean_area
        # A rank owns OWN * mean_area / chunk_area chunks there, read by those whose area lies above.
        enough = self.most_sent / OWN
        least, most = low, high
        while least < most:
            middle = (least + most) // 2
            is_read = 4 * self.cut[middle + 1] >= 3 * (middle + 1 - low) * self.chunk_size
            if is_read and area[high] - area[middle] > enough * (area[middle + 1] - area[middle]):
                least = middle + 1
            else:
                most = middle
        return math.ceil((least - low) / num_ranks) if least - low > num_ranks / 2 else 0

    def _reads_light_end(self, anchor: int, taken: int) -> bool:
        """Whether ``taken`` chunks of the anchor's heavy end read most of what is left of it."""
        low, high = self.low[anchor], self.high[anchor]
        return 4 * self.cut[high - taken] >= 3 * (high - taken - low) * self.chunk_size

    def _is_light_end_better(self, anchor: int, taken: int, light: int) -> bool:
        """Whether chunks of the light end cost a rank with the heavy end no rows and are much lighter."""
        low, high, area = self.low[anchor], self.high[anchor], self.area
        light = min(max(light, 1), high - low)
        is_lighter = (area[low + light] - area[low]) * taken * GRADED < (area[high] - area[high - taken]) * light
        return is_lighter and self._reads_light_end(anchor, taken)

    def _balance(self, anchor: int) -> tuple[int, int]:
        """Fill the room with both ends of the anchor: as many chunks of the heavy one as the budget allows."""
        low, high, room, area = self.low[anchor], self.high[anchor], self.room, self.area
        if high - low <= room:
            return high - low, 0
        least, most = 0, room
        while least < most:
            heavy = (least + most + 1) // 2
            if area[high] - area[high - heavy] + area[low + room - heavy] - area[low] <= self.budget:
                least = heavy
            else:
                most = heavy - 1
        return least, room - least

    def _fill_between(self, anchor: int, taken: int, light: int, lights: Lights) -> None:
        """Take others' chunks that go with about ``taken`` chunks of the anchor's heavy end and ``light`` of the other.

        From tokens and area of the filling follow the numbers of chunks of both ends, and from these its cost. Nothing
        is taken where both ends cost less alone.
        """
        low, high, room, area = self.low[anchor], self.high[anchor], self.room, self.area
        shorter = max(1, int(self.prefixes.shorter * room), light)
        top, bottom = max(1, taken), min(light + shorter, high - low)
        heavy_chunk = (area[high] - area[high - top]) / top
        light_chunk = (area[low + bottom] - area[low]) / bottom
        reserve = RESERVE * self.budget / room
        dearness = PRICE * self.price / max(self.mean, 1)
        # But for PRICE * budget, which all fillings have in common, the costs are
        # PRICE * ((budget - heavy_chunk * heavy) + RESERVE * (left - heavy) + WASTE * (spare - slope * heavy)).
        slope = max(heavy_chunk - light_chunk, 1.0)
        per_left = dearness * reserve
        per_spare = dearness * WASTE
        per_heavy = dearness * (heavy_chunk + reserve) + per_spare * slope

        def cost(tokens: Array | float, areas: Floats) -> Floats:
            left = room - tokens
            spare = (self.budget - light_chunk * left) - areas
            heavy = spare / slope
            if not self.is_divided:
                np.floor(heavy, out=heavy)
            np.minimum(heavy, left, out=heavy)
            heavy *= -per_heavy
            heavy[spare < 0] = np.inf
            spare *= per_spare
            heavy += spare
            heavy += per_left * left
            return heavy

        price, pieces = self._cheapest(anchor, lights, room - taken - light, shorter, cost)
        # Ranks with that many cells hardly ever come out better so.
        heavy, rest = (0, 0) if self.is_divided and not self.prefixes.few else self._balance(anchor)
        if heavy and heavy + rest == room:
            spare = self.budget - (area[high] - area[high - heavy]) - (area[low + rest] - area[low])
            alone = dearness * (ALONE * reserve * rest - heavy_chunk * heavy + WASTE * spare)
            if alone <= price:
                return
        self._take_all(pieces)

    def _fill(self, anchor: int, lights: Lights) -> None:
        """Fill the room with some of the lightest pieces and one end of one more document."""
        dearness = self.price / max(self.mean, 1)

        def cost(_: Array | float, areas: Floats) -> Floats:
            lack = self.budget - areas
            return np.maximum(lack * (LACK * dearness), lack * (-EXCESS * dearness))

        while self.room:
            price, pieces = self._cheapest(anchor, lights, self.room, 0, cost)
            if price == np.inf:
                self._fill_with_anything(lights.pieces)
                return
            self._take_all(pieces)
            lights = self._lightest(anchor)
