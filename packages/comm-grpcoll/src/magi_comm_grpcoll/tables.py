# SPDX-License-Identifier: Apache-2.0
"""From the ranks' exchange tables to flat tables of the pieces that one rank copies to others. Knows numpy alone.

A cast brings rows to where the receiver wants them. A reduce brings partial results back to *slots* of the rows' owner:
first all that come from rank 0, then from rank 1, and so on, each rank's in the order in which their rows were sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import expand_counts
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll.errors import PlanMismatchError

Ints = NDArray[np.int64]
_Size = TypeVar("_Size", int, Ints)

# Kernels read rows where they arrive, with vectors and bulk copies.
ALIGNMENT = 256
# One entry of what a push kernel does: the struct Task of csrc/memory.cuh.
TASK = np.dtype([("source", "u8"), ("target", "u8"), ("bytes", "u4"), ("tensor", "u2"), ("peer", "u2")])


def aligned(num_bytes: _Size) -> _Size:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class RowCopies(NamedTuple):
    """Runs of rows that one rank sends, by ascending peer; all ``(n,)`` int64.

    Attributes:
        peer: the rank that receives the run.
        source: its first row here.
        target: its first row there.
        rows: how many rows it has.
    """

    peer: Ints
    source: Ints
    target: Ints
    rows: Ints


def check_match(tables: Sequence[ExchangeTable]) -> None:
    """Raise :class:`PlanMismatchError` unless every pair of ranks sends and expects the same number of rows."""
    for rank, table in enumerate(tables):
        if table.num_ranks != len(tables):
            raise PlanMismatchError(f"rank {rank}'s table is for {table.num_ranks} ranks, not {len(tables)}")
    sent = np.array([table.send_counts for table in tables])
    expected = np.array([table.recv_counts for table in tables]).T
    differing = np.argwhere(sent != expected)
    if len(differing):
        source, target = differing[0]
        raise PlanMismatchError(
            f"rank {source} sends {sent[source, target]} rows to rank {target}, which expects "
            f"{expected[source, target]}; {len(differing)} pairs of ranks differ"
        )


def cast_copies(tables: Sequence[ExchangeTable], rank: int) -> RowCopies:
    """What ``rank`` sends in a cast, given the tables of all ranks, which must match."""
    landing = [table.recv[table.recv[:, 0] == rank, 1:] for table in tables]
    return _zip(tables[rank].send, np.concatenate(landing))


def reduce_copies(tables: Sequence[ExchangeTable], rank: int) -> RowCopies:
    """What ``rank`` sends back in a reduce: its received rows, to the slots of their owners."""
    first = [sum(table.send_counts[:rank]) for table in tables]
    count = [table.send_counts[rank] for table in tables]
    return _zip(tables[rank].recv, np.column_stack([first, np.add(first, count)]))


def _zip(sources: Ints, targets: Ints) -> RowCopies:
    """Pair the rows of ``(peer, start, stop)`` ranges with those of ``(start, stop)`` ranges of the same total length.

    Runs that continue each other on both sides are joined.
    """
    stops = [np.cumsum(ranges[:, -1] - ranges[:, -2]) for ranges in (sources, targets)]
    stop = np.union1d(*stops)
    stop = stop[stop > 0]
    start = np.concatenate([[0], stop[:-1]]).astype(np.int64)[: len(stop)]
    of_source, of_target = (np.searchsorted(ends, stop) for ends in stops)
    source = sources[of_source, 2] - (stops[0][of_source] - start)
    target = targets[of_target, 1] - (stops[1][of_target] - start)
    peer, rows = sources[of_source, 0], stop - start
    continues = (peer[1:] == peer[:-1]) & (source[1:] == source[:-1] + rows[:-1])
    continues &= target[1:] == target[:-1] + rows[:-1]
    head = np.flatnonzero(np.concatenate([[True], ~continues])[: len(rows)])
    return RowCopies(peer[head], source[head], target[head], np.add.reduceat(rows, head) if len(head) else rows)


@dataclass(frozen=True)
class SlotLayout:
    """Where the tensors of an exchange lie in every rank's slot, one after another.

    Attributes:
        starts: ``(num_ranks, num_tensors)`` int64, in bytes from the slot's start.
        sizes: ``(num_ranks,)`` int64 bytes that each rank needs.
    """

    starts: Ints
    sizes: Ints


def lay_out_slots(rows: Sequence[int], row_bytes: Sequence[int]) -> SlotLayout:
    """Lay out slots for so many rows on each rank, and tensors of so many bytes per row."""
    needed = np.multiply.outer(np.asarray(rows, np.int64), np.asarray(row_bytes, np.int64))
    padded = aligned(needed)
    stops = np.cumsum(padded, axis=1)
    return SlotLayout(stops - padded, stops[:, -1])


class ByteCopies(NamedTuple):
    """Pieces of memory that one rank sends, in the order in which they should go; all ``(n,)`` int64.

    Attributes:
        tensor: which of the tensors that are sent.
        peer: the rank that receives the piece.
        source: its first byte in the tensor.
        target: its first byte in the peer's slot.
        size: its length in bytes.
    """

    tensor: Ints
    peer: Ints
    source: Ints
    target: Ints
    size: Ints

    def select(self, chosen: NDArray[np.bool_] | Ints) -> "ByteCopies":
        """Some of the pieces."""
        return ByteCopies(*(column[chosen] for column in self))

    @property
    def granule(self) -> int:
        """The largest of 16, 8, 4, 2 and 1 that divides all sizes and offsets."""
        union = int(np.bitwise_or.reduce(np.concatenate([self.source, self.target, self.size, [16]])))
        return union & -union

    def by_granule(self) -> "list[ByteCopies]":
        """The pieces apart whose tensors have other granules; at least one part, which may be empty."""
        tensors = np.unique(self.tensor).tolist()
        granule = np.array([self.select(self.tensor == tensor).granule for tensor in tensors], np.int64)
        of_piece = granule[np.searchsorted(tensors, self.tensor)]
        return [self.select(of_piece == each) for each in np.unique(granule)] or [self]


def byte_copies(copies: RowCopies, layout: SlotLayout, row_bytes: Sequence[int], rank: int) -> ByteCopies:
    """The pieces of ``copies`` for tensors of so many bytes per row; those for the next rank go first.

    Ranks that start together then send to different peers, as long as they have equally much for each.
    """
    tensor, number = (column.ravel() for column in np.indices((len(row_bytes), len(copies.rows))))
    width = np.asarray(row_bytes, np.int64)[tensor]
    peer, source, target, rows = (column[number] for column in copies)
    pieces = ByteCopies(tensor, peer, source * width, layout.starts[peer, tensor] + target * width, rows * width)
    order = np.argsort((peer - rank - 1) % len(layout.sizes), kind="stable")
    return pieces.select(order[pieces.size[order] > 0])


def cut(copies: ByteCopies, most_bytes: int) -> ByteCopies:
    """Cut pieces to at most ``most_bytes``, and let the peers take turns."""
    owner, number = expand_counts(-(-copies.size // most_bytes))
    offset = number * most_bytes
    tensor, peer, source, target, size = copies.select(owner)
    pieces = ByteCopies(tensor, peer, source + offset, target + offset, np.minimum(size - offset, most_bytes))
    return pieces.select(np.argsort(_turn(peer), kind="stable"))


def _turn(peer: Ints) -> Ints:
    """The how manieth of its peer each piece is."""
    order = np.argsort(peer, kind="stable")
    turn = np.empty_like(order)
    turn[order] = expand_counts(np.unique(peer, return_counts=True)[1])[1]
    return turn


def tasks_of(copies: ByteCopies) -> NDArray[np.void]:
    """The table that a push kernel reads."""
    tasks = np.empty(len(copies.size), TASK)
    for name, column in zip(("source", "target", "bytes", "tensor", "peer"), _in_task_order(copies), strict=True):
        tasks[name] = column
    return tasks


def _in_task_order(copies: ByteCopies) -> tuple[Ints, ...]:
    return copies.source, copies.target, copies.size, copies.tensor, copies.peer
