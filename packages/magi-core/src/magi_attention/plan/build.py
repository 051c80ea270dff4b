# SPDX-License-Identifier: Apache-2.0
"""The plan: all that one rank needs to compute its share of an attention, from the mask alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import overlaps
from magi_attention.common.slices import SliceTable
from magi_attention.plan.degree import choose_degree
from magi_attention.plan.demand import Demand, find_demand
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange, exchange_of_stage, two_hop_exchange
from magi_attention.plan.layout import Layout
from magi_attention.plan.qo import RowCosts, choose_directions
from magi_attention.plan.stages import StageOptions, cut_stages


@dataclass(frozen=True, eq=False)
class Stage:
    """One kernel call of a rank.

    Its key buffer is the rank's own rows, if ``reads_own``, followed by the rows received by ``exchange``, if any.
    Where ``queries_travel``, it is the queries that ``exchange`` brings: the received rows attend to the rank's own
    keys, and their outputs go back to where they came from.

    Attributes:
        slices: (query rows, rows of the key buffer); the query rows are the rank's own or, where ``queries_travel``,
            those received.
        reads_own: whether the key buffer starts with the rank's own rows.
        exchange: how the rows that are not the rank's own come; None where no rank of the group receives any.
        queries_travel: whether ``exchange`` is of queries rather than of keys.
        received: ``(n, 3)`` rows ``(start, stop, position)``: the key rows received, by their place in the sequence,
            ascending, and where they lie among all that are received. None where queries travel.
        most_received: rows that the rank which receives the most does; equal on all ranks. 0 in a plan in which
            queries may travel, of which nobody asks.
    """

    slices: SliceTable
    reads_own: bool
    exchange: ExchangeTable | TwoHopExchange | None
    queries_travel: bool = False
    received: NDArray[np.int64] | None = None
    most_received: int = 0

    @property
    def num_received(self) -> int:
        """Rows that this rank receives for the stage."""
        return self.exchange.num_received if self.exchange else 0


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank computes and exchanges. Stage 0 reads its own rows; every rank has the same number of stages.

    Attributes:
        layout: who owns which queries, equal on all ranks.
        key_layout: who owns which keys and values; in self-attention the same object as ``layout``.
        rank: this rank.
        stages: in the order of their computation.
        bands: the rank's share of the mask, in its own query rows and in key rows of the sequence.
        digest: 32 bytes over mask, layouts and options: equal on ranks that planned the same.
    """

    layout: Layout
    key_layout: Layout
    rank: int
    stages: tuple[Stage, ...]
    bands: Bands
    digest: bytes


def build_plan(
    slices: SliceTable,
    layout: Layout,
    rank: int,
    options: StageOptions = StageOptions(),
    mesh_shape: tuple[int, int] | None = None,
    row_costs: RowCosts | None = None,
    key_layout: Layout | None = None,
) -> Plan:
    """Plan one rank's share. Needs no communication: every rank derives what the others need from the same inputs.

    Args:
        slices: the mask over the whole (padded) sequences; no pair covered twice.
        layout: who owns which queries.
        rank: the rank to plan for.
        options: how to cut overlap stages.
        mesh_shape: ``(nodes, ranks per node)`` to plan two-hop exchanges; None for direct ones.
        row_costs: what a key row and a query row cost, to let queries travel where that is cheaper; None for keys
            only. Then there is one stage for each direction, whatever the degree, and exchanges are direct.
        key_layout: who owns which keys, where they are of another sequence than the queries; None for ``layout``.
    """
    return build_plans(slices, layout, [rank], options, mesh_shape, row_costs, key_layout)[0]


def build_plans(
    slices: SliceTable,
    layout: Layout,
    ranks: Sequence[int],
    options: StageOptions = StageOptions(),
    mesh_shape: tuple[int, int] | None = None,
    row_costs: RowCosts | None = None,
    key_layout: Layout | None = None,
) -> list[Plan]:
    """Plan the shares of several ranks, deriving what all ranks have in common once."""
    key_layout = key_layout or layout
    demand = find_demand(slices, layout, key_layout)
    degree = choose_degree(demand, layout, key_layout, options, mesh_shape)
    digest = _digest(slices, layout, key_layout, replace(options, degree=degree), mesh_shape, row_costs)
    shares = [_local_queries(demand, layout, rank) for rank in ranks]
    pairs = list(zip(ranks, shares, strict=True))
    if row_costs is not None:
        stages = [_stages_both_ways(demand, bands, layout, key_layout, rank, row_costs) for rank, bands in pairs]
    else:
        remote = cut_stages(demand, key_layout, max(degree, 1), options)
        stages = [_stages_of(bands, remote, key_layout, rank, degree, mesh_shape) for rank, bands in pairs]
    return [
        Plan(layout, key_layout, rank, each, bands, digest) for (rank, bands), each in zip(pairs, stages, strict=True)
    ]


def _stages_of(
    bands: Bands,
    remote: NDArray[np.int64],
    key_layout: Layout,
    rank: int,
    degree: int,
    mesh_shape: tuple[int, int] | None,
) -> tuple[Stage, ...]:
    own = key_layout.runs_of(rank)
    moved = [part for stage in range(max(degree, 1)) if len(part := remote[remote[:, 3] == stage])]
    exchanges = [
        exchange_of_stage(part, key_layout, rank)
        if mesh_shape is None
        else two_hop_exchange(part, key_layout, rank, mesh_shape)
        for part in moved
    ]
    received = [_packed_rows(part[part[:, 0] == rank, 1:3]) for part in moved]
    most = [int(np.bincount(part[:, 0], weights=part[:, 2] - part[:, 1]).max()) for part in moved]
    if degree == 0 and moved:
        own_then_received = np.concatenate([own, received[0] + [0, 0, key_layout.rows_per_rank[rank]]])
        by_row = np.argsort(own_then_received[:, 0])
        slices = slices_in(bands, own_then_received[by_row])
        return (Stage(slices, True, exchanges[0], received=received[0], most_received=most[0]),)
    remote_stages = [
        Stage(slices_in(bands, buffer), False, exchange, received=buffer, most_received=number)
        for buffer, exchange, number in zip(received, exchanges, most, strict=True)
    ]
    return (Stage(slices_in(bands, own), True, None), *remote_stages)


def _stages_both_ways(
    demand: Demand, bands: Bands, layout: Layout, key_layout: Layout, rank: int, costs: RowCosts
) -> tuple[Stage, ...]:
    """Own rows, then visiting queries with own keys, then own queries with received keys.

    All ranks have all three stages, since a rank knows only the pairs that it is part of.
    """
    own = key_layout.runs_of(rank)
    first = Stage(slices_in(bands, own), True, None)
    if layout.num_ranks == 1:
        return (first,)
    directions = choose_directions(demand, layout, key_layout, rank, costs)
    visiting = _packed_rows(directions.queries[directions.queries[:, 0] == rank, 1:])
    received = _packed_rows(directions.keys[directions.keys[:, 0] == rank, 1:])
    place = visiting[np.searchsorted(visiting[:, 0], directions.guests[:, band.Q0], side="right") - 1]
    guests = band.shift(directions.guests, place[:, 2] - place[:, 0], 0)
    by_queries = exchange_of_stage(directions.queries, layout, rank)
    by_keys = exchange_of_stage(directions.keys, key_layout, rank)
    return (
        first,
        Stage(slices_in(guests, own), True, by_queries, queries_travel=True),
        Stage(slices_in(bands, received), False, by_keys, received=received),
    )


def _local_queries(demand: Demand, layout: Layout, rank: int) -> Bands:
    """The rank's bands, their queries numbered as the rank's local rows."""
    mine = layout.runs[demand.run, 2] == rank
    runs = layout.runs[demand.run[mine]]
    return band.shift(demand.bands[mine], runs[:, 3] - runs[:, 0], 0)


def _packed_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(start, stop, position)`` of global rows that are stored one after another."""
    length = rows[:, 1] - rows[:, 0]
    return np.column_stack([rows, np.cumsum(length) - length])


def slices_in(bands: Bands, buffer: NDArray[np.int64]) -> SliceTable:
    """Restrict bands to the keys of a buffer, given as sorted ``(start, stop, position)``, and renumber the keys."""
    piece, tile = overlaps(bands[:, band.K0 : band.D0], buffer[:, :2])
    cut, kept = band.shrink(band.clip(bands[piece], band.K0, buffer[tile, 0], buffer[tile, 1]))
    tile = tile[kept]
    placed = band.shift(cut, 0, buffer[tile, 2] - buffer[tile, 0])
    return SliceTable(_join_full(band.slices_from_bands(placed)[0]))


def _join_full(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join FULL slices of the same queries whose keys became neighbors in the buffer: long runs suit kernels."""
    if not len(rows):
        return rows
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0], rows[:, 4]))
    rows = rows[order]
    before, after = rows[:-1], rows[1:]
    continues = (
        (after[:, 4] == band.FULL)
        & (before[:, 4] == band.FULL)
        & (before[:, :2] == after[:, :2]).all(axis=1)
        & (before[:, 3] == after[:, 2])
    )
    first = np.flatnonzero(np.append(True, ~continues))
    joined = rows[first]
    joined[:, 3] = rows[np.append(first[1:], len(rows)) - 1, 3]
    return joined[np.lexsort((joined[:, 2], joined[:, 0]))]


def _digest(
    slices: SliceTable,
    layout: Layout,
    key_layout: Layout,
    options: StageOptions,
    mesh_shape: tuple[int, int] | None,
    row_costs: RowCosts | None,
) -> bytes:
    layouts = (layout, key_layout)
    sizes = [(each.num_real, each.total, each.chunk_size, each.num_ranks) for each in layouts]
    numbers = (sizes, options, mesh_shape, row_costs)
    digest = hashlib.sha256(repr(numbers).encode())
    digest.update(slices.rows.tobytes())
    for each in layouts:
        digest.update(each.runs.tobytes())
    return digest.digest()
