# SPDX-License-Identifier: Apache-2.0
"""Use up the area that ranks of long documents have left, row by row, so that fewer rows are received.

A cell at the heavy end of a long document is one or several percent of a rank's area, so most ranks are dealt some
tenths of a percent less than they may have. A rank that holds both heavy and light rows of a document can have more of
the heavy ones for as many of the light ones. What lies between its two runs is shifted by as many rows, so that all
ranks that come after it read less, and get light rows for heavy ones themselves. The ranks of a document are served in
the order of their heavy runs: what a rank gets back from those before it, it can take of those after it.
"""

from collections.abc import Callable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]

# Runs of a document are heavy and light if their rows weigh so many times more.
GRADED = 2
# Densities change as runs are shifted; what is still missing then, or too much, is moved in further rounds.
ROUNDS = 3


class Ends:
    """Ranks with a heavy and a light run in one document, those of a document together, the heaviest first.

    Attributes:
        rank: ``(n,)`` the ranks.
        heavy: ``(n,)`` the heavy run of each.
        light: ``(n,)`` its light run.
        document: ``(n,)`` the document of both.
    """

    def __init__(self, rank: Array, document: Array, weight: Array) -> None:
        num_ranks = int(rank.max()) + 1
        pair = document * num_ranks + rank
        order = np.lexsort((weight, pair))
        first = np.flatnonzero(np.diff(pair[order], prepend=-1))
        light, heavy = order[first], order[np.append(first[1:], len(order)) - 1]
        graded = np.flatnonzero(weight[heavy] >= GRADED * np.maximum(weight[light], 1))
        light, heavy = light[graded], heavy[graded]
        # Of each rank, the heaviest run counts.
        order = np.argsort(-weight[heavy], kind="stable")
        order = order[np.sort(np.unique(rank[heavy[order]], return_index=True)[1])]
        order = order[np.argsort(document[heavy[order]], kind="stable")]
        self.heavy, self.light = heavy[order], light[order]
        self.rank, self.document = rank[self.heavy], document[self.heavy]


def sharpen(
    begin: Array, rank: Array, document: Array, area_before: Callable[[Array], Array], limit: Array
) -> Array:
    """Shift the ends of runs.

    Args:
        begin: ``(n + 1,)`` where runs start, and the end of the sequence; a run has rows of one document.
        rank: ``(n,)`` the rank of each run.
        document: ``(n,)`` its document.
        area_before: the mask area before each of some rows.
        limit: ``(num_ranks,)`` the most area that each rank should have.

    Returns:
        A new array like ``begin``; all ranks have as many rows as before.
    """
    area = area_before(begin)
    load = np.bincount(rank, weights=np.diff(area), minlength=len(limit))
    ends = Ends(rank, document, np.diff(area) // np.maximum(np.diff(begin), 1))
    best, most = begin, np.maximum(limit, load)
    for _ in range(ROUNDS):
        begin = _shift(begin, ends, area_before, limit - load)
        load = np.bincount(rank, weights=np.diff(area_before(begin)), minlength=len(limit))
        if (load <= most).all():
            best = begin
    return best


def _shift(begin: Array, ends: Ends, area_before: Callable[[Array], Array], slack: Array) -> Array:
    """Move so many rows between both runs of each rank that it gets about ``slack`` more area."""
    rows = np.diff(begin)
    start, stop = begin[ends.heavy], begin[ends.heavy + 1]
    low, high = np.diff(area_before(np.concatenate([start, start + 1, stop - 1, stop])).reshape(2, 2, -1), axis=1)[:, 0]
    low, high = np.minimum(low, high), np.maximum(low, high)
    light = begin[ends.light + 1]
    light = np.diff(area_before(np.concatenate([light - 1, light])).reshape(2, -1), axis=0)[0]
    table = zip(
        ends.document.tolist(),
        slack[ends.rank].tolist(),
        (high - low).tolist(),
        np.maximum(low - light, 1).tolist(),
        (1 - rows[ends.heavy]).tolist(),
        (rows[ends.light] - 1).tolist(),
        strict=True,
    )
    moved = []
    for _, each in groupby(table, key=lambda row: row[0]):
        shift = 0
        for _, free, fall, gain, least, most in each:
            number = max(min(int((free + shift * fall) // gain), most), least)
            shift += number
            moved.append(number)
    rows[ends.heavy] += np.array(moved, np.int64)
    rows[ends.light] -= np.array(moved, np.int64)
    return np.append(0, np.cumsum(rows))
