# SPDX-License-Identifier: Apache-2.0
"""Deal the chunks of keys to ranks where keys are of another sequence than the queries."""

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.intervals import merge
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.config import SequentialDispatchAlg
from magi_attention.plan.demand import find_demand, lift, unlift
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout


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
    reads = _rows_read(slices, layout, contiguous)
    owner = _give_to_readers(reads, np.bincount(contiguous.owner))
    if _rows_at_home(reads, owner) <= _rows_at_home(reads, contiguous.owner):
        return contiguous
    return Layout(num_real, total, chunk_size, layout.num_ranks, owner)


def _rows_read(slices: SliceTable, layout: Layout, key_layout: Layout) -> NDArray[np.int32]:
    """``(num_chunks, num_ranks)``: how many rows of each chunk of keys each rank's queries read."""
    demand = find_demand(slices, layout, key_layout)
    keys = lift(demand.bands[:, band.K0 : band.D0], layout.runs[demand.run, 2], key_layout)
    rank, start, stop = unlift(merge(keys), key_layout).T
    size, shape = key_layout.chunk_size, (len(key_layout.owner), layout.num_ranks)
    first = start // size
    entry, step = expand_counts(-(-stop // size) - first)
    chunk = first[entry] + step
    rows = np.minimum(stop[entry], (chunk + 1) * size) - np.maximum(start[entry], chunk * size)
    counts = np.zeros(shape, np.int32)
    np.add.at(counts, (chunk, rank[entry]), rows.astype(np.int32))
    return counts


def _give_to_readers(reads: NDArray[np.int32], room: NDArray[np.int64]) -> NDArray[np.int64]:
    """The owner of each chunk; ``room`` tells how many chunks each rank takes."""
    room = room.copy()
    owner = np.empty(len(reads), np.int64)
    first = reads.argmax(axis=1)[:, None]
    best = np.take_along_axis(reads, first, axis=1)
    others = reads.copy()
    np.put_along_axis(others, first, -1, axis=1)
    for chunk in np.argsort(others.max(axis=1) - best[:, 0], kind="stable"):
        rank = np.argmax(np.where(room > 0, reads[chunk], -1))
        owner[chunk] = rank
        room[rank] -= 1
    return owner


def _rows_at_home(reads: NDArray[np.int32], owner: NDArray[np.int64]) -> int:
    """Rows that are read by their chunk's owner and so don't travel to it."""
    return int(reads[np.arange(len(owner)), owner].sum())
