# SPDX-License-Identifier: Apache-2.0
"""An exchange among ranks of several nodes in two hops, from exchange tables. Knows numpy alone.

A row crosses to each node that wants it once, to its *relay* there: the rank with the place in its node that the owner
has in its own. The relay passes it on to whoever wants it in that node. Read from right to left it is the reduce: what
belongs to a row comes together at the relay, and crosses as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magi_attention.common.intervals import merge
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_comm_grpcoll.tables import Ints


@dataclass(frozen=True)
class RelayExchange:
    """How rows travel between the ranks of the same place, numbered by node, and those of a node, numbered by place.

    Attributes:
        hops: as a reduce takes them, from right to left.
        near: inside the node, what starts from there: a cast need not wait for the other nodes with it.
        far: inside the node, what has come from others; its source is the relay.
    """

    hops: TwoHopExchange
    near: ExchangeTable
    far: ExchangeTable


def relay_exchange(alike: Sequence[ExchangeTable], per_node: int, rank: int) -> RelayExchange:
    """The exchange of ``rank``; ranks are numbered node by node.

    Args:
        alike: by node, the tables of the ranks with this rank's place in their nodes, itself included.
        per_node: ranks of a node.
        rank: whose side is wanted.

    Returns:
        It; the receive buffer is that of the rank's table.
    """
    node, mine = rank // per_node, alike[rank // per_node]
    others = [other for other in range(len(alike)) if other != node]  # whose rows this rank relays
    relayed = {other: _crossing(alike[other], node, per_node) for other in others}
    counts = [_length(relayed[other]) for other in others]
    stops = np.cumsum([0, *counts])
    inter = ExchangeTable(
        send=_stack([_of(other, _crossing(mine, other, per_node)) for other in others]),
        recv=_stack([_of(other, np.array([[stops[i], stops[i + 1]]])) for i, other in enumerate(others) if counts[i]]),
        num_ranks=len(alike),
        num_source=mine.num_source,
        num_received=int(stops[-1]),
    )
    near_send, near_recv, far_send, far_recv = [], [], [], []
    for local in range(per_node):
        near_send.append(_of(local, _rows(mine.send, node * per_node + local)))
        near_recv.append(_of(local, _rows(mine.recv, node * per_node + local)))
        for first, other in zip(stops, others, strict=False):
            wanted = _rows(alike[other].send, node * per_node + local)
            far_send.append(_of(local, first + _places(wanted, relayed[other])))
            far_recv.append(_of(local, _rows(mine.recv, other * per_node + local)))
    near = ExchangeTable(_stack(near_send), _stack(near_recv), per_node, mine.num_source, mine.num_received)
    far = ExchangeTable(_stack(far_send), _stack(far_recv), per_node, inter.num_received, mine.num_received)
    behind_own = far.send + np.array([0, mine.num_source, mine.num_source])
    both = ExchangeTable(
        send=_by_peer(near.send, behind_own),
        recv=_by_peer(near.recv, far.recv),
        num_ranks=per_node,
        num_source=mine.num_source + inter.num_received,
        num_received=mine.num_received,
    )
    return RelayExchange(TwoHopExchange(inter, both), near, far)


def _crossing(table: ExchangeTable, node: int, per_node: int) -> Ints:
    """``(n, 2)``: the rows that a rank sends to a node, each once, ascending."""
    return merge(table.send[table.send[:, 0] // per_node == node, 1:])


def _rows(ranges: Ints, peer: int) -> Ints:
    return ranges[(ranges[:, 0] == peer) & (ranges[:, 2] > ranges[:, 1]), 1:]


def _places(ranges: Ints, held: Ints) -> Ints:
    """Where ranges are among rows that are held one run after another; each range lies in one of the runs."""
    run = np.searchsorted(held[:, 0], ranges[:, 0], side="right") - 1
    first = np.cumsum(held[:, 1] - held[:, 0]) - held[:, 1]
    return ranges + first[run, None]


def _of(peer: int, ranges: Ints) -> Ints:
    return np.column_stack([np.full(len(ranges), peer), ranges])


def _by_peer(*parts: Ints) -> Ints:
    ranges = np.concatenate(parts)
    return ranges[np.argsort(ranges[:, 0], kind="stable")]


def _stack(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty((0, 3), np.int64), *parts]).astype(np.int64)


def _length(ranges: Ints) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())
