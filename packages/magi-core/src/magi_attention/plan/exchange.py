# SPDX-License-Identifier: Apache-2.0
"""Exchange tables: which rows one rank sends to and receives from each peer in one group collective."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.derived import KeepsDerived
from magi_attention.common.intervals import Intervals, intersect, merge, subtract
from magi_attention.plan.demand import lift, lifted_runs, unlift
from magi_attention.plan.layout import Layout


@dataclass(frozen=True, eq=False)
class ExchangeTable(KeepsDerived):
    """One rank's part of a group cast; read from right to left it is the matching group reduce.

    Attributes:
        send: ``(n, 3)`` int64 rows ``(peer, start, stop)``: rows of the source tensor, grouped by ascending peer. A row
            may go to several peers. ``peer`` is a rank of the group, this one included.
        recv: ``(m, 3)`` int64 rows ``(peer, start, stop)``: rows of the receive buffer, grouped by ascending peer. The
            ranges tile ``[0, num_received)``. For each pair of ranks the n-th row sent is the n-th row received, in the
            order of the two lists; the two sides' ranges need not match one to one, only in total length.
        num_ranks: ranks of the group.
        num_source: rows of the source tensor.
        num_received: rows of the receive buffer.
    """

    send: NDArray[np.int64]
    recv: NDArray[np.int64]
    num_ranks: int
    num_source: int
    num_received: int

    @property
    def tables(self) -> "tuple[ExchangeTable, ...]":
        """The tables of all hops."""
        return (self,)

    @property
    def send_counts(self) -> list[int]:
        """Rows sent to each peer."""
        return _rows_per_peer(self.send, self.num_ranks)

    @property
    def recv_counts(self) -> list[int]:
        """Rows received from each peer."""
        return _rows_per_peer(self.recv, self.num_ranks)


@dataclass(frozen=True, eq=False)
class TwoHopExchange:
    """A group cast over a 2-D mesh (nodes × ranks of a node) that sends a row to each node only once.

    ``inter`` runs in the group of the ranks with the same place in their nodes; its receive buffer is the *relay*. The
    source of ``intra``, which runs in the node's group, is the rank's own rows followed by the relay.
    """

    inter: ExchangeTable
    intra: ExchangeTable

    @property
    def tables(self) -> tuple[ExchangeTable, ...]:
        """The tables of all hops."""
        return (self.inter, self.intra)

    @property
    def num_received(self) -> int:
        """Rows of the receive buffer."""
        return self.intra.num_received


def _rows_per_peer(ranges: NDArray[np.int64], num_ranks: int) -> list[int]:
    peer, start, stop = ranges.T
    counts = np.bincount(peer, weights=stop - start, minlength=num_ranks)
    return counts.astype(np.int64).tolist()


def exchange_of_stage(remote: NDArray[np.int64], layout: Layout, rank: int) -> ExchangeTable:
    """One rank's exchange for the ``(rank, start, stop)`` rows that all ranks receive in a stage.

    ``layout`` is that of the rows that travel, be they keys or queries.
    The receive buffer holds the rank's rows in ascending global order, so that keys that were neighbors stay so.
    """
    mine = remote[:, 0] == rank
    wanted, others = remote[mine, 1:3], remote[~mine]
    pieces, _, tile = intersect(wanted, layout.runs[:, :2])
    own = layout.runs_of(rank)
    sent, request, run = intersect(others[:, 1:3], own[:, :2])
    local = sent + (own[run, 2] - own[run, 0])[:, None]
    return ExchangeTable(
        send=_by_peer(others[request, 0], local),
        recv=_by_peer(layout.runs[tile, 2], _packed(pieces)),
        num_ranks=layout.num_ranks,
        num_source=int(layout.rows_per_rank[rank]),
        num_received=_length(wanted),
    )


def two_hop_exchange(
    remote: NDArray[np.int64], layout: Layout, rank: int, mesh_shape: tuple[int, int]
) -> TwoHopExchange:
    """The same as :func:`exchange_of_stage` over a mesh of ``(nodes, ranks per node)``, ranks numbered node by node."""
    num_nodes, per_node = mesh_shape
    node, place = divmod(rank, per_node)
    # What each node misses: the union of what its ranks miss, less what its ranks own.
    nodes_own = merge(lifted_runs(layout, layout.runs[:, 2] // per_node))
    wanted = merge(lift(remote[:, 1:3], remote[:, 0] // per_node, layout))
    missed = unlift(subtract(wanted, nodes_own), layout)
    here = missed[:, 0] == node

    same_place = layout.runs[layout.runs[:, 2] % per_node == place]
    relayed, _, tile = intersect(missed[here, 1:], same_place[:, :2])
    relay = _packed(relayed)
    own = layout.runs_of(rank)
    sent, request, run = intersect(missed[~here, 1:], own[:, :2])
    num_own = int(layout.rows_per_rank[rank])
    inter = ExchangeTable(
        send=_by_peer(missed[~here][request, 0], sent + (own[run, 2] - own[run, 0])[:, None]),
        recv=_by_peer(same_place[tile, 2] // per_node, relay),
        num_ranks=num_nodes,
        num_source=num_own,
        num_received=_length(relayed),
    )

    # The second hop's source: own rows, then the relay. Where each of its global rows lies, sorted by global row:
    held = np.concatenate([own, np.column_stack([relayed, num_own + relay[:, 0]])])
    held = held[np.argsort(held[:, 0])]
    neighbors = remote[remote[:, 0] // per_node == node]
    passed, request, source = intersect(neighbors[:, 1:3], held[:, :2])
    wanted_here = remote[remote[:, 0] == rank][:, 1:3]
    pieces, _, tile = intersect(wanted_here, layout.runs[:, :2])
    intra = ExchangeTable(
        send=_by_peer(neighbors[request, 0] % per_node, passed + (held[source, 2] - held[source, 0])[:, None]),
        recv=_by_peer(layout.runs[tile, 2] % per_node, _packed(pieces)),
        num_ranks=per_node,
        num_source=num_own + inter.num_received,
        num_received=_length(wanted_here),
    )
    return TwoHopExchange(inter, intra)


def _length(intervals: Intervals) -> int:
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def _packed(intervals: Intervals) -> Intervals:
    """Where intervals lie once they are stored one after another."""
    stop = np.cumsum(intervals[:, 1] - intervals[:, 0])
    return np.column_stack([stop - (intervals[:, 1] - intervals[:, 0]), stop])


def _by_peer(peer: NDArray[np.int64], ranges: Intervals) -> NDArray[np.int64]:
    return np.column_stack([peer, ranges])[np.argsort(peer, kind="stable")]
