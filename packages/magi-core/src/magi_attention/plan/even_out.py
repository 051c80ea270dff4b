# SPDX-License-Identifier: Apache-2.0
"""Swap equally long runs between ranks until no rank exceeds a limit."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import expand_counts
from magi_attention.plan.documents import Documents, Owner
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]


class Ends(NamedTuple):
    """Pieces of the ends of runs: their rank, start, length, area and what the cut costs."""

    rank: Owner
    start: Array
    length: Array
    area: Array
    cost: Array


# How many of the lightest ranks are tried as partners of the heaviest one and, if none of them will do, how many others
# of the lighter half; swaps per rank before giving up.
PARTNERS, FURTHER, SWAPS_PER_RANK = 3, 12, 4


def even_out(owner: Owner, documents: Documents, num_ranks: int, limit: int) -> Owner:
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
    first, last, rank = _find_runs(owner)
    load = totals(rank, documents.area[last] - documents.area[first], num_ranks)
    for _ in range(SWAPS_PER_RANK * num_ranks):
        heavy = int(np.argmax(load))
        if load[heavy] <= limit:
            break
        by_load = np.argsort(load, kind="stable")
        runs = _find_runs(owner)
        offered = _ends_of_runs(runs, np.array([heavy]), documents)
        for partners in (by_load[:PARTNERS], by_load[PARTNERS : num_ranks // 2 : max(1, num_ranks // (2 * FURTHER))]):
            peak, light, given, taken, length = _best_swap(
                offered, _ends_of_runs(runs, partners, documents), load, heavy, limit
            )
            if peak < load[heavy]:
                break
        else:
            break
        owner[given : given + length] = light
        owner[taken : taken + length] = heavy
        moved = documents.area[given + length] - documents.area[given]
        moved -= documents.area[taken + length] - documents.area[taken]
        load[heavy] -= moved
        load[light] += moved
    return owner


def _best_swap(offered: Ends, wanted: Ends, load: Array, heavy: int, limit: int) -> tuple[int, int, int, int, int]:
    """The cheapest swap that brings both ranks to the limit, or the one that brings them nearest to it.

    Returns the load of the then heavier of the two, the other rank, both starts and the length.
    """
    worst = np.iinfo(np.int64).max
    by_length = np.argsort(wanted.length, kind="stable")
    lengths = wanted.length[by_length]
    first = np.searchsorted(lengths, offered.length)
    i, step = expand_counts(np.searchsorted(lengths, offered.length, side="right") - first)
    if not len(i):
        return worst, 0, 0, 0, 0
    j = by_length[first[i] + step]
    moved = offered.area[i] - wanted.area[j]
    peak = np.maximum(load[heavy] - moved, load[wanted.rank[j]] + moved)
    price = np.where(peak <= limit, offered.cost[i] + wanted.cost[j], worst)
    place = int(np.argmin(price))
    if price[place] == worst:
        place = int(np.argmin(peak))
    given, taken = i[place], j[place]
    return (
        int(peak[place]),
        int(wanted.rank[taken]),
        int(offered.start[given]),
        int(wanted.start[taken]),
        int(offered.length[given]),
    )


def _find_runs(owner: Owner) -> tuple[Array, Array, Owner]:
    """The first place of each run, the place after its last, and its rank."""
    first = np.append(0, np.flatnonzero(owner[1:] != owner[:-1]) + 1)
    return first, np.append(first[1:], len(owner)), owner[first]


def _ends_of_runs(runs: tuple[Array, Array, Owner], ranks: Array, documents: Documents) -> Ends:
    """Pieces of several lengths from both ends of the ranks' runs."""
    is_chosen = np.zeros(int(runs[2].max()) + 1, np.bool_)
    is_chosen[ranks] = True
    chosen = np.flatnonzero(is_chosen[runs[2]])
    first, last, rank = (each[chosen] for each in runs)
    longest = int((last - first).max(initial=0))
    powers = 1 << np.arange(longest.bit_length())
    sizes = np.column_stack([powers, powers + powers // 2]).ravel()[1:]
    run, choice = np.nonzero(sizes <= (last - first)[:, None])
    length = sizes[choice]
    whole = length == (last - first)[run]
    start = np.concatenate([first[run], last[run] - length])
    inner = np.concatenate([first[run] + length, last[run] - length])
    length = np.tile(length, 2)
    area = documents.area[start + length] - documents.area[start]
    return Ends(np.tile(rank[run], 2), start, length, area, documents.cut[inner] * ~np.tile(whole, 2))
