# SPDX-License-Identifier: Apache-2.0
"""What every rank computes and exchanges in every stage, measured for all ranks at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import overlaps
from magi_attention.plan.demand import Demand, lift, lifted_runs
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import TILE
from magi_attention.plan.relays import two_hop_loads
from magi_attention.plan.totals import totals
from magi_attention.plan.traffic import LinkRows, Table, direct_links, rows_sent

MOST_GROUPS = 64
"""Side of the traffic matrix: with more ranks, an entry stands for neighboring ranks together."""


@dataclass(frozen=True, eq=False)
class StageWork:
    """What every rank computes and exchanges in every stage; int64 arrays ``(ranks, stages)``, if nothing else is said.

    Attributes:
        tokens: ``(ranks,)`` real tokens that a rank holds; of the queries, where keys are of another sequence.
        pairs: (query, key) pairs computed.
        tiles: tiles of ``TILE`` by ``TILE`` pairs that these pairs touch, counted from each slice's corner.
        links: rows received and sent: of keys and values or, where they travel, of queries.
        hops: ``(stages,)`` how many exchanges follow one another: 2 for those over relays, else 1.
        queries_travel: ``(stages,)`` bool, whether it is queries that travel.
        traffic: ``(groups, groups)`` rows that a group of neighboring ranks (the first index) receives from another,
            all stages together; a group is one rank where there are at most ``MOST_GROUPS``.
    """

    tokens: Table
    pairs: Table
    tiles: Table
    links: LinkRows
    hops: Table
    queries_travel: NDArray[np.bool_]
    traffic: Table

    @property
    def received(self) -> Table:
        """Rows received."""
        return self.links.received_inter + self.links.received_intra

    @property
    def sent(self) -> Table:
        """Rows sent."""
        return self.links.sent_inter + self.links.sent_intra


def count_tiles(bands: Bands) -> Table:
    """How many tiles of ``TILE`` by ``TILE`` pairs each band touches, tiles counted from the band's own corner.

    In units of tiles a band is a band again: a tile lies on the diagonals ``TILE * (J - I)`` plus or minus TILE - 1.
    """
    at_corner = band.shift(bands, -bands[:, band.Q0], -bands[:, band.K0])
    coarse = -(-at_corner // TILE)
    coarse[:, band.D0] = -(-(at_corner[:, band.D0] - (TILE - 1)) // TILE)
    coarse[:, band.D1] = (at_corner[:, band.D1] + TILE - 1) // TILE
    return band.area(coarse)


def measure_stages(
    demand: Demand,
    remote: NDArray[np.int64],
    layout: Layout,
    degree: int,
    ranks_per_node: int,
    key_layout: Layout | None = None,
    *,
    two_hops: bool = False,
) -> StageWork:
    """Measure what all ranks do in each stage in which keys travel, without making every rank's plan.

    Args:
        demand: what the ranks compute and need.
        remote: ``(n, 4)`` rows ``(rank, start, stop, stage)`` that travel, as :func:`plan.stages.cut_stages` cuts them.
        layout: who owns which queries.
        degree: remote stages; 0 for a single stage that computes with own and received rows.
        ranks_per_node: neighboring ranks that share a node; must divide the ranks where there are ``two_hops``.
        key_layout: who owns which keys; None for ``layout``, as in self-attention.
        two_hops: whether rows travel over relays, so that each crosses to a node only once.
    """
    key_layout = key_layout or layout
    num_stages = degree + 1
    stage = remote[:, 3] + (1 if degree else 0)
    pieces, rank, piece_stage = _cut_by_stage(demand, remote, stage, layout, key_layout)
    shape = (layout.num_ranks, num_stages)
    measure_links = _two_hop_links if two_hops else _direct_links
    links, traffic = measure_links(
        [remote[stage == each, :3] for each in range(num_stages)], key_layout, ranks_per_node
    )
    return StageWork(
        tokens=real_tokens(layout),
        pairs=_sums(rank, piece_stage, band.area(pieces), shape),
        tiles=_sums(rank, piece_stage, count_tiles(pieces), shape),
        links=links,
        hops=np.full(num_stages, 2 if two_hops else 1),
        queries_travel=np.zeros(num_stages, bool),
        traffic=traffic,
    )


def group_traffic(traffic: Table) -> Table:
    """Sum a ``(ranks, ranks)`` table over neighboring ranks, to at most ``MOST_GROUPS`` of them."""
    first = np.arange(0, len(traffic), _group_size(len(traffic)))
    return np.add.reduceat(np.add.reduceat(traffic, first, axis=0), first, axis=1)


def _group_size(num_ranks: int) -> int:
    return -(-num_ranks // MOST_GROUPS)


def _direct_links(remote: Sequence[Table], layout: Layout, ranks_per_node: int) -> tuple[LinkRows, Table]:
    """What travels in each stage, given as ``(rank, start, stop)``, and the traffic of all stages."""
    links = [direct_links(each, layout, ranks_per_node) for each in remote]
    everything, size = np.concatenate(remote), _group_size(layout.num_ranks)
    first = np.arange(0, layout.num_ranks, size)
    group = everything[:, 0] // size
    traffic = [np.add.reduceat(rows_sent(everything[group == each, 1:], layout), first) for each in range(len(first))]
    return _by_stage(links), np.stack(traffic)


def _two_hop_links(remote: Sequence[Table], layout: Layout, ranks_per_node: int) -> tuple[LinkRows, Table]:
    """The same where rows travel over relays."""
    loads = [two_hop_loads(each, layout, ranks_per_node) for each in remote]
    return _by_stage([each.by_rank for each in loads]), group_traffic(np.sum([each.traffic for each in loads], axis=0))


def _by_stage(links: Sequence[LinkRows]) -> LinkRows:
    return LinkRows(*(np.column_stack(each) for each in zip(*links, strict=True)))


def real_tokens(layout: Layout) -> Table:
    """``(ranks,)`` the tokens that each rank holds, padding excluded."""
    start, stop, rank, _ = layout.real_runs.T
    return totals(rank, stop - start, layout.num_ranks)


def _cut_by_stage(
    demand: Demand, remote: NDArray[np.int64], stage: Table, layout: Layout, key_layout: Layout
) -> tuple[Bands, NDArray[np.int64], Table]:
    """All ranks' bands, cut along the key rows of each stage: the trimmed pieces, and the rank and stage of each."""
    rank = layout.runs[demand.run, 2]
    tiles = np.concatenate(
        [lifted_runs(key_layout, key_layout.runs[:, 2]), lift(remote[:, 1:3], remote[:, 0], key_layout)]
    )
    tile_stage = np.concatenate([np.zeros(len(key_layout.runs), np.int64), stage])
    order = np.argsort(tiles[:, 0])
    tiles, tile_stage = tiles[order], tile_stage[order]
    keys = demand.bands[:, band.K0 : band.D0]
    piece, tile = overlaps(lift(keys, rank, key_layout), tiles)
    start, stop = lift(tiles[tile], -rank[piece], key_layout).T
    cut, kept = band.shrink(band.clip(demand.bands[piece], band.K0, start, stop))
    return cut, rank[piece[kept]], tile_stage[tile[kept]]


def _sums(rank: Table, stage: Table, values: Table, shape: tuple[int, int]) -> Table:
    return totals(rank * shape[1] + stage, values, shape[0] * shape[1]).reshape(shape)
