# SPDX-License-Identifier: Apache-2.0
"""Search for what fills a rank and cuts few documents."""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from magi_attention.plan.filling import Array, Filling, Floats, Lights

# Documents are graded if a cut near the light end costs so many times less than the dearest one.
GRADED_CUTS = 2

Cost = Callable[[Array | float, Floats], Floats]
"""What fillings cost, by their numbers of chunks and their areas, but for the documents that they part."""


class FillingSearch(Filling):
    """Finds the cheapest filling of a rank: the first light pieces and up to two more documents or ends of them."""

    def _cheapest(
        self, anchor: int, lights: Lights, most: int, shorter: int, cost: Cost
    ) -> tuple[float, list[tuple[int, int, int]]]:
        """The cheapest filling of at most ``most`` chunks and at least ``most - shorter``: its cost and its pieces.

        If ``shorter`` is 0, it may also be the first part of a filling, whose rest is to be chosen next.

        It consists of the first light pieces and perhaps one more document or an end of one, or two documents, or of
        one document and an end of another. Its cost is that of parting documents and what ``cost`` says of numbers of
        chunks and areas; infinite if there is none.
        """
        pieces, tokens, _ = lights
        longest = bisect_right(tokens, most) - 1
        first_long = max(0, longest - self.prefixes.long + 1)
        prefixes = [*range(min(self.prefixes.short, first_long)), *range(first_long, longest + 1)]
        paid = [0]
        for document, _, stop in pieces[:longest]:
            paid.append(paid[-1] + (self.cut[stop] if stop < self.high[document] else 0))
        # What is used counts as empty.
        length = self.length.copy()
        length[anchor] = 0
        least, chosen = self._extend_by_two(length, most, shorter, cost) if self.prefixes.few else (np.inf, [])
        price, best, piece = self._extend(length, lights, prefixes, paid, most, shorter, cost)
        if price < least:
            least, chosen = price, [piece]
        else:
            best = 0
        if self.prefixes.paired and (not shorter or self.rank < self.prefixes.early * len(self.capacities)):
            # Light ends are cheap only where documents are graded; ends are tried with one document as well.
            is_graded = GRADED_CUTS * self.cut[min(self.low[anchor] + 1, self.high[anchor])] <= self.price
            is_exact = shorter > 0 or self.prefixes.few > 0 or not is_graded
            price, number, pair = self._pair(length, lights, longest, most, paid, cost, is_exact=is_exact)
            if price < least:
                least, best, chosen = price, number, [(each, self.low[each], self.high[each]) for each in pair]
        return least, [*pieces[:best], *chosen]

    def _extend(
        self,
        length: Array,
        lights: Lights,
        prefixes: list[int],
        paid: list[int],
        most: int,
        shorter: int,
        cost: Cost,
    ) -> tuple[float, int, tuple[int, int, int]]:
        """The cheapest filling by first light pieces and an end of one document, or all of one that is a bit shorter.

        Args:
            length: chunks of each document that are not used; without those of the pieces of all prefixes, afterwards.
            lights: the light pieces.
            prefixes: how many of them are tried, ascending.
            paid: what it costs to take the first k.
            most: chunks of the filling.
            shorter: how many of them may be missing.
            cost: see :meth:`_cheapest`.

        Returns:
            Its cost, infinite if there is none, how many pieces it has, and the document, its start and its stop.
        """
        pieces, tokens, areas = lights
        candidates, sizes, tried, used = [], [], [], 0
        for number in prefixes:
            for document, _, _ in pieces[used:number]:
                length[document] = 0
            used = number
            want = most - tokens[number]
            found = (length >= want - shorter).nonzero()[0]
            if len(found):
                candidates.append(found)
                sizes.append(np.minimum(want, length.take(found)))
                tried.append(number)
        if not tried:
            return np.inf, 0, (0, 0, 0)
        if len(tried) == 1:
            only = tried[0]
            documents, size = candidates[0], sizes[0]
            price, place, start = self._cheapest_end(
                documents, size, size + tokens[only], areas[only], paid[only], cost
            )
        else:
            documents, size = np.concatenate(candidates), np.concatenate(sizes)
            row, before = np.zeros(len(documents), np.int64), 0
            for found in candidates[:-1]:
                before += len(found)
                row[before:] += 1
            counts, filled, parted = (
                np.array([values[number] for number in tried]).take(row) if any(values) else 0
                for values in (tokens, areas, paid)
            )
            price, place, start = self._cheapest_end(documents, size, size + counts, filled, parted, cost)
            only = tried[row.item(place)]
        return price, only, (int(documents[place]), start, start + int(size[place]))

    def _extend_by_two(
        self, length: Array, most: int, shorter: int, cost: Cost
    ) -> tuple[float, list[tuple[int, int, int]]]:
        """The cheapest filling of a whole document and an end of another, as :meth:`_extend` finds one document."""
        free = length.nonzero()[0]
        if len(free) > self.prefixes.few:
            return np.inf, []
        length = length.take(free)
        missing = most - length
        is_possible = (missing[:, None] > 0) & (length >= (missing - shorter)[:, None])
        np.fill_diagonal(is_possible, False)
        first, other = is_possible.nonzero()
        if not len(first):
            return np.inf, []
        area = self.area_stop.take(free) - self.area_start.take(free)
        size = np.minimum(missing.take(first), length.take(other))
        ends = free.take(other)
        price, place, start = self._cheapest_end(ends, size, size + length.take(first), area.take(first), 0, cost)
        whole = int(free[first[place]])
        return price, [(whole, self.low[whole], self.high[whole]), (int(ends[place]), start, start + int(size[place]))]

    def _cheapest_end(
        self,
        documents: Array,
        size: Array,
        tokens: Array,
        filled: Array | Floats | int,
        parted: Array | int,
        cost: Cost,
    ) -> tuple[float, int, int]:
        """Of the light and the heavy ends of so many chunks of free documents the cheapest.

        Args:
            documents: ``(n,)`` the documents.
            size: ``(n,)`` chunks of each piece.
            tokens: ``(n,)`` the same together with what it completes.
            filled: the area of what it completes; of each, or of all.
            parted: what it costs to part documents for that; for each, or for all.
            cost: see :meth:`_cheapest`.

        Returns:
            The cost, the place among the documents, and where the piece starts.
        """
        number = len(documents)
        # First the pieces from the light ends, then those from the heavy ends.
        ends = np.concatenate([documents, documents + len(self.start)])
        inner = np.concatenate([size, -size])
        inner += self.ends.take(ends)
        area = self.area_float.take(inner)
        area -= self.area_ends.take(ends)
        np.abs(area, out=area)
        area += filled if isinstance(filled, int) else np.concatenate([filled, filled])
        whole = (size == self.length.take(documents)).nonzero()[0]
        costs = cost(np.concatenate([tokens, tokens]), area)
        parting = self.cut_float.take(inner)
        parting[whole] = parting[whole + number] = 0
        costs += parting
        if not isinstance(parted, int):
            costs += np.concatenate([parted, parted])
        elif parted:
            costs += parted
        from_heavy_end, place = divmod(least := int(costs.argmin()), number)
        document = documents[place]
        start = self.high[document] - int(size[place]) if from_heavy_end else self.low[document]
        return costs.item(least), place, start

    def _pair(
        self,
        length: Array,
        lights: Lights,
        longest: int,
        most: int,
        paid: list[int],
        cost: Cost,
        *,
        is_exact: bool = True,
    ) -> tuple[float, int, list[int]]:
        """The cheapest filling of ``most`` chunks by first light pieces and up to two more documents.

        Returns its cost, infinite if there is none, the number of pieces and the documents. Of documents of equal
        length, the lightest counts. Unless the filling ``is_exact``, some chunks may be missing, which cost as much as
        the light end of a document that is parted for them.
        """
        _, tokens, areas = lights
        first = max(0, longest + 1 - self.prefixes.paired)
        prefixes = slice(first, longest + 1)
        free = most - tokens[first]
        # What is used is as long as it was listed no more.
        known, documents = self.by_length
        unused = length
        usable = (length.take(documents) == known)[: int(known.searchsorted(free, side="right"))].nonzero()[0]
        known, documents = known.take(usable), documents.take(usable)
        # No document comes first. Where several are as long, the last one counts, the lightest.
        length = np.append(0, known)
        area_of, nearest = np.zeros(free + 1), np.zeros(free + 1, np.int64)
        area_of[known] = self.area_stop.take(documents) - self.area_start.take(documents)
        nearest[known] = known
        if not is_exact:
            np.maximum.accumulate(nearest, out=nearest)
        gap = np.subtract.outer(most - np.array(tokens[prefixes]), length).ravel()
        other = nearest.take(gap, mode="clip")
        rest = gap - other
        found = (rest == 0 if is_exact else rest >= 0).nonzero()[0]
        row = found // len(length)
        column = found - row * len(length)
        one, other = length.take(column), other.take(found)
        total = area_of.take(one)
        total += area_of.take(other)
        total += np.array(areas[prefixes]).take(row)
        costs = cost(float(most), total)
        if any(paid):
            costs += np.array(paid[prefixes]).take(row)
        rest = rest.take(found)
        if not is_exact:
            costs += self._cost_of_rest(rest, unused)
        while len(costs) and (least := costs.item(place := int(costs.argmin()))) < np.inf:
            lengths = one.item(place), other.item(place)
            # Neither twice the same document nor none at all.
            if lengths[0] != lengths[1] or not (lengths[0] or rest.item(place)):
                chosen = np.searchsorted(known, [each for each in lengths if each], side="right") - 1
                return least, first + row.item(place), documents.take(chosen).tolist()
            costs[place] = np.inf
        return np.inf, 0, []

    def _cost_of_rest(self, rest: Array, length: Array) -> Floats:
        """What it costs to part a document for each of some numbers of chunks: the shortest that has more.

        ``length`` are the chunks that documents have.
        """
        documents = np.argsort(length, kind="stable")
        length = length.take(documents)
        place = length.searchsorted(rest)
        found = np.flatnonzero((place < len(length)) & (rest > 0))
        costs = np.where(rest > 0, np.inf, 0.0)
        costs[found] = self.cut_float.take(self.start.take(documents.take(place[found])) + rest[found])
        return costs
