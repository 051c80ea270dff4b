# SPDX-License-Identifier: Apache-2.0
"""How few key rows any balanced deal can make the ranks receive.

Take a key row j. The query rows that read it must lie on some number of ranks, at most one of which owns j, so the
others receive it. That number has a lower bound ``m``: of the deals that give every rank ``total / num_ranks`` rows
and at most ``1 + tolerance`` times the mean area, m ranks hold exactly ``m * total / num_ranks`` rows, and if all
readers are among them, the rest of these rows weigh no less than the lightest rows of the sequence. So m must satisfy

    area(readers) + lightest(m * total / num_ranks - count(readers)) <= m * (1 + tolerance) * total area / num_ranks.

Ranks may serve several documents at once, which the sum over all keys overlooks: it lets each document use the lightest
rows. Hence the second bound: take one key from each of k documents. No row reads two of them, so the ranks that receive
them are, with multiplicity, at least ``m(union of their readers) - k``. The bound below takes the keys of each document
from the one read most to the one read least, one of each document at a time, and for each such set the better bound
over all k, the documents beyond k counted one by one.

It is exact for full masks, and for causal ones nearly so (the pairs of runs from both ends reach it but for the
tolerance). It is loose where few rows read a key, as with sliding windows (it is 0 where a rank can hold all readers of
a key, although some keys' readers must be parted), and it knows nothing of chunks and of what parting light documents
costs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable, distinct, expand_counts
from magi_attention.plan.documents import component_starts
from magi_attention.plan.row_areas import LightestRows, RowAreas
from magi_attention.plan.totals import totals
from magi_attention.plan.two_sided import key_documents

Array = NDArray[np.int64]

# Keys are treated in pieces of 1 / GRID of the sequence, sets of keys in pieces of 1 / LEVELS of the longest document.
GRID, LEVELS = 2048, 256
# Only so many documents, those with the most work, are bounded together.
JOINT_DOCUMENTS = 64


def received_lower_bound(
    slices: SliceTable, total: int, num_ranks: int, tolerance: float = 0.02, total_keys: int | None = None
) -> int:
    """Bound from below the key rows that all ranks together receive.

    Args:
        slices: the mask; no pair covered twice.
        total: rows of the sequence, or of that of queries, equally many on each rank.
        num_ranks: ranks of the group.
        tolerance: a rank's area may exceed the mean by this share.
        total_keys: rows of the sequence of keys, where that is another one; None in self-attention.

    Returns:
        A number of rows that no deal of the rows to the ranks stays below, whatever its chunks.
    """
    bands, _ = band.shrink(slices.bands())
    if not len(bands) or num_ranks == 1:
        return 0
    areas = RowAreas.of(slices, total)
    ranks = Ranks.of(areas, num_ranks, tolerance)
    if total_keys is None:
        starts = component_starts(slices)
        component = np.arange(len(starts))
    else:
        starts, component = key_documents(slices)
    component = np.append(component, -1)  # of keys before the first start, which nobody reads
    cuts, least_count, least_area = _readers(bands, areas, starts, total_keys or total)
    document = component[np.searchsorted(starts, cuts[:-1], side="right") - 1]
    # In each document from the key read most to the one read least.
    order = np.lexsort((-least_area, document))
    length = np.diff(cuts)[order]
    count, area, document = least_count[order], least_area[order], document[order]
    single = np.maximum(ranks.needed(count, count, area) - 1, 0)
    per_document = totals(document, single * length, len(starts) + 1)
    weight = np.zeros(len(starts) + 1, np.int64)
    np.maximum.at(weight, document, area)
    joint = [d for d in np.argsort(-weight, kind="stable")[:JOINT_DOCUMENTS] if weight[d]]
    alone = int(per_document.sum() - per_document[joint].sum())
    members = [np.flatnonzero(document == d) for d in joint]
    return alone + _joint_bound(ranks, [(count[i], area[i], length[i]) for i in members])


@dataclass(frozen=True, eq=False)
class Ranks:
    """What ranks can hold: ``rows`` each, an area of ``most`` each, and what the lightest rows weigh."""

    num: int
    rows: float
    most: float
    lightest: LightestRows

    @classmethod
    def of(cls, areas: RowAreas, num_ranks: int, tolerance: float) -> "Ranks":
        """Of rows with these areas."""
        most = int(areas.area_up_to[-1]) * (1 + tolerance) / num_ranks
        return cls(num_ranks, int(areas.cuts[-1]) / num_ranks, most, LightestRows.of(areas))

    def needed(self, fewest: Array, most: Array, area: Array) -> Array:
        """How many ranks at least hold so many rows, from ``fewest`` to ``most``, of at least ``area`` in all.

        The room for area beside the lightest rows is a concave function of the number of ranks, and all ranks
        together hold everything, so that bisection finds the least number that suffices.
        """
        low = np.ones_like(area)
        high = np.full_like(area, self.num)
        for _ in range(self.num.bit_length()):
            middle = (low + high) // 2
            held = middle * self.rows
            # A rounding error must not raise the bound.
            needed = area + self.lightest.area(held - most)
            enough = (held >= fewest - 1e-6) & (needed <= middle * self.most * (1 + 1e-12))
            high = np.where(enough, middle, high)
            low = np.where(enough, low, np.minimum(middle + 1, high))
        return high


def _readers(bands: Bands, areas: RowAreas, starts: Array, num_keys: int) -> tuple[Array, Array, Array]:
    """Cut the keys into pieces; for each, the number and area of the rows that read the whole piece."""
    grid = np.arange(0, num_keys, max(1, num_keys // GRID))
    cuts = distinct(np.concatenate([grid, starts, bands[:, band.K0], bands[:, band.K1], [0, num_keys]]))
    first = np.searchsorted(cuts, bands[:, band.K0])
    owner, step = expand_counts(np.searchsorted(cuts, bands[:, band.K1]) - first)
    piece = first[owner] + step
    q0, q1, _, _, d0, d1 = bands[owner].T
    low = np.maximum(q0, cuts[piece + 1] - 1 - d1)
    high = np.maximum(low, np.minimum(q1, cuts[piece] - d0 + 1))
    count = totals(piece, high - low, len(cuts) - 1)
    return cuts, count, totals(piece, areas.before(high) - areas.before(low), len(cuts) - 1)


def _joint_bound(ranks: Ranks, documents: list[tuple[Array, Array, Array]]) -> int:
    """Sum the bound over sets of one key per document, for documents given as counts, areas and lengths of pieces."""
    ends = [np.cumsum(length) for _, _, length in documents]
    longest = max(int(end[-1]) for end in ends)
    cuts = np.unique(np.concatenate([np.linspace(0, longest, LEVELS + 1).astype(np.int64), [end[-1] for end in ends]]))
    fewest, most, area = np.zeros((3, len(documents), len(cuts) - 1), np.int64)
    for row, (counts, areas, _) in enumerate(documents):
        there = int(np.searchsorted(cuts, ends[row][-1]))
        first = np.searchsorted(ends[row], cuts[:there], side="right")
        last = np.searchsorted(ends[row], cuts[1 : there + 1])
        slices = np.column_stack([first, last + 1]).ravel()
        fewest[row, :there] = np.minimum.reduceat(np.append(counts, 0), slices)[::2]
        most[row, :there] = np.maximum.reduceat(np.append(counts, 0), slices)[::2]
        area[row, :there] = areas[last]
    order = np.argsort(-area, axis=0, kind="stable")
    fewest, most, area = (np.take_along_axis(values, order, 0) for values in (fewest, most, area))
    single = np.maximum(ranks.needed(fewest, most, area) - 1, 0)
    beyond = np.cumsum(single[::-1], axis=0)[::-1]
    beyond = np.concatenate([beyond, np.zeros_like(beyond[:1])])
    together = ranks.needed(*(np.cumsum(values, axis=0) for values in (fewest, most, area)))
    together = together - np.arange(1, len(documents) + 1)[:, None] + beyond[1:]
    return int((np.maximum(beyond[0], together.max(axis=0)) * np.diff(cuts)).sum())
