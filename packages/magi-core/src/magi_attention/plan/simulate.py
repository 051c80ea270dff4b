# SPDX-License-Identifier: Apache-2.0
"""Predict how long one attention layer takes on a cluster, from the plan of all its ranks.

The model, for a rank, a stage and one pass (symbols are fields of :class:`~plan.rates.Cluster` and
:class:`~plan.rates.LayerShape`)::

    compute = kernel_latency + tiles * TILE² * flop_per_pair / flop_rate + merge
    merge   = tokens * heads_q * head_dim * MERGE_BYTES / memory_rate               (for a second and later partial)
    travel  = exchange_latency + bytes_per_row * max(intra / nvlink_rate, inter / link_rate)

``flop_per_pair`` is ``4 * heads_q * head_dim`` forward (two matrix products of a multiplication and an addition each)
and 2.5 times as many backward (five products). ``intra`` and ``inter`` are the rows that the rank exchanges with its
own node and with others, the larger of received and sent, since links carry both directions at once, and the two kinds
of links work side by side. A row is a key and its value, ``2 * heads_kv * head_dim * bytes_per_number`` bytes.

Stages follow one another as in the runtime. One exchange travels at a time on a rank: a stage's rows after those of the
stage before, and not before the kernel two stages earlier is done. The backward pass fetches the rows again and sends
each stage's gradients of keys and values home after its kernel, sent and received swapped. A pass ends with its slowest
rank; within it, no rank waits for another. Left out: everything but the attention, contention in switches, and the
slowing down of kernels by communication.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import overlaps
from magi_attention.plan.demand import Demand, lift, lifted_runs
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import BACKWARD_OVER_FORWARD_FLOP, MERGE_BYTES, TILE, Cluster, LayerShape
from magi_attention.plan.traffic import rows_sent, rows_within_nodes

MOST_GROUPS = 64
"""Side of the traffic matrix: with more ranks, an entry stands for neighboring ranks together."""

Table = NDArray[np.int64]
Seconds = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StageWork:
    """What every rank computes and exchanges in every stage; int64 arrays ``(ranks, stages)``, if nothing else is said.

    Attributes:
        tokens: ``(ranks,)`` real tokens that a rank holds.
        pairs: (query, key) pairs computed.
        tiles: tiles of ``TILE`` by ``TILE`` pairs that these pairs touch, counted from each slice's corner.
        received: key/value rows received.
        sent: key/value rows sent.
        received_inter: those of ``received`` that come from other nodes.
        sent_inter: those of ``sent`` that go to other nodes.
        traffic: ``(groups, groups)`` rows that a group of neighboring ranks (the first index) receives from another,
            all stages together; a group is one rank where there are at most ``MOST_GROUPS``.
    """

    tokens: Table
    pairs: Table
    tiles: Table
    received: Table
    sent: Table
    received_inter: Table
    sent_inter: Table
    traffic: Table


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
    demand: Demand, remote: NDArray[np.int64], layout: Layout, degree: int, ranks_per_node: int
) -> StageWork:
    """Measure what all ranks do in each stage, without making every rank's plan.

    Args:
        demand: what the ranks compute and need.
        remote: ``(n, 4)`` rows ``(rank, start, stop, stage)`` that travel, as :func:`plan.stages.cut_stages` cuts them.
        layout: who owns which rows.
        degree: remote stages; 0 for a single stage that computes with own and received rows.
        ranks_per_node: neighboring ranks that share a node.
    """
    num_ranks, num_stages = layout.num_ranks, degree + 1
    stage = remote[:, 3] + (1 if degree else 0)
    received = _sums(remote[:, 0], stage, remote[:, 2] - remote[:, 1], (num_ranks, num_stages))
    sent = np.column_stack([rows_sent(remote[stage == each, 1:3], layout) for each in range(num_stages)])
    received_intra, sent_intra = _within_nodes(remote, stage, layout, ranks_per_node, num_stages)
    pieces, rank, piece_stage = _cut_by_stage(demand, remote, stage, layout)
    group_size = -(-num_ranks // MOST_GROUPS)
    return StageWork(
        tokens=real_tokens(layout),
        pairs=_sums(rank, piece_stage, band.area(pieces), (num_ranks, num_stages)),
        tiles=_sums(rank, piece_stage, count_tiles(pieces), (num_ranks, num_stages)),
        received=received,
        sent=sent,
        received_inter=received - received_intra,
        sent_inter=sent - sent_intra,
        traffic=np.stack(
            [
                np.add.reduceat(
                    rows_sent(remote[remote[:, 0] // group_size == group, 1:3], layout),
                    np.arange(0, num_ranks, group_size),
                )
                for group in range(-(-num_ranks // group_size))
            ]
        ),
    )


def real_tokens(layout: Layout) -> Table:
    """``(ranks,)`` the tokens that each rank holds, padding excluded."""
    start, stop, rank, _ = layout.real_runs.T
    return np.bincount(rank, weights=stop - start, minlength=layout.num_ranks).astype(np.int64)


def _cut_by_stage(
    demand: Demand, remote: NDArray[np.int64], stage: Table, layout: Layout
) -> tuple[Bands, NDArray[np.int64], Table]:
    """All ranks' bands, cut along the key rows of each stage: the trimmed pieces, and the rank and stage of each."""
    rank = layout.runs[demand.run, 2]
    tiles = np.concatenate([lifted_runs(layout, layout.runs[:, 2]), lift(remote[:, 1:3], remote[:, 0], layout)])
    tile_stage = np.concatenate([np.zeros(len(layout.runs), np.int64), stage])
    order = np.argsort(tiles[:, 0])
    tiles, tile_stage = tiles[order], tile_stage[order]
    keys = demand.bands[:, band.K0 : band.D0]
    piece, tile = overlaps(lift(keys, rank, layout), tiles)
    start, stop = lift(tiles[tile], -rank[piece], layout).T
    cut, kept = band.shrink(band.clip(demand.bands[piece], band.K0, start, stop))
    return cut, rank[piece[kept]], tile_stage[tile[kept]]


def _within_nodes(
    remote: NDArray[np.int64], stage: Table, layout: Layout, ranks_per_node: int, num_stages: int
) -> tuple[Table, Table]:
    """Rows received and sent inside nodes, ``(ranks, stages)`` each."""
    received, sent = np.zeros((2, layout.num_ranks, num_stages), np.int64)
    for each in range(num_stages):
        part = remote[stage == each, :3]
        rows, sent[:, each] = rows_within_nodes(part, layout, ranks_per_node)
        np.add.at(received[:, each], part[:, 0], rows)
    return received, sent


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
        send_home: the gradients of received rows travel; of no length in the forward pass.
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
    fetch = _travel_seconds(work, cluster, shape)
    merge = work.tokens[:, None] * (shape.heads_q * shape.head_dim * MERGE_BYTES / (cluster.memory_gbs * 1e9))
    merge = merge * ((work.pairs > 0) & (np.cumsum(work.pairs > 0, axis=1) > 1))
    latency = np.where(work.pairs > 0, cluster.kernel_latency_us * 1e-6, 0.0)
    tile_pairs = work.tiles * float(TILE**2)
    forward = latency + tile_pairs * forward_flop / (cluster.forward_tflops * 1e12) + merge
    backward = latency + tile_pairs * backward_flop / (cluster.backward_tflops * 1e12) + merge
    mean_pairs = work.pairs.sum() / len(work.pairs)
    return Prediction(
        forward=_walk(fetch, forward, np.zeros_like(fetch)),
        backward=_walk(fetch, backward, fetch),
        ideal_seconds=float(
            mean_pairs * (forward_flop / cluster.forward_tflops + backward_flop / cluster.backward_tflops) / 1e12
        ),
    )


def _travel_seconds(work: StageWork, cluster: Cluster, shape: LayerShape) -> Seconds:
    """``(ranks, stages)`` time that each stage's exchange keeps a rank's links busy, in either direction."""
    inter = np.maximum(work.received_inter, work.sent_inter)
    intra = np.maximum(work.received - work.received_inter, work.sent - work.sent_inter)
    busy = np.maximum(inter / (cluster.link_gbs * 1e9), intra / (cluster.nvlink_gbs * 1e9)) * shape.bytes_per_row
    # A collective concerns all ranks, even those that exchange nothing in it.
    return busy + (work.received.sum(axis=0) > 0) * cluster.exchange_latency_us * 1e-6


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
