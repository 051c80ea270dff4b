# SPDX-License-Identifier: Apache-2.0
"""Predict how long one attention layer takes on a cluster, from the plan of all its ranks.

The model, for a rank, a stage and one pass (symbols are fields of :class:`Cluster` and :class:`LayerShape`)::

    compute = kernel_latency + tiles * TILE² * flop_per_pair / flop_rate + merge
    merge   = tokens * heads_q * head_dim * MERGE_BYTES / memory_rate               (for a second and later partial)
    travel  = exchange_latency + bytes_per_row * max(intra / nvlink_rate, inter / link_rate)
    travel  = 2 * exchange_latency + bytes_per_row * (inter / link_rate + intra / nvlink_rate)       (in two hops)

``flop_per_pair`` is ``4 * heads_q * head_dim`` forward (two matrix products of a multiplication and an addition each)
and 2.5 times as many backward (five products). ``intra`` and ``inter`` are the rows that the rank exchanges with its
own node and with others, the larger of received and sent, since links carry both directions at once, and the two kinds
of links work side by side. A row is a key and its value, ``2 * heads_kv * head_dim * bytes_per_number`` bytes.

In two hops (hierarchical communication) a row crosses to each node that misses it once, to a relay, and is spread
within the node thereafter: ``inter`` counts the rows that cross, ``intra`` those of the second hop, which waits for the
first. So the times add up, and each hop has its latency.

Where queries travel, a row is a query: forward, q goes out and out and lse come home; backward, q, the gradient of out,
lse and one more number per head go out and the gradient of q comes home (:attr:`LayerShape.bytes_of_query_row`). The
kernel runs where the keys are, and the owner of the queries merges what comes home once it has arrived: that takes
another ``merge``, which counts as travel.

Stages follow one another as in the runtime. One exchange travels at a time on a rank: a stage's rows after those of the
stage before, and not before the kernel two stages earlier is done. The backward pass fetches the rows again and sends
each stage's gradients of keys and values home after its kernel, sent and received swapped. A pass ends with its slowest
rank; within it, no rank waits for another. Left out: everything but the attention, contention in switches, and the
slowing down of kernels by communication.
"""

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import intersect, overlaps
from magi_attention.plan.demand import Demand, lift, lifted_runs
from magi_attention.plan.layout import Layout
from magi_attention.plan.relays import rows_sent, two_hop_loads

TILE = 128
"""Queries and keys of a kernel's tile: a tile of which the mask keeps any pair is computed as a whole."""

MERGE_BYTES = 10
"""Memory traffic to merge one number of a partial result: read in bf16, the float32 sum read and written."""

BACKWARD_OVER_FORWARD_FLOP = 2.5

LSE_BYTES = 4
"""A row's log-sum-exp, and its term of the gradients, are float32 numbers, one per head."""

MOST_GROUPS = 64
"""Side of the traffic matrix: with more ranks, an entry stands for neighboring ranks together."""

Table = NDArray[np.int64]
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """Rates of a cluster's machines, each way. The defaults are round numbers for H100 in bf16.

    Attributes:
        ranks_per_node: ranks that NVLink joins.
        link_gbs: what one rank can send, and receive, from other nodes, in GB/s.
        nvlink_gbs: the same within its node.
        forward_tflops: rate of the forward kernel on full tiles, in Tflop/s.
        backward_tflops: rate of the backward kernel.
        memory_gbs: rate of the device's memory, in GB/s.
        exchange_latency_us: time that an exchange takes however few rows travel, in microseconds.
        kernel_latency_us: time that a kernel takes however few pairs it computes.
    """

    ranks_per_node: int = 8
    link_gbs: float = 50.0
    nvlink_gbs: float = 400.0
    forward_tflops: float = 600.0
    backward_tflops: float = 500.0
    memory_gbs: float = 3000.0
    exchange_latency_us: float = 20.0
    kernel_latency_us: float = 10.0

    def __post_init__(self) -> None:
        for field, value in zip(fields(self), astuple(self), strict=True):
            if value < 0 or (value == 0 and "latency" not in field.name):
                raise ValueError(f"{field.name} must be positive, not {value}")


class RowBytes(NamedTuple):
    """Bytes of one row that go out and come home in either pass."""

    out_forward: int
    home_forward: int
    out_backward: int
    home_backward: int


@dataclass(frozen=True)
class LayerShape:
    """The heads of an attention layer.

    Attributes:
        heads_q: query heads.
        heads_kv: key/value heads; must divide ``heads_q``.
        head_dim: size of a head.
        bytes_per_number: of what travels; 2 for bf16.
    """

    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    bytes_per_number: int = 2

    def __post_init__(self) -> None:
        for field, value in zip(fields(self), astuple(self), strict=True):
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q must be a multiple of heads_kv={self.heads_kv}, not {self.heads_q}")

    @property
    def flop_per_pair(self) -> int:
        """Floating-point operations per (query, key) pair, forward, all heads."""
        return 4 * self.heads_q * self.head_dim

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one token's keys and values, or of their gradients."""
        return 2 * self.heads_kv * self.head_dim * self.bytes_per_number

    @property
    def bytes_of_key_row(self) -> RowBytes:
        """What travels where keys and values do: they in both passes, and their gradients in the second."""
        return RowBytes(self.bytes_per_row, 0, self.bytes_per_row, self.bytes_per_row)

    @property
    def bytes_of_query_row(self) -> RowBytes:
        """What travels where queries do: q and out with lse; q, dout, lse and a row's term, and dq."""
        vector, number = self.heads_q * self.head_dim * self.bytes_per_number, self.heads_q * LSE_BYTES
        return RowBytes(vector, vector + number, 2 * vector + 2 * number, vector)


@dataclass(frozen=True, eq=False)
class StageWork:
    """What every rank computes and exchanges in every stage; int64 arrays ``(ranks, stages)``, if nothing else is said.

    In exchanges of two hops, rows that a relay receives and passes on count in both hops.

    Attributes:
        tokens: ``(ranks,)`` real tokens that a rank holds; of the queries, where keys are of another sequence.
        pairs: (query, key) pairs computed.
        tiles: tiles of ``TILE`` by ``TILE`` pairs that these pairs touch, counted from each slice's corner.
        received_inter: rows received from other nodes: of keys and values or, where they travel, of queries.
        sent_inter: rows sent to other nodes.
        received_intra: rows received within the node.
        sent_intra: rows sent within the node.
        hops: ``(stages,)`` how many exchanges follow one another: 2 for those over relays, else 1.
        queries_travel: ``(stages,)`` bool, whether it is queries that travel.
        traffic: ``(groups, groups)`` rows that a group of neighboring ranks (the first index) receives from another,
            all stages together; a group is one rank where there are at most ``MOST_GROUPS``.
    """

    tokens: Table
    pairs: Table
    tiles: Table
    received_inter: Table
    sent_inter: Table
    received_intra: Table
    sent_intra: Table
    hops: Table
    queries_travel: NDArray[np.bool_]
    traffic: Table

    @property
    def received(self) -> Table:
        """Rows received."""
        return self.received_inter + self.received_intra

    @property
    def sent(self) -> Table:
        """Rows sent."""
        return self.sent_inter + self.sent_intra


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
    num_ranks, num_stages = layout.num_ranks, degree + 1
    stage = remote[:, 3] + (1 if degree else 0)
    pieces, rank, piece_stage = _cut_by_stage(demand, remote, stage, layout, key_layout)
    measure = _two_hop_links if two_hops else _direct_links
    received_inter, sent_inter, received_intra, sent_intra, traffic = measure(
        remote, stage, num_stages, key_layout, ranks_per_node
    )
    return StageWork(
        tokens=real_tokens(layout),
        pairs=_sums(rank, piece_stage, band.area(pieces), (num_ranks, num_stages)),
        tiles=_sums(rank, piece_stage, count_tiles(pieces), (num_ranks, num_stages)),
        received_inter=received_inter,
        sent_inter=sent_inter,
        received_intra=received_intra,
        sent_intra=sent_intra,
        hops=np.full(num_stages, 2 if two_hops else 1),
        queries_travel=np.zeros(num_stages, bool),
        traffic=traffic,
    )


def group_traffic(traffic: Table) -> Table:
    """Sum a ``(ranks, ranks)`` table over neighboring ranks, to at most ``MOST_GROUPS`` of them."""
    first = np.arange(0, len(traffic), -(-len(traffic) // MOST_GROUPS))
    return np.add.reduceat(np.add.reduceat(traffic, first, axis=0), first, axis=1)


def _direct_links(
    remote: NDArray[np.int64], stage: Table, num_stages: int, layout: Layout, ranks_per_node: int
) -> tuple[Table, Table, Table, Table, Table]:
    """Rows received and sent between nodes, received and sent within them, and the traffic."""
    num_ranks = layout.num_ranks
    received = _sums(remote[:, 0], stage, remote[:, 2] - remote[:, 1], (num_ranks, num_stages))
    sent = np.column_stack([rows_sent(remote[stage == each, 1:3], layout) for each in range(num_stages)])
    received_intra, sent_intra = _within_nodes(remote, stage, layout, ranks_per_node, received, sent)
    group_size = -(-num_ranks // MOST_GROUPS)
    traffic = np.stack(
        [
            np.add.reduceat(
                rows_sent(remote[remote[:, 0] // group_size == group, 1:3], layout),
                np.arange(0, num_ranks, group_size),
            )
            for group in range(-(-num_ranks // group_size))
        ]
    )
    return received - received_intra, sent - sent_intra, received_intra, sent_intra, traffic


def _two_hop_links(
    remote: NDArray[np.int64], stage: Table, num_stages: int, layout: Layout, ranks_per_node: int
) -> tuple[Table, Table, Table, Table, Table]:
    """The same where rows travel over relays."""
    loads = [two_hop_loads(remote[stage == each, :3], layout, ranks_per_node) for each in range(num_stages)]
    received_inter, sent_inter, received_intra, sent_intra = np.array([each.by_rank for each in loads]).transpose(
        1, 2, 0
    )
    traffic = group_traffic(np.sum([each.traffic for each in loads], axis=0))
    return received_inter, sent_inter, received_intra, sent_intra, traffic


def real_tokens(layout: Layout) -> Table:
    """``(ranks,)`` the tokens that each rank holds, padding excluded."""
    start, stop, rank, _ = layout.real_runs.T
    return np.bincount(rank, weights=stop - start, minlength=layout.num_ranks).astype(np.int64)


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


def _within_nodes(
    remote: NDArray[np.int64], stage: Table, layout: Layout, ranks_per_node: int, received: Table, sent: Table
) -> tuple[Table, Table]:
    """Rows received and sent inside nodes, ``(ranks, stages)`` each."""
    if layout.num_ranks <= ranks_per_node:
        return received, sent
    # Every reader meets the runs of its own node only.
    node = layout.runs[:, 2] // ranks_per_node
    by_node = np.argsort(node, kind="stable")
    node_first = np.searchsorted(node[by_node], np.arange((layout.num_ranks - 1) // ranks_per_node + 2))
    reader_node = np.arange(layout.num_ranks) // ranks_per_node
    counts = np.diff(node_first)[reader_node]
    reader = np.repeat(np.arange(layout.num_ranks), counts)
    offset = np.arange(len(reader)) - np.repeat(np.cumsum(counts) - counts, counts)
    run = by_node[node_first[reader_node[reader]] + offset]
    tiles = lift(layout.runs[run, :2], reader, layout)
    pieces, request, tile = intersect(lift(remote[:, 1:3], remote[:, 0], layout), tiles)
    length = pieces[:, 1] - pieces[:, 0]
    return (
        _sums(remote[request, 0], stage[request], length, received.shape),
        _sums(layout.runs[run[tile], 2], stage[request], length, sent.shape),
    )


def _sums(rank: Table, stage: Table, values: Table, shape: tuple[int, int]) -> Table:
    totals = np.zeros(shape, np.int64)
    np.add.at(totals, (rank, stage), values)
    return totals


@dataclass(frozen=True, eq=False)
class PassTimeline:
    """When the stages of one pass run, in seconds from its start; each ``(ranks, stages, 2)``: starts and stops.

    Attributes:
        fetch: the stage's rows travel.
        compute: the stage's kernel runs.
        send_home: gradients of received rows travel or, forward, outputs of visiting queries; else of no length.
    """

    fetch: Seconds
    compute: Seconds
    send_home: Seconds

    @property
    def seconds_by_rank(self) -> Seconds:
        """``(ranks,)`` when each rank is done."""
        ends = [self.fetch[..., 1], self.compute[..., 1], self.send_home[..., 1]]
        return np.max(ends, axis=(0, 2))

    @property
    def seconds(self) -> float:
        """When the slowest rank is done."""
        return float(self.seconds_by_rank.max())


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predicted time of one attention layer.

    Attributes:
        forward: the forward pass.
        backward: the backward pass.
        ideal_seconds: both passes, if the pairs were dealt evenly, kernels ran at their full rate and nothing else took
            time.
    """

    forward: PassTimeline
    backward: PassTimeline
    ideal_seconds: float

    @property
    def seconds(self) -> float:
        """Both passes, each as long as its slowest rank."""
        return self.forward.seconds + self.backward.seconds

    @property
    def efficiency(self) -> float:
        """Ideal over predicted time, at most 1."""
        return self.ideal_seconds / self.seconds


def predict(work: StageWork, cluster: Cluster, shape: LayerShape) -> Prediction:
    """Predict both passes by the model at the top of this module."""
    forward_flop = shape.flop_per_pair
    backward_flop = forward_flop * BACKWARD_OVER_FORWARD_FLOP
    merge = work.tokens[:, None] * (shape.heads_q * shape.head_dim * MERGE_BYTES / (cluster.memory_gbs * 1e9))
    is_partial = (work.pairs > 0) & ~work.queries_travel
    merges = merge * (is_partial & (np.cumsum(is_partial, axis=1) > 1))
    latency = np.where(work.pairs > 0, cluster.kernel_latency_us * 1e-6, 0.0)
    tile_pairs = work.tiles * float(TILE**2)
    forward = latency + tile_pairs * forward_flop / (cluster.forward_tflops * 1e12) + merges
    backward = latency + tile_pairs * backward_flop / (cluster.backward_tflops * 1e12) + merges
    mean_pairs = work.pairs.sum() / len(work.pairs)
    travel = [
        _travel_seconds(work, cluster, *each)
        for each in zip(shape.bytes_of_key_row, shape.bytes_of_query_row, strict=True)
    ]
    out_forward, home_forward, out_backward, home_backward = travel
    comes_home = work.queries_travel & (work.received.sum(axis=0) > 0)
    return Prediction(
        forward=_walk(out_forward, forward, home_forward + merge * comes_home),
        backward=_walk(out_backward, backward, home_backward + merge * comes_home),
        ideal_seconds=float(
            mean_pairs * (forward_flop / cluster.forward_tflops + backward_flop / cluster.backward_tflops) / 1e12
        ),
    )


def _travel_seconds(work: StageWork, cluster: Cluster, bytes_of_keys: int, bytes_of_queries: int) -> Seconds:
    """``(ranks, stages)`` time that each stage's exchange keeps a rank's links busy, in either direction."""
    row = np.where(work.queries_travel, bytes_of_queries, bytes_of_keys)
    inter = np.maximum(work.received_inter, work.sent_inter) * row / (cluster.link_gbs * 1e9)
    intra = np.maximum(work.received_intra, work.sent_intra) * row / (cluster.nvlink_gbs * 1e9)
    busy = np.where(work.hops > 1, inter + intra, np.maximum(inter, intra))
    # A collective concerns all ranks, even those that exchange nothing in it.
    takes_place = (row > 0) & (work.received.sum(axis=0) > 0)
    return busy + work.hops * takes_place * cluster.exchange_latency_us * 1e-6


def _walk(fetch: Seconds, compute: Seconds, send_home: Seconds) -> PassTimeline:
    """Run all ranks' stages, in the order in which the runtime puts exchanges on the link."""
    num_ranks, num_stages = fetch.shape
    timeline = PassTimeline(*(np.zeros((num_ranks, num_stages, 2)) for _ in range(3)))
    link = done = np.zeros(num_ranks)

    def occupy(table: Seconds, stage: int, length: Seconds, ready: Seconds) -> None:
        nonlocal link
        start = np.where(length > 0, np.maximum(link, ready), link)
        link = start + length
        table[:, stage] = np.column_stack([start, link])

    occupy(timeline.fetch, 0, fetch[:, 0], done)
    for stage in range(num_stages):
        # `done` is when the kernel before this stage's is: it was launched before what follows was put on the link.
        if stage:
            occupy(timeline.send_home, stage - 1, send_home[:, stage - 1], done)
        if stage + 1 < num_stages:
            occupy(timeline.fetch, stage + 1, fetch[:, stage + 1], done)
        start = np.maximum(done, timeline.fetch[:, stage, 1])
        done = start + compute[:, stage]
        timeline.compute[:, stage] = np.column_stack([start, done])
    occupy(timeline.send_home, num_stages - 1, send_home[:, -1], done)
    return timeline
