# SPDX-License-Identifier: Apache-2.0
"""How many rows ranks receive and send, within and between nodes, and how long that keeps their links busy.

The number of readers of a row is a step function of the row; its integral, taken at the ends of the runs, spares the
pairs of all readers and runs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals
from magi_attention.plan.demand import lift, lifted_runs
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import Cluster
from magi_attention.plan.totals import totals

Table = NDArray[np.int64]


class LinkRows(NamedTuple):
    """Rows that ranks exchange; int64 arrays ``(ranks,)`` of one exchange, or ``(ranks, stages)`` of several.

    In exchanges of two hops, rows that a relay receives and passes on count in both hops.

    Attributes:
        received_inter: rows received from other nodes.
        sent_inter: rows sent to other nodes.
        received_intra: rows received within the node.
        sent_intra: rows sent within the node.
    """

    received_inter: Table
    sent_inter: Table
    received_intra: Table
    sent_intra: Table

    def busy_seconds(self, bytes_per_row: Table | int, hops: Table | int, cluster: Cluster) -> NDArray[np.float64]:
        """How long these rows keep each rank's links busy, in the busier direction; latencies not counted.

        The two kinds of links work side by side, but of two ``hops`` the one within nodes waits for the one between.
        """
        inter = np.maximum(self.received_inter, self.sent_inter) * (1e-9 / cluster.link_gbs)
        intra = np.maximum(self.received_intra, self.sent_intra) * (1e-9 / cluster.nvlink_gbs)
        return np.where(np.greater(hops, 1), inter + intra, np.maximum(inter, intra)) * bytes_per_row


def direct_links(remote: Table, layout: Layout, ranks_per_node: int) -> LinkRows:
    """The rows of one exchange in which every row goes straight from its owner to each reader.

    Args:
        remote: ``(n, 3)`` rows ``(rank, start, stop)`` that ranks receive.
        layout: who owns which rows.
        ranks_per_node: neighboring ranks that share a node.
    """
    sent = rows_sent(remote[:, 1:], layout)
    from_node, sent_intra = rows_within_nodes(remote, layout, ranks_per_node)
    received = totals(remote[:, 0], remote[:, 2] - remote[:, 1], layout.num_ranks)
    received_intra = totals(remote[:, 0], from_node, layout.num_ranks)
    return LinkRows(received - received_intra, sent - sent_intra, received_intra, sent_intra)


def rows_sent(wanted: Intervals, layout: Layout) -> Table:
    """``(ranks,)`` how many of the ``wanted`` rows, each counted as often as it is wanted, every rank owns."""
    return _wanted_of_runs(wanted, layout.runs[:, :2], layout.runs[:, 2], layout.num_ranks)


def rows_within_nodes(remote: Table, layout: Layout, ranks_per_node: int) -> tuple[Table, Table]:
    """Rows that travel between ranks of the same node.

    Args:
        remote: ``(n, 3)`` rows ``(rank, start, stop)`` that ranks receive.
        layout: who owns which rows.
        ranks_per_node: neighboring ranks that share a node.

    Returns:
        ``(n,)`` for each entry of ``remote`` how many of its rows come from the reader's node, and ``(ranks,)`` how
        many rows each rank sends within its node.
    """
    if layout.num_ranks <= ranks_per_node:
        return remote[:, 2] - remote[:, 1], rows_sent(remote[:, 1:3], layout)
    # Every reader meets the runs of its own node only, since nodes lie far apart on one axis.
    node = layout.runs[:, 2] // ranks_per_node
    by_node = np.argsort(node, kind="stable")
    runs = lifted_runs(layout, node)
    wanted = lift(remote[:, 1:3], remote[:, 0] // ranks_per_node, layout)
    length = runs[:, 1] - runs[:, 0]
    before = np.cumsum(length) - length
    run = np.maximum(np.searchsorted(runs[:, 0], wanted, side="right") - 1, 0)
    owned_before = before[run] + np.clip(wanted - runs[run, 0], 0, length[run])
    sent = _wanted_of_runs(wanted, runs, layout.runs[by_node, 2], layout.num_ranks)
    return owned_before[:, 1] - owned_before[:, 0], sent


def _wanted_of_runs(wanted: Intervals, runs: Intervals, owner: Table, num_ranks: int) -> Table:
    steps = np.sort(wanted, axis=0)
    at = runs.ravel()
    before = [np.concatenate([[0], np.cumsum(edge)]) for edge in steps.T]
    opened, closed = (np.searchsorted(edge, at) for edge in steps.T)
    wanted_before = (opened * at - before[0][opened]) - (closed * at - before[1][closed])
    wanted_of_run = np.diff(wanted_before.reshape(len(runs), 2))[:, 0]
    return totals(owner, wanted_of_run, num_ranks)
