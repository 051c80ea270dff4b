# SPDX-License-Identifier: Apache-2.0
"""Swap equally long runs between ranks until no rank exceeds a limit."""

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import expand_counts
from magi_attention.plan.documents import Documents
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]
Ends = tuple[Array, Array, Array, Array]

# How many of the lightest ranks are tried as partners of the heaviest one and, if none of them will do, how many others
# of the lighter half; swaps per rank before giving up.
PARTNERS, FURTHER, SWAPS_PER_RANK = 3, 12, 4


def even_out(owner: Array, documents: Documents, num_ranks: int, limit: int) -> Array:
    """Lower the loads of all ranks to ``limit`` where swaps can do it; the counts stay as they are.

    Args:
        owner: ``(num_chunks,)`` the rank of each place of the line.
        documents: the line.
        num_ranks: ranks of the group.
        limit: the most mask area that a rank should have.

    Returns:
        A new array like ``owner``.
    """
    owner = owner.copy()
    load = totals(owner, np.diff(documents.area), num_ranks)
    for _ in range(SWAPS_PER_RANK * num_ranks):
        heavy = int(np.argmax(load))
        if load[heavy] <= limit:
            break
        by_load = np.argsort(load, kind="stable")
        runs = _find_runs(owner)
        offered = _ends_of_runs(runs, heavy, documents)
        swap = None
        for partners in (by_load[:PARTNERS], by_load[PARTNERS : num_ranks // 2 : max(1, num_ranks // (2 * FURTHER))]):
            swaps = [
                (*_best_swap(offered, _ends_of_runs(runs, light, documents), load[heavy], load[light], limit), light)
                for light in partners.tolist()
            ]
            swap = min((each for each in swaps if each[1] < load[heavy]), default=None)
            if swap is not None:
                break
        if swap is None:
            break
        _, _, given, taken, length, light = swap
        owner[given : given + length] = light
        owner[taken : taken + length] = heavy
        moved = documents.area[given + length] - documents.area[given]
        moved -= documents.area[taken + length] - documents.area[taken]
        load[heavy] -= moved
        load[light] += moved
    return owner


def _best_swap(
    offered: Ends, wanted: Ends, heavy_load: int, light_load: int, limit: int
) -> tuple[int, int, int, int, int]:
    """The cheapest swap that brings both ranks to the limit, or the one that brings them nearest to it.

    Returns its cost, the load of the then heavier of the two, both starts and the length.
    """
    start, length, area, cost = offered
    start2, length2, area2, cost2 = wanted
    worst = np.iinfo(np.int64).max
    by_length = np.argsort(length2, kind="stable")
    first = np.searchsorted(length2[by_length], length)
    i, step = expand_counts(np.searchsorted(length2[by_length], length, side="right") - first)
    if not len(i):
        return worst, worst, 0, 0, 0
    j = by_length[first[i] + step]
    moved = area[i] - area2[j]
    peak = np.maximum(heavy_load - moved, light_load + moved)
    price = np.where(peak <= limit, cost[i] + cost2[j], worst)
    place = int(np.argmin(price))
    if price[place] == worst:
        place = int(np.argmin(peak))
    return int(price[place]), int(peak[place]), int(start[i[place]]), int(start2[j[place]]), int(length[i[place]])


def _find_runs(owner: Array) -> tuple[Array, Array, Array]:
    """The first place of each run, the place after its last, and its rank."""
    first = np.append(0, np.flatnonzero(owner[1:] != owner[:-1]) + 1)
    return first, np.append(first[1:], len(owner)), owner[first]


def _ends_of_runs(runs: tuple[Array, Array, Array], rank: int, documents: Documents) -> Ends:
    """Pieces of several lengths from both ends of a rank's runs: their starts, lengths, areas and costs of the cut."""
    first, last = (ends[runs[2] == rank] for ends in runs[:2])
    longest = int((last - first).max())
    powers = 1 << np.arange(longest.bit_length())
    sizes = np.column_stack([powers, powers + powers // 2]).ravel()[1:]
    run, choice = np.nonzero(sizes <= (last - first)[:, None])
    length = sizes[choice]
    whole = length == (last - first)[run]
    start = np.concatenate([first[run], last[run] - length])
    inner = np.concatenate([first[run] + length, last[run] - length])
    length = np.tile(length, 2)
    area = documents.area[start + length] - documents.area[start]
    return start, length, area, documents.cut[inner] * ~np.tile(whole, 2)
