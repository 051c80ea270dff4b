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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.totals import totals

Array = NDArray[np.int64]
AreaBefore = Callable[[Array], Array]

# Runs of a document are heavy and light if their rows weigh so many times more.
HEAVIER = 2
# Densities change as runs are shifted; what is missing then, or too much, is moved in a further round or two.
LEAST_ROUNDS, MOST_ROUNDS = 2, 3
# Areas may exceed what is aimed at by this part of it, since rows are heavy: 1.0199 of the mean by less than 0.0001.
BEYOND = 10400


class Ends(NamedTuple):
    """Ranks with a heavy and a light run in one document, those of a document together, the heaviest first.

    Attributes:
        rank: ``(n,)`` the ranks.
        heavy: ``(n,)`` the heavy run of each.
        light: ``(n,)`` its light run.
        document: ``(n,)`` the document of both.
    """

    rank: Array
    heavy: Array
    light: Array
    document: Array


def sharpen(
    begin: Array, rank: Array, document: Array, load: Array, limit: Array, area_before: AreaBefore, measure: AreaBefore
) -> tuple[Array, Array]:
    """Shift the ends of runs.

    Args:
        begin: ``(n + 1,)`` where runs start, and the end of the sequence; a run has rows of one document.
        rank: ``(n,)`` the rank of each run.
        document: ``(n,)`` its document.
        load: ``(num_ranks,)`` the area of each rank.
        limit: ``(num_ranks,)`` the most area that each rank should have.
        area_before: about the mask area before each of some rows.
        measure: the exact area of each run, given as ``begin`` is.

    Returns:
        New arrays like ``begin`` and ``load``; all ranks have as many rows as before.
    """
    weight = np.diff(area_before(begin)) // np.maximum(np.diff(begin), 1)
    ends = _find_ends(rank, document, weight)
    best, least = begin, load
    if not len(ends.rank):
        return best, least
    most = np.maximum(limit + limit // BEYOND, load)
    for number in range(1, MOST_ROUNDS + 1):
        begin = _shift(begin, ends, area_before, limit - load)
        load = totals(rank, measure(begin), len(limit))
        if (load <= most).all():
            best, least = begin, load
            if number >= LEAST_ROUNDS:
                break
    return best, least


def _find_ends(rank: Array, document: Array, weight: Array) -> Ends:
    """The ends, given what a row of each run weighs; each rank has one pair at most, that of its heaviest rows."""
    pair = document * (int(rank.max()) + 1) + rank
    order = np.lexsort((weight, pair))
    first = np.flatnonzero(np.diff(pair[order], prepend=-1))
    light, heavy = order[first], order[np.append(first[1:], len(order)) - 1]
    graded = np.flatnonzero(weight[heavy] >= HEAVIER * np.maximum(weight[light], 1))
    light, heavy = light[graded], heavy[graded]
    order = np.argsort(-weight[heavy], kind="stable")
    order = order[np.sort(np.unique(rank[heavy[order]], return_index=True)[1])]
    order = order[np.argsort(document[heavy[order]], kind="stable")]
    heavy, light = heavy[order], light[order]
    return Ends(rank[heavy], heavy, light, document[heavy])


def _shift(begin: Array, ends: Ends, area_before: AreaBefore, slack: Array) -> Array:
    """Move so many rows between both runs of each rank that it gets about ``slack`` more area."""
    rows = np.diff(begin)
    # What rows at both ends of the heavy runs weigh, and those at the upper ends of the light ones.
    places = np.stack([begin[ends.heavy], begin[ends.heavy + 1] - 1, begin[ends.light + 1] - 1])
    one, other, light = np.diff(area_before(np.stack([places, places + 1]).ravel()).reshape(2, 3, -1), axis=0)[0]
    low, high = np.minimum(one, other), np.maximum(one, other)
    columns = (
        ends.document,
        slack[ends.rank],
        high - low,
        np.maximum(low - light, 1),
        1 - rows[ends.heavy],
        np.maximum(rows[ends.light] - 1, 0),
    )
    moved = []
    for _, ranks in groupby(zip(*[each.tolist() for each in columns], strict=True), key=lambda row: row[0]):
        shift = 0
        for _, free, fall, gain, least, most in ranks:
            number = max(min((free + shift * fall) // gain, most), least)
            shift += number
            moved.append(number)
    rows[ends.heavy] += moved
    rows[ends.light] -= moved
    return np.append(0, np.cumsum(rows))
