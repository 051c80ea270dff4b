# SPDX-License-Identifier: Apache-2.0
"""Deal the chunks of keys to ranks where keys are of another sequence than the queries."""

import heapq

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.intervals import Intervals, merge, subtract
from magi_attention.common.slices import SliceTable
from magi_attention.config import SequentialDispatchAlg
from magi_attention.plan.demand import find_demand, lift, lifted_runs, unlift
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout

Array = NDArray[np.int64]


def make_key_layout(
    slices: SliceTable, layout: Layout, *, num_real: int, total: int, chunk_size: int, is_permutable: bool
) -> Layout:
    """Cut the keys into chunks and deal them, as equal in number as possible, to the ranks of the query layout.

    Keys cost nothing where they lie, only where they travel to: so a chunk goes to the rank whose queries read most of
    its rows and that still takes one. Chunks for which the choice matters most come first. Contiguous shares are taken
    instead where they make no more rows travel.

    Args:
        slices: the mask over both sequences.
        layout: who owns which queries.
        num_real: rows of the key sequence without the padding at the end.
        total: rows with it.
        chunk_size: rows of a chunk.
        is_permutable: whether ranks may hold other than contiguous shares.

    Raises:
        ValueError: if there are fewer chunks than ranks.
    """
    contiguous = make_layout(
        SliceTable.from_bands(band.transpose(slices.bands())),
        num_real=num_real,
        total=total,
        chunk_size=chunk_size,
        num_ranks=layout.num_ranks,
        algorithm=SequentialDispatchAlg(),
    )
    if not is_permutable or layout.num_ranks == 1:
        return contiguous
    demand = find_demand(slices, layout, contiguous)
    keys = merge(lift(demand.bands[:, band.K0 : band.D0], layout.runs[demand.run, 2], contiguous))
    owner = _give_to_readers(unlift(keys, contiguous), contiguous)
    dealt = Layout(num_real, total, chunk_size, layout.num_ranks, owner)
    travel = subtract(keys, lifted_runs(dealt, dealt.runs[:, 2]))
    return dealt if _length(travel) < _length(demand.remote[:, 1:]) else contiguous


def _length(intervals: Intervals) -> int:
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def _give_to_readers(wanted: Array, contiguous: Layout) -> Array:
    """The owner of each chunk where ranks read the ``(rank, start, stop)`` keys ``wanted``.

    Ranks take as many chunks as of ``contiguous``.
    """
    reads, whole = _find_reads(wanted, contiguous)
    num_chunks = len(contiguous.owner)
    room = np.bincount(contiguous.owner).tolist()
    owner = np.full(num_chunks, -1)
    is_shared = _sum_over_chunks(whole, np.ones(len(whole), np.int64), num_chunks) > 1
    # Where several ranks read all, the choice doesn't matter. Elsewhere it does by what the second reads less.
    bounds = np.searchsorted(reads[:, 0], np.arange(num_chunks + 1))
    rows, readers = np.append(reads[:, 2], [0, 0]), reads[:, 1].tolist()
    most, second = (np.where(np.diff(bounds) > n, rows[bounds[:-1] + n], 0) for n in range(2))
    order = np.argsort(second - most, kind="stable")
    for chunk in order[~is_shared[order]].tolist():
        for rank in readers[bounds[chunk] : bounds[chunk + 1]]:
            if room[rank]:
                owner[chunk] = rank
                room[rank] -= 1
                break
    _give_shared(owner, np.flatnonzero(is_shared), whole, room)
    owner[owner < 0] = np.repeat(np.arange(len(room)), room)
    return owner


def _find_reads(wanted: Array, layout: Layout) -> tuple[Array, Array]:
    """How ranks that read the ``(rank, start, stop)`` keys ``wanted`` read the chunks of ``layout``.

    There may be as many pairs of a chunk and a rank that reads all of it as chunks times ranks. So they are kept as
    intervals, but for those that are the chunk's only one.

    Returns:
        ``(n, 3)`` entries ``(chunk, rank, rows)``, of each chunk those with the most rows first, and ``(m, 3)`` entries
        ``(first, last, rank)``: the rank reads all rows of the chunks ``[first, last)``.
    """
    size, num_chunks = layout.chunk_size, len(layout.owner)
    rank, start, stop = wanted.T
    first, last = start // size, (stop - 1) // size
    several = np.flatnonzero(last > first)
    entry, chunk = np.append(np.arange(len(wanted)), several), np.append(first, last[several])
    rows = np.minimum(stop[entry], (chunk + 1) * size) - np.maximum(start[entry], chunk * size)
    whole = np.column_stack([first + 1, last, rank])[last > first + 1]
    sole = np.flatnonzero(_sum_over_chunks(whole, np.ones(len(whole), np.int64), num_chunks) == 1)
    sole_rank = _sum_over_chunks(whole, whole[:, 2], num_chunks)[sole]
    pair = np.append(chunk, sole) * layout.num_ranks + np.append(rank[entry], sole_rank)
    pair, inverse = np.unique(pair, return_inverse=True)
    rows = np.bincount(inverse, weights=np.append(rows, np.full(len(sole), size))).astype(np.int64)
    chunk, rank = np.divmod(pair, layout.num_ranks)
    order = np.lexsort((-rows, chunk))
    return np.column_stack([chunk, rank, rows])[order], whole


def _sum_over_chunks(intervals: Array, values: Array, num_chunks: int) -> Array:
    """``(num_chunks,)`` the sum of the values of the intervals of chunks, ``(first, last, ...)``, over each."""
    steps = np.zeros(num_chunks + 1, np.int64)
    np.add.at(steps, intervals[:, 0], values)
    np.add.at(steps, intervals[:, 1], -values)
    return np.cumsum(steps)[:-1]


def _give_shared(owner: Array, chunks: Array, whole: Array, room: list[int]) -> None:
    """Give the ascending ``chunks`` to ranks that read all of them, first to those whose intervals end first."""
    coming = whole[np.argsort(-whole[:, 0], kind="stable")].tolist()
    reading: list[tuple[int, int]] = []
    for chunk in chunks.tolist():
        while coming and coming[-1][0] <= chunk:
            _, last, rank = coming.pop()
            heapq.heappush(reading, (last, rank))
        while reading and (reading[0][0] <= chunk or not room[reading[0][1]]):
            heapq.heappop(reading)
        if reading:
            owner[chunk] = rank = reading[0][1]
            room[rank] -= 1
