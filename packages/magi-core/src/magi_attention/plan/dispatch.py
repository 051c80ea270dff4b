# SPDX-License-Identifier: Apache-2.0
"""Deal chunks to ranks. One function per algorithm, all with the signature of :data:`Algorithm`.

Each gets the chunks' work, the number of ranks and the most chunks a rank may hold, and returns the ``(num_chunks,)``
ranks. Where the chunks are exactly ``num_ranks * capacity``, all ranks get the same number of them.
"""

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.enum import DispatchAlgType
from magi_attention.common.intervals import intersect, merge
from magi_attention.common.slices import SliceTable
from magi_attention.config import DispatchAlg
from magi_attention.plan.chunk_size import choose_cell_size
from magi_attention.plan.chunks import ChunkWork, DealKeys, measure_chunks
from magi_attention.plan.layout import Layout, even_cuts
from magi_attention.plan.locality import COMPARED_CHUNKS, MANY_RANKS, deal_by_locality, deal_documents
from magi_attention.plan.totals import totals

Owner = NDArray[np.int64]
Algorithm = Callable[[ChunkWork, int, int, DispatchAlg], Owner]

# The search for the least maximum tries at most this many placements per bound before it gives the bound up.
SEARCH_BUDGET = 20_000
# Cuts follow documents where ranks have so many rows: at the ends of runs that start anywhere, tiles of kernels are
# parted, which costs a rank with few tiles more than rows that needn't travel are worth. FEWEST_OF_MANY are enough on
# many ranks, whose plan may take longer, if documents' first rows read far.
FEWEST_ROWS, FEWEST_OF_MANY = 32_768, 16_384
# With more slices, it would take long to plan.
MOST_SLICES = 2048


def make_layout(
    slices: SliceTable,
    *,
    num_real: int,
    total: int,
    chunk_size: int,
    num_ranks: int,
    algorithm: DispatchAlg,
    deal_keys: DealKeys | None = None,
    is_even: bool = True,
) -> Layout:
    """Cut ``total`` rows into chunks and deal them to the ranks.

    Args:
        slices: the mask over the whole sequence.
        num_real: rows without the padding at the end.
        total: rows with it; the last chunk is shorter where ``chunk_size`` does not divide it.
        chunk_size: rows of a chunk.
        num_ranks: ranks of the group; with one, the layout is the identity.
        algorithm: which balances the ranks' mask areas.
        is_even: whether all chunks must have ``chunk_size`` rows; otherwise :func:`locality` cuts where documents start
            if ranks have many rows and the mask not too many slices, and elsewhere so that all get equally many.
        deal_keys: where keys are of another sequence, how they are dealt once these rows are; None in self-attention.

    Raises:
        ValueError: if there are fewer chunks than ranks.
    """
    num_chunks = -(-total // chunk_size)
    if num_chunks < num_ranks:
        raise ValueError(
            f"{total} tokens in chunks of {chunk_size} are {num_chunks} chunks, fewer than the {num_ranks} ranks: "
            f"choose chunks of at most {total // num_ranks} tokens"
        )
    may_follow = not is_even and deal_keys is None and algorithm.type is DispatchAlgType.LOCALITY and num_ranks > 1
    only_far = total < FEWEST_ROWS * num_ranks
    may_follow &= not only_far or (num_ranks >= MANY_RANKS and total >= FEWEST_OF_MANY * num_ranks)
    if may_follow and num_chunks > COMPARED_CHUNKS and len(slices) <= MOST_SLICES:
        cell_size = min(chunk_size, choose_cell_size(total))
        runs = deal_documents(slices, total, cell_size, num_ranks, only_far=only_far)
        if runs is not None:
            return Layout(num_real, total, chunk_size, num_ranks, runs[1], runs[0])
    if num_ranks == 1:
        owner = np.zeros(num_chunks, np.int64)
    else:
        work = measure_chunks(slices, even_cuts(total, chunk_size), deal_keys)
        owner = ALGORITHMS[algorithm.type](work, num_ranks, -(-num_chunks // num_ranks), algorithm)
        _leave_no_rank_empty(owner, work.area, num_ranks)
    return Layout(num_real, total, chunk_size, num_ranks, owner)


def _leave_no_rank_empty(owner: Owner, areas: NDArray[np.int64], num_ranks: int) -> None:
    """Give each rank without chunks the lightest chunk of a rank that has most of them; uneven shards may need that."""
    counts = np.bincount(owner, minlength=num_ranks)
    for rank in np.flatnonzero(counts == 0):
        donor = int(np.argmax(counts))
        chunks = np.flatnonzero(owner == donor)
        owner[chunks[np.argmin(areas[chunks])]] = rank
        counts[donor] -= 1
        counts[rank] = 1


def sequential(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """Contiguous runs; the first ranks get one chunk more where the chunks do not divide evenly."""
    each, more = divmod(len(work.area), num_ranks)
    return np.repeat(np.arange(num_ranks), each + (np.arange(num_ranks) < more))


def random_select(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """A shuffle that is the same on every rank: the baseline that a good algorithm must beat."""
    owner = sequential(work, num_ranks, capacity, algorithm)
    return np.random.default_rng(0).permutation(owner)


def min_heap(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """The largest chunk first, each to the rank with the least area that still has room."""
    owner = np.empty(len(work.area), np.int64)
    heap = [(0, rank) for rank in range(num_ranks)]
    room = [capacity] * num_ranks
    areas = work.area.tolist()
    for chunk in _largest_first(work.area):
        area, rank = heapq.heappop(heap)
        owner[chunk] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(heap, (area + areas[chunk], rank))
    return owner


def locality(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """Documents stay whole where they fit; see :mod:`magi_attention.plan.locality`."""
    return deal_by_locality(
        work.slices,
        work,
        -(-work.total // len(work.area)),
        num_ranks,
        rival=lambda: min_heap(work, num_ranks, capacity, algorithm),
    )


def topp_heap(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """As :func:`min_heap`, but of the lightest ranks the one that already reads most of the chunk's keys."""
    choices = max(1, int(np.ceil(num_ranks * getattr(algorithm, "top_p", 0.0))))
    owner = np.empty(len(work.area), np.int64)
    entries_of = _entries_by_chunk(work)
    keys_read: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64) for _ in range(num_ranks)]
    room = np.full(num_ranks, capacity)
    area = np.zeros(num_ranks, np.int64)
    for chunk in _largest_first(work.area):
        open_ranks = np.flatnonzero(room)
        lightest = open_ranks[np.argsort(area[open_ranks], kind="stable")][:choices]
        wanted = merge(work.keys[entries_of[chunk]])
        shared = [_common_length(wanted, keys_read[rank]) for rank in lightest]
        rank = lightest[int(np.argmax(shared))]
        owner[chunk] = rank
        room[rank] -= 1
        area[rank] += work.area[chunk]
        keys_read[rank] = merge(np.concatenate([keys_read[rank], wanted]))
    return owner


def sorted_sequential(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """Slices by descending area; each one's chunks, last first, fill the lightest rank before the next.

    With an ``allocation_ratio`` below 1 a rank takes only that share of its capacity before the next one's turn.
    """
    turn = max(1, int(capacity * getattr(algorithm, "allocation_ratio", 1.0)))
    owner = np.full(len(work.area), -1, np.int64)
    room = np.full(num_ranks, capacity)
    area = np.zeros(num_ranks, np.int64)
    rank, taken = 0, turn
    for chunk in _by_slice_then_last(work):
        if owner[chunk] >= 0:
            continue
        if taken == turn or not room[rank]:
            open_ranks = np.flatnonzero(room)
            rank, taken = int(open_ranks[np.argmin(area[open_ranks])]), 0
        owner[chunk] = rank
        room[rank] -= 1
        area[rank] += work.area[chunk]
        taken += 1
    return owner


def smallest_maximum(work: ChunkWork, num_ranks: int, capacity: int, algorithm: DispatchAlg) -> Owner:
    """Bisect on the largest rank's area, with a backtracking search for each bound, down from :func:`min_heap`'s.

    Exact where every search ends within its budget of placements; otherwise the best found, never worse than
    :func:`min_heap`.
    """
    best = min_heap(work, num_ranks, capacity, algorithm)
    high = int(totals(best, work.area, num_ranks).max())
    low = max(-(-int(work.area.sum()) // num_ranks), int(work.area.max(initial=0)))
    while low < high:
        bound = (low + high) // 2
        found = _fit(work.area, num_ranks, capacity, bound)
        if found is None:
            low = bound + 1
        else:
            best, high = found, int(totals(found, work.area, num_ranks).max())
    return best


def _fit(areas: NDArray[np.int64], num_ranks: int, capacity: int, bound: int) -> Owner | None:
    """Place every chunk so that no rank exceeds ``bound`` or ``capacity``; None if impossible or out of budget."""
    order = _largest_first(areas)
    size = [int(areas[chunk]) for chunk in order]
    load, count = [0] * num_ranks, [0] * num_ranks
    choice: list[int] = [-1] * len(order)
    candidates: list[list[int]] = []
    budget = SEARCH_BUDGET
    position = 0
    while position < len(order):
        if len(candidates) == position:
            fits = [r for r in range(num_ranks) if count[r] < capacity and load[r] + size[position] <= bound]
            # Ranks that are alike need no second try; the fullest that fits is popped, and so tried, first.
            alike = {(load[r], count[r]): r for r in reversed(fits)}
            candidates.append(sorted(alike.values(), key=lambda r: (load[r], -r)))
        if not candidates[position]:
            candidates.pop()
            position -= 1
            if position < 0:
                return None
            load[choice[position]] -= size[position]
            count[choice[position]] -= 1
            continue
        budget -= 1
        if budget < 0:
            return None
        rank = choice[position] = candidates[position].pop()
        load[rank] += size[position]
        count[rank] += 1
        position += 1
    owner = np.empty(len(order), np.int64)
    owner[order] = choice
    return owner


def _largest_first(areas: NDArray[np.int64]) -> list[int]:
    """Chunks by descending area; of equal ones the last first."""
    return np.argsort(areas, kind="stable")[::-1].tolist()


def _entries_by_chunk(work: ChunkWork) -> list[NDArray[np.int64]]:
    order = np.argsort(work.chunk, kind="stable")
    ends = np.searchsorted(work.chunk[order], np.arange(1, len(work.area)))
    return np.split(order, ends)


def _common_length(intervals: NDArray[np.int64], tiles: NDArray[np.int64]) -> int:
    pieces = intersect(intervals, tiles)[0]
    return int((pieces[:, 1] - pieces[:, 0]).sum())


def _by_slice_then_last(work: ChunkWork) -> list[int]:
    """The chunks of each slice, last first, slices by the area of their chunks; then the chunks without a slice."""
    num_slices = int(work.slice_index.max(initial=-1)) + 1
    slice_area = totals(work.slice_index, work.area[work.chunk], num_slices)
    order = np.lexsort((-work.chunk, work.slice_index, -slice_area[work.slice_index]))
    return [*work.chunk[order].tolist(), *range(len(work.area) - 1, -1, -1)]


ALGORITHMS: dict[DispatchAlgType, Algorithm] = {
    DispatchAlgType.MIN_HEAP: min_heap,
    DispatchAlgType.LOCALITY: locality,
    DispatchAlgType.LOWER_BOUND: smallest_maximum,
    DispatchAlgType.DYNAMIC_PROGRAMMING: smallest_maximum,
    DispatchAlgType.BINARY_SEARCH: smallest_maximum,
    DispatchAlgType.BACKTRACKING_PRUNING: smallest_maximum,
    DispatchAlgType.TOPP_HEAP: topp_heap,
    DispatchAlgType.BATCH_TOPP_HEAP: topp_heap,
    DispatchAlgType.SEQUENTIAL_SELECT: sequential,
    DispatchAlgType.SORTED_SEQUENTIAL_SELECT: sorted_sequential,
    DispatchAlgType.RANDOM_SELECT: random_select,
}
