# SPDX-License-Identifier: Apache-2.0
"""Exchange tables: which rows one rank sends to and receives from each peer in one group collective."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ExchangeTable:
    """One rank's part of a group cast; read from right to left it is the matching group reduce.

    Attributes:
        send: ``(n, 3)`` int64 rows ``(peer, start, stop)``: rows of the source tensor, sorted by peer, then start.
            A row may go to several peers. ``peer`` is a rank of the group, this one included.
        recv: ``(m, 3)`` int64 rows ``(peer, start, stop)``: rows of the receive buffer, sorted by peer, then start.
            The ranges tile ``[0, num_received)``. For each pair of ranks the rows arrive in the order in which they are
            sent, so the two sides' ranges need not match one to one, only in total length.
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
    def num_received(self) -> int:
        """Rows of the receive buffer."""
        return self.intra.num_received


def _rows_per_peer(ranges: NDArray[np.int64], num_ranks: int) -> list[int]:
    peer, start, stop = ranges.T
    counts = np.bincount(peer, weights=stop - start, minlength=num_ranks)
    return counts.astype(np.int64).tolist()
