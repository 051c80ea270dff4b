# SPDX-License-Identifier: Apache-2.0
"""Which links the rows of two-hop exchanges take, for all ranks at once.

A row that a node misses crosses once, to the rank with the same place in its node as the row's owner: its *relay*. All
ranks of the node that read the row get it from there, the relay itself without any travel.
"""

from dataclasses import dataclass

import numpy as np

from magi_attention.common.intervals import intersect, merge
from magi_attention.plan.demand import lift, unlift
from magi_attention.plan.layout import Layout
from magi_attention.plan.totals import totals
from magi_attention.plan.traffic import LinkRows, Table


@dataclass(frozen=True, eq=False)
class TwoHopLoads:
    """Rows that travel in one stage.

    Attributes:
        inter: ``(nodes, nodes, places)`` rows that the rank at a place of a node (the first index) receives from the
            rank at the same place of another.
        intra: ``(nodes, places, places)`` rows that the rank at a place (the second index) of a node receives from
            another place of its node.
    """

    inter: Table
    intra: Table

    @property
    def by_rank(self) -> LinkRows:
        """What every rank receives and sends, ``(ranks,)`` each."""
        sums = (self.inter.sum(1), self.inter.sum(0), self.intra.sum(2), self.intra.sum(1))
        return LinkRows(*(each.ravel() for each in sums))

    @property
    def traffic(self) -> Table:
        """``(ranks, ranks)`` rows that a rank (the first index) receives from another, in either hop."""
        nodes, _, places = self.inter.shape
        table = np.zeros((nodes, places, nodes, places), np.int64)
        place, node = np.arange(places), np.arange(nodes)
        table[:, place, :, place] = self.inter.transpose(2, 0, 1)
        table[node, :, node, :] += self.intra
        return table.reshape(nodes * places, nodes * places)


def two_hop_loads(wanted: Table, layout: Layout, ranks_per_node: int) -> TwoHopLoads:
    """Find the loads of a stage in which ranks receive the ``(rank, start, stop)`` rows ``wanted``."""
    nodes = layout.num_ranks // ranks_per_node
    read = _rows_by_owner(wanted, layout.num_ranks, layout)
    intra = read.reshape(nodes, ranks_per_node, nodes, ranks_per_node).sum(2)
    intra[:, np.arange(ranks_per_node), np.arange(ranks_per_node)] = 0
    return TwoHopLoads(rows_crossing(wanted, layout, ranks_per_node), intra)


def rows_crossing(wanted: Table, layout: Layout, ranks_per_node: int) -> Table:
    """The ``inter`` of :class:`TwoHopLoads` alone, which is found much faster."""
    nodes = layout.num_ranks // ranks_per_node
    of_nodes = unlift(merge(lift(wanted[:, 1:], wanted[:, 0] // ranks_per_node, layout)), layout)
    inter = _rows_by_owner(of_nodes, nodes, layout).reshape(nodes, nodes, ranks_per_node)
    inter[np.arange(nodes), np.arange(nodes)] = 0
    return inter


def _rows_by_owner(wanted: Table, num_groups: int, layout: Layout) -> Table:
    """``(num_groups, ranks)`` how many of the ``(group, start, stop)`` rows that a group wants every rank owns."""
    pieces, source, run = intersect(wanted[:, 1:], layout.runs[:, :2])
    place = wanted[source, 0] * layout.num_ranks + layout.runs[run, 2]
    sums = totals(place, pieces[:, 1] - pieces[:, 0], num_groups * layout.num_ranks)
    return sums.reshape(num_groups, layout.num_ranks)
